"""What makes a run fit that does not: changes in the order of what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import compress, product

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.estimate.memory import Memory

ADAPTER_RANK = 16
# Shares of a GPU for an engine that has it alone while it samples, and for one beside a policy in training.
ALONE, BESIDE = 0.9, 0.3


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


def _more_engine(config: Config) -> None:
    config.vllm.gpu_memory_utilization = ALONE


def _less_engine(config: Config) -> None:
    config.vllm.gpu_memory_utilization = BESIDE


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


def _uses_vllm(config: Config, ranks: int) -> bool:
    return config.rounds.count > 0 and config.rollout.engine == "vllm"


# Earlier ones leave the result as it is and cost little or nothing; the last one trains other weights.
CHANGES = (
    Change("--train.layout auto", "nothing", lambda config, ranks: config.train.layout == "padded", _layout),
    Change(f"--vllm.gpu_memory_utilization {ALONE}", "nothing", _uses_vllm, _more_engine),
    Change(f"--vllm.gpu_memory_utilization {BESIDE}", "slower sampling", _uses_vllm, _less_engine),
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


def useful_changes(memory: Memory, could_pack: bool = True) -> list[Change]:
    """Those that would change this run, in their order. could_pack: whether the model allows another layout than padded.

    An engine gets a larger share if it has no room for an answer, and a smaller one if the policy in training leaves it too
    little. Without a GPU nothing can be spared there."""
    config, share = memory.config, memory.config.vllm.gpu_memory_utilization
    wanted: dict[Callable[[Config], None], bool] = {
        _layout: could_pack,
        _offload: memory.device.on_gpu,
        _more_engine: memory.device.on_gpu and share < ALONE and memory.cached_tokens() < config.data.max_len,
        _less_engine: memory.device.on_gpu and share > BESIDE and memory.algorithm.fresh_answers,
    }
    return [change for change in CHANGES if change.useful(config, memory.ranks) and wanted.get(change.apply, True)]


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
