"""What the package offers to processes that train or score: imports of seconds, which engines do without."""

from openrlhf.models import Actor, DPOLoss
from openrlhf.utils.distributed_sampler import DistributedSampler

from openrlhf_sgpo.openrlhf.actor import fits_whole, load_actor, save_policy
from openrlhf_sgpo.openrlhf.adapters import DEFAULT_ADAPTER, resting, use_adapter
from openrlhf_sgpo.openrlhf.extragradient import Extragradient
from openrlhf_sgpo.openrlhf.reward import load_reward_model, no_value_head, value_head
from openrlhf_sgpo.openrlhf.strategy import (
    DeepspeedStrategy,
    build_strategy,
    destroy,
    openrlhf_arguments,
)
from openrlhf_sgpo.openrlhf.weights import PolicyWeights, aside

__all__ = [
    "DEFAULT_ADAPTER",
    "Actor",
    "DPOLoss",
    "DeepspeedStrategy",
    "DistributedSampler",
    "Extragradient",
    "PolicyWeights",
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
