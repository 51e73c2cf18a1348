"""The only package that imports OpenRLHF, and the only one that adapts it to machines without CUDA."""

from openrlhf_sgpo.openrlhf.flash_attention import make_optional

make_optional()

from openrlhf.datasets import RewardDataset  # noqa: E402 - flash_attention must be made optional first
from openrlhf.models import Actor, DPOLoss  # noqa: E402
from openrlhf.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from openrlhf.utils.distributed_sampler import DistributedSampler  # noqa: E402

from openrlhf_sgpo.openrlhf.actor import load_actor, save_policy, save_weights  # noqa: E402
from openrlhf_sgpo.openrlhf.adapters import DEFAULT_ADAPTER, resting, use_adapter  # noqa: E402
from openrlhf_sgpo.openrlhf.reward import load_reward_model, no_value_head, value_head  # noqa: E402
from openrlhf_sgpo.openrlhf.strategy import DeepspeedStrategy, build_strategy, openrlhf_arguments  # noqa: E402

__all__ = [
    "DEFAULT_ADAPTER",
    "Actor",
    "DPOLoss",
    "DPOTrainer",
    "DeepspeedStrategy",
    "DistributedSampler",
    "RewardDataset",
    "build_strategy",
    "load_actor",
    "load_reward_model",
    "no_value_head",
    "openrlhf_arguments",
    "resting",
    "save_policy",
    "save_weights",
    "use_adapter",
    "value_head",
]
