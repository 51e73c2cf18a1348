"""What ranks tell each other apart from gradients: decisions, results, and that they are there.

All of it goes over a gloo group with a long limit. Over NCCL, ranks that wait for rank 0's engines would spin on the very
GPUs on which those engines generate, and give up after an hour.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from torch import distributed

Value = TypeVar("Value")


@cache
def _control() -> distributed.ProcessGroup:
    """Created at the first use, which is collective like every use."""
    return distributed.new_group(backend="gloo", timeout=timedelta(days=7))


def from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank: what is on disk is for one rank to say, or ranks could part ways. Collective."""
    box = [value]
    distributed.broadcast_object_list(box, src=0, group=_control())
    return box[0]


def on_rank_0(work: Callable[[], Value]) -> Value:
    """Run ``work`` on rank 0 and return its result on every rank; a ValueError that it raises is raised on every rank, so
    that none waits for the others. Collective; without a process group this process is the only one."""
    if not distributed.is_initialized():
        return work()
    result, problem = None, None
    if distributed.get_rank() == 0:
        try:
            result = work()
        except ValueError as error:
            problem = error
    result, problem = from_rank_0((result, problem))
    try:
        if problem is not None:
            raise problem
        return result
    finally:
        del problem  # an exception that its own frame refers to would keep alive all that ``work`` held, locks included


def gather(value: Value) -> list[Value]:
    """Every rank's value, by rank, on every rank. Collective."""
    values: list[Value] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=_control())
    return values


def barrier() -> None:
    distributed.barrier(group=_control())
