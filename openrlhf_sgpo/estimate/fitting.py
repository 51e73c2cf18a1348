"""What makes a run fit that does not: changes in the order of what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import compress, product
from operator import attrgetter
from typing import Any

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.estimate.memory import Memory

ADAPTER_RANK = 16
# Shares of a GPU for an engine that has it alone while it samples, and for one beside a policy in training.
ALONE, BESIDE = 0.9, 0.3


@dataclass(frozen=True)
class Change:
    """settings: what to change, by flag. cost: in words. useful: whether it would change this run."""

    settings: Mapping[str, Any]
    cost: str
    useful: Callable[[Memory], bool]


def _together(changes: Sequence[Change]) -> dict[str, Any]:
    """The settings of several changes. Earlier ones are kept: offloading needs a ZeRO stage, which may be 3 already."""
    settings: dict[str, Any] = {}
    for change in changes:
        for name, value in change.settings.items():
            settings.setdefault(name, value)
    return settings


def flags_of(*changes: Change) -> str:
    """What to add to the command line."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in _together(changes).items())


def _several_pairs(memory: Memory) -> bool:
    config = memory.config
    return config.train.micro_batch_size > 1 or config.train.max_tokens > 2 * config.data.max_len


def _no_room(memory: Memory) -> bool:
    """Whether an engine has no room for the keys and values of an answer."""
    share, needed = memory.config.vllm.gpu_memory_utilization, memory.config.data.max_len
    return memory.engines and memory.device.on_gpu and share < ALONE and memory.cached_tokens() < needed


def _too_much_room(memory: Memory) -> bool:
    """Whether an engine's share may leave too little to the policy that is trained beside it."""
    share = memory.config.vllm.gpu_memory_utilization
    return memory.engines and memory.device.on_gpu and share > BESIDE and memory.algorithm.fresh_answers


def _can_offload(memory: Memory, sharded: bool) -> bool:
    is_sharded = memory.config.ds.zero_stage > 0
    return memory.device.on_gpu and not memory.config.ds.adam_offload and is_sharded == sharded


OFFLOADING = "slow steps, host memory"
# Earlier ones leave the result as it is and cost little or nothing; the last one trains other weights.
CHANGES = (
    Change(
        {"train.layout": "auto"},
        "nothing",
        lambda memory: memory.config.train.layout == "padded" and not memory.config.ds.packing_samples,
    ),
    Change({"vllm.gpu_memory_utilization": ALONE}, "nothing", _no_room),
    Change({"vllm.gpu_memory_utilization": BESIDE}, "slower sampling", _too_much_room),
    Change({"train.micro_batch_size": 1, "train.max_tokens": 0}, "a little speed", _several_pairs),
    Change({"ds.zero_stage": 2}, "nothing", lambda memory: memory.ranks > 1 and memory.config.ds.zero_stage < 2),
    Change(
        {"model.gradient_checkpointing_enable": True},
        "a third more operations",
        lambda memory: not memory.config.model.gradient_checkpointing_enable,
    ),
    Change(
        {"ds.zero_stage": 3},
        "traffic between GPUs",
        lambda memory: memory.ranks > 1 and memory.config.ds.zero_stage < 3,
    ),
    Change({"ds.adam_offload": True}, OFFLOADING, lambda memory: _can_offload(memory, sharded=True)),
    Change(
        {"ds.zero_stage": 2, "ds.adam_offload": True}, OFFLOADING, lambda memory: _can_offload(memory, sharded=False)
    ),
    Change({"ds.lora.rank": ADAPTER_RANK}, "trains adapters instead", lambda memory: memory.config.ds.lora.rank == 0),
)


def useful_changes(memory: Memory, could_pack: bool = True) -> list[Change]:
    """Those that would change this run, in their order. could_pack: whether the model allows another layout than padded."""
    useful = [change for change in CHANGES if change.useful(memory)]
    return [change for change in useful if could_pack or "train.layout" not in change.settings]


def changed(config: Config, *changes: Change) -> Config:
    result = deepcopy(config)
    for name, value in _together(changes).items():
        group, _, field = name.rpartition(".")
        setattr(attrgetter(group)(result), field, value)
    return result


def combinations(changes: list[Change]) -> Iterator[list[Change]]:
    """All of them in the order of binary counting: whatever earlier changes can do together comes before the next one."""
    for chosen in product((False, True), repeat=len(changes)):
        if any(chosen):
            yield list(compress(changes, reversed(chosen)))
