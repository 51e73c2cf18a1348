"""OpenRLHF's group of Ray actors, which carries the training ranks of a run on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openrlhf_sgpo.memory import lean_imports

with lean_imports():  # this is what a rank imports first
    import ray
    from openrlhf.trainer.ray.launcher import BaseModelActor, RayActorGroup


class _Rank(BaseModelActor):
    """A process that knows its rank, and the address at which the ranks meet."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


Rank = ray.remote(num_gpus=1)(_Rank)


def start_ranks(count: int, group: Any, share: float) -> list[Any]:
    """Actors of the ranks, in their order, in the first bundles of a placement group; rank 0 is in the first. share: of a GPU
    that each takes in Ray's books, 0 without GPUs."""
    handlers: list[Any] = RayActorGroup(1, count, Rank, pg=group, num_gpus_per_actor=share)._actor_handlers
    return handlers
