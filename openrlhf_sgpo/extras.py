"""Packages that only some commands need, and how to install a missing one."""

from __future__ import annotations

from importlib.util import find_spec

TRAINING = "pip install 'openrlhf-sgpo[gpu]', or 'openrlhf-sgpo[cpu]' on a machine without a GPU"
BENCHMARKS = "pip install 'openrlhf-sgpo[eval]'"
# By import name.
_COMMANDS = {
    "openrlhf": "pip install --no-deps openrlhf==0.11.2, after its requirements (see README, On GPUs)",
    "flash_attn": "pip install --no-build-isolation flash-attn, which needs CUDA's compiler nvcc",
    **{
        name: f"pip install {name}"
        for name in ("cvxpy", "datasets", "matplotlib", "openai", "plotly", "pyarrow", "scipy", "tensorboard", "wandb")
    },
}


def how_to_install(module: str, otherwise: str = TRAINING) -> str:
    """One sentence that names a missing package and the command that installs it.

    module: the package, or a module in it. otherwise: the command for packages not listed here, such as OpenRLHF's own
    requirements."""
    package = module.partition(".")[0]
    return f"the package {package} is not installed: {_COMMANDS.get(package, otherwise)}"


def missing(*packages: str, otherwise: str = TRAINING) -> str:
    """``how_to_install`` for the first missing package; empty if none is missing."""
    return next((how_to_install(package, otherwise) for package in packages if find_spec(package) is None), "")
