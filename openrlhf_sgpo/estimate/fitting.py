"""What makes a run fit that does not: changes in the order of what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import compress, product

from openrlhf_sgpo.config import Config

ADAPTER_RANK = 16
ENGINE_SHARE = 0.9  # of a GPU on which training sleeps while an engine samples


@dataclass(frozen=True)
class Change:
    """flags: what to add to the command line. cost: in words. useful: whether it would change this run. apply: to a copy of its
    settings."""

    flags: str
    cost: str
    useful: Callable[[Config, int], bool]
    apply: Callable[[Config], None]


def _layout(config: Config) -> None:
    config.train.layout = "auto"
    config.ds.packing_samples = False


def _engine_share(config: Config) -> None:
    config.vllm.gpu_memory_utilization = ENGINE_SHARE


def _one_pair(config: Config) -> None:
    config.train.micro_batch_size = 1
    config.train.max_tokens = 0


def _checkpointing(config: Config) -> None:
    config.model.gradient_checkpointing_enable = True


def _shards(config: Config) -> None:
    config.ds.zero_stage = 3


def _gradient_shards(config: Config) -> None:
    config.ds.zero_stage = 2


def _offload(config: Config) -> None:
    config.ds.adam_offload = True
    config.ds.zero_stage = max(config.ds.zero_stage, 2)


def _adapters(config: Config) -> None:
    config.ds.lora.rank = ADAPTER_RANK


# Earlier ones leave the result as it is and cost little or nothing; the last one trains other weights.
CHANGES = (
    Change("--train.layout auto", "nothing", lambda config, ranks: config.train.layout == "padded", _layout),
    Change(
        f"--vllm.gpu_memory_utilization {ENGINE_SHARE}",
        "nothing",
        lambda config, ranks: (
            config.rounds.count > 0
            and config.rollout.engine == "vllm"
            and config.vllm.gpu_memory_utilization < ENGINE_SHARE
        ),
        _engine_share,
    ),
    Change(
        "--train.micro_batch_size 1 --train.max_tokens 0",
        "a little speed",
        lambda config, ranks: (
            config.train.micro_batch_size > 1
            or config.train.max_tokens > 2 * config.data.max_len
            or (config.train.layout == "padded" and config.train.micro_batch_size > 1)
        ),
        _one_pair,
    ),
    Change(
        "--ds.zero_stage 2",
        "nothing",
        lambda config, ranks: ranks > 1 and config.ds.zero_stage < 2,
        _gradient_shards,
    ),
    Change(
        "--model.gradient_checkpointing_enable true",
        "a third more operations",
        lambda config, ranks: not config.model.gradient_checkpointing_enable,
        _checkpointing,
    ),
    Change(
        "--ds.zero_stage 3",
        "traffic between GPUs",
        lambda config, ranks: ranks > 1 and config.ds.zero_stage < 3,
        _shards,
    ),
    Change(
        "--ds.adam_offload true",
        "slow steps, host memory",
        lambda config, ranks: not config.ds.adam_offload,
        _offload,
    ),
    Change(
        f"--ds.lora.rank {ADAPTER_RANK}",
        "trains adapters instead",
        lambda config, ranks: config.ds.lora.rank == 0,
        _adapters,
    ),
)


def useful_changes(config: Config, ranks: int, on_gpu: bool, could_pack: bool = True) -> list[Change]:
    """Those that would change this run, in their order. on_gpu: otherwise there is no GPU to share or to spare. could_pack:
    whether the model allows another layout than padded."""
    excluded = [*([] if on_gpu else [_offload, _engine_share]), *([] if could_pack else [_layout])]
    return [change for change in CHANGES if change.useful(config, ranks) and change.apply not in excluded]


def changed(config: Config, *changes: Change) -> Config:
    result = deepcopy(config)
    for change in changes:
        change.apply(result)
    return result


def combinations(changes: list[Change]) -> Iterator[list[Change]]:
    """All of them in the order of binary counting: whatever earlier changes can do together comes before the next one."""
    for chosen in product((False, True), repeat=len(changes)):
        if any(chosen):
            yield list(compress(changes, reversed(chosen)))
