"""Log-probabilities of responses under a policy on disk: the numbers that oracle, follower, loss and evaluation share."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch
from torch import distributed
from tqdm import tqdm

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.openrlhf import DeepspeedStrategy, load_actor
from openrlhf_sgpo.training.log_probs import response_log_probs

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import Actor

Key = tuple[tuple[int, ...], tuple[int, ...]]


class Scorer:
    """Scores groups under a model folder; one model is in memory at a time, and no response is scored twice.

    Results are kept per model and exact tokens, so that a reference is evaluated once, whoever asks. ``forget`` drops
    those of a model that will not be asked again.
    """

    def __init__(self, config: Config, strategy: DeepspeedStrategy, pad_token_id: int):
        self.config = config
        self.strategy = strategy
        self.pad_token_id = pad_token_id
        self.tokens_scored = 0
        self._known: dict[str, dict[Key, float]] = {}

    def forget(self, model: str) -> None:
        self._known.pop(model, None)

    def score(self, model: str, groups: list[Group], label: str) -> list[tuple[float, ...]]:
        """Summed log-probability of each response of each group. Collective: every rank calls it with the same groups."""
        known = self._known.setdefault(model, {})
        missing = []
        for group in groups:
            responses = tuple(dict.fromkeys(r for r in group.responses if (group.prompt, r) not in known))
            if responses:
                missing.append(Group(group.prompt, responses))
        if missing:
            known.update(self._compute(model, missing, label))
        return [tuple(known[group.prompt, response] for response in group.responses) for group in groups]

    def _compute(self, model: str, groups: list[Group], label: str) -> dict[Key, float]:
        self.tokens_scored += sum(map(len, groups))
        # Neighbours of similar length waste least; longest first, so that memory runs out at once or never.
        groups = sorted(groups, key=len, reverse=True)
        world, rank = distributed.get_world_size(), distributed.get_rank()
        size = self.config.train.micro_batch_size
        batches = [groups[start : start + size] for start in range(0, len(groups), size)]
        mine = batches[rank::world]
        # ZeRO-3 gathers parameters collectively: every rank must run the same number of forwards.
        mine += [batches[0]] * (-(-len(batches) // world) - len(mine))
        actor = self.strategy.prepare(load_actor(model, self.config, self.strategy, trainable=False))
        try:
            sums = self._forward(actor, mine, label)
        finally:
            del actor
            release_memory()
        keys = [(group.prompt, response) for batch in mine for group in batch for response in group.responses]
        gathered: list[dict[Key, float]] = [{} for _ in range(world)]
        distributed.all_gather_object(gathered, dict(zip(keys, sums.tolist(), strict=True)))
        return {key: value for part in gathered for key, value in part.items()}

    @torch.no_grad()
    def _forward(self, actor: Actor, batches: list[list[Group]], label: str) -> torch.Tensor:
        actor.eval()
        progress = tqdm(batches, desc=label, unit="batch", disable=not self.strategy.is_rank_0())
        layout = self.config.train.layout
        return torch.cat([response_log_probs(actor, batch, layout, self.pad_token_id) for batch in progress])


def release_memory() -> None:
    """Return the memory of a model that has just gone out of use; DeepSpeed's engines hold reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
