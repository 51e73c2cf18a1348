"""The only package that imports OpenRLHF, and the only one that adapts it to machines without CUDA."""

from importlib import import_module
from typing import Any

from openrlhf_sgpo.openrlhf.flash_attention import make_optional

make_optional()

from openrlhf.models import Actor, DPOLoss  # noqa: E402 - flash_attention must be made optional first
from openrlhf.utils.distributed_sampler import DistributedSampler  # noqa: E402

from openrlhf_sgpo.openrlhf.actor import fits_whole, load_actor, save_policy  # noqa: E402
from openrlhf_sgpo.openrlhf.adapters import DEFAULT_ADAPTER, resting, use_adapter  # noqa: E402
from openrlhf_sgpo.openrlhf.extragradient import Extragradient  # noqa: E402
from openrlhf_sgpo.openrlhf.reward import load_reward_model, no_value_head, value_head  # noqa: E402
from openrlhf_sgpo.openrlhf.strategy import (  # noqa: E402
    DeepspeedStrategy,
    build_strategy,
    destroy,
    openrlhf_arguments,
)
from openrlhf_sgpo.openrlhf.weights import PolicyWeights, aside  # noqa: E402

__all__ = [
    "DEFAULT_ADAPTER",
    "Actor",
    "DPOLoss",
    "DPOTrainer",
    "DeepspeedStrategy",
    "DistributedSampler",
    "Extragradient",
    "PolicyWeights",
    "RewardDataset",
    "aside",
    "build_strategy",
    "destroy",
    "fits_whole",
    "load_actor",
    "load_reward_model",
    "no_value_head",
    "openrlhf_arguments",
    "resting",
    "save_policy",
    "use_adapter",
    "value_head",
]

# For scripts of OpenRLHF's users; a run would load ``datasets`` and pandas with them in vain.
_FOR_SCRIPTS = {"DPOTrainer": "openrlhf.trainer.dpo_trainer", "RewardDataset": "openrlhf.datasets"}


def __getattr__(name: str) -> Any:
    if name not in _FOR_SCRIPTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FOR_SCRIPTS[name]), name)
