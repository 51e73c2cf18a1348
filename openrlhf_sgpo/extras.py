"""Packages that only some commands need, and how to install a missing one."""

from __future__ import annotations

from importlib.util import find_spec

TRAINING_ON_GPUS = "pip install 'openrlhf-sgpo[gpu]'"
TRAINING_ON_CPU = "pip install 'openrlhf-sgpo[cpu]'"
TRAINING = f"{TRAINING_ON_GPUS}, or 'openrlhf-sgpo[cpu]' on a machine without a GPU"
BENCHMARKS = "pip install 'openrlhf-sgpo[eval]'"
TRL = "pip install 'openrlhf-sgpo[trl]'"
OPENRLHF = "openrlhf==0.11.2"  # the tested version
# By import name.
_COMMANDS = {
    "openrlhf": f"pip install --no-deps {OPENRLHF}, after its requirements (see README, On GPUs)",
    "flash_attn": "pip install --no-build-isolation flash-attn, which needs CUDA's compiler nvcc",
    **{
        name: f"pip install {name}"
        for name in (
            "cvxpy",
            "datasets",
            "huggingface_hub",
            "matplotlib",
            "openai",
            "plotly",
            "pyarrow",
            "scipy",
            "tensorboard",
            "trackio",
            "wandb",
        )
    },
}


def how_to_install(module: str, otherwise: str = TRAINING) -> str:
    """One sentence that names a missing package and the command that installs it.

    module: the package, or a module in it. otherwise: the command for packages not listed here, such as OpenRLHF's own
    requirements."""
    return f"the package {module.partition('.')[0]} is not installed: {install(module, otherwise)}"


def install(module: str, otherwise: str = TRAINING) -> str:
    """The command that installs the package of this module; ``otherwise`` where it is not listed here."""
    return _COMMANDS.get(module.partition(".")[0], otherwise)


def training(extra: str) -> str:
    """The command that installs what training needs. extra: gpu or cpu."""
    return TRAINING_ON_GPUS if extra == "gpu" else TRAINING_ON_CPU


def missing(*packages: str, otherwise: str = TRAINING) -> str:
    """``how_to_install`` for the first missing package; empty if none is missing."""
    return next((how_to_install(package, otherwise) for package in packages if find_spec(package) is None), "")
