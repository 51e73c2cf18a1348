"""Optimiser steps on plays: answers that the policy has just given, and what the oracle says of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from openrlhf_sgpo import ranks
from openrlhf_sgpo.algorithms.on_policy import Model, OnPolicyAlgorithm, Plays
from openrlhf_sgpo.data.records import Prompt
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.finite import check_trained
from openrlhf_sgpo.openrlhf import DEFAULT_ADAPTER, resting, use_adapter
from openrlhf_sgpo.rollout import Sample
from openrlhf_sgpo.training.log_probs import Logits, response_logits, token_divergence, token_log_probs
from openrlhf_sgpo.training.trainer import seed_generators

if TYPE_CHECKING:
    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.openrlhf import Actor, DeepspeedStrategy


@dataclass(frozen=True)
class Play:
    """Answers to one prompt by the algorithm's roles, in their order, each with the tokens that it followed. preferences: the
    oracle's matrix over the answers."""

    prompt: Prompt
    answers: list[tuple[tuple[int, ...], Sample]]
    preferences: list[list[float]]

    def groups(self, places: Sequence[int] | None = None) -> list[Group]:
        """The answers, or those at some places, behind one copy of each context, in the order of the roles."""
        found: list[Group] = []
        for context, sample in self.answers if places is None else [self.answers[place] for place in places]:
            if found and found[-1].prompt == context:
                found[-1] = Group(context, (*found[-1].responses, sample.token_ids))
            else:
                found.append(Group(context, (sample.token_ids,)))
        return found


class PlayTrainer:
    """Takes one optimiser step per batch of plays. models: the frozen models that the algorithm names in ``models``."""

    def __init__(
        self,
        algorithm: OnPolicyAlgorithm,
        actor: Actor,
        optimizer: Any,
        scheduler: Any,
        models: dict[Model, Actor],
        strategy: DeepspeedStrategy,
        config: Config,
        pad_token_id: int,
    ):
        self.algorithm = algorithm
        self.actor = actor
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.models = models
        self.strategy = strategy
        self.config = config
        self.pad_token_id = pad_token_id
        self.seconds_log_probs = 0.0  # of the frozen models
        self._latest: list[Play] = []
        self.places: dict[str, list[int]] = {}  # of the answers, by the adapter that gives them
        for place, role in enumerate(algorithm.roles):
            self.places.setdefault(algorithm.adapters.get(role, DEFAULT_ADAPTER), []).append(place)

    def step(self, number: int, plays: list[Play]) -> tuple[Tensor, Tensor, Tensor]:
        """One optimiser step on the plays, which are the same on every rank; each trains on its share. Collective.

        Returns the losses (plays,), and the answers' log-probabilities under the policy before the step and under the first
        of the frozen models, both (plays, k), on every rank, detached.
        """
        rank, share = self.strategy.get_rank(), len(plays) // self.strategy.world_size
        mine = plays[rank * share : (rank + 1) * share]
        size = self.config.train.micro_batch_size
        self._latest = mine[:size]
        # Dropout draws the same numbers in a step, whether or not training was resumed before it.
        seed_generators(self.config.train.seed, "plays", number, rank)
        self.actor.train()
        rows = [self._micro_step(number, mine[start : start + size]) for start in range(0, share, size)]
        table = torch.cat(ranks.gather(torch.cat(rows).cpu()))
        own, anchor = table[:, 1:].tensor_split(2, dim=1)
        return table[:, 0], own, anchor

    def check_policy(self, place: str) -> None:
        """Raises NotFiniteError on every rank if a weight of the policy, or a log-probability of the latest step's answers, is
        not finite: a step may be finite and lead out of the range. Collective."""
        self.actor.eval()
        sums = []
        with torch.no_grad():
            for adapter, places in self.places.items():
                groups = [group for play in self._latest for group in play.groups(places)]
                with use_adapter(self.actor, adapter):
                    sums.append(self._logits(self.actor, groups).log_probs())
        self.actor.train()
        check_trained(self.actor, torch.cat(sums), place, self.config.ds.param_dtype)

    def _micro_step(self, number: int, plays: list[Play]) -> Tensor:
        """Forward, backward, and the optimiser at an accumulation boundary. Returns (plays, 1 + 2k), detached."""
        parts = [self._tokens(plays, adapter, places) for adapter, places in self.places.items()]
        tokens = {name: self._joined([part[name] for part in parts]) for name in parts[0]}
        log_probs = tokens["log_probs"]
        absent = torch.full_like(log_probs, torch.nan).detach()
        reference, previous = (tokens.get(name, absent) for name in ("reference", "previous"))
        preferences = torch.tensor([play.preferences for play in plays], dtype=log_probs.dtype, device=log_probs.device)
        batch = Plays(log_probs, reference, previous, preferences, tokens.get("divergence"), number)
        losses = self.algorithm.loss(batch)
        self.strategy.backward(losses.mean(), self.actor, self.optimizer)
        with resting(self.actor, self.algorithm.resting(number)):
            self.strategy.optimizer_step(self.optimizer, self.actor, self.scheduler)
        anchor = tokens[self.algorithm.models[0]]
        return torch.cat([losses[:, None], log_probs.sum(-1), anchor.sum(-1)], dim=1).detach()

    def _tokens(self, plays: list[Play], adapter: str, places: list[int]) -> dict[str, Tensor]:
        """The token tensors of ``Plays`` by their names, (plays, places, T), for the answers that one adapter has given."""
        groups = [group for play in plays for group in play.groups(places)]
        start = time.perf_counter()
        with torch.no_grad():
            frozen = {name: self._logits(model, groups) for name, model in self.models.items()}
        self.seconds_log_probs += time.perf_counter() - start
        with use_adapter(self.actor, adapter):
            own = self._logits(self.actor, groups)
        temperature = self.config.rollout.temperature
        found = {"log_probs": (own, token_log_probs(own, temperature))}
        found |= {name: (logits, token_log_probs(logits, temperature)) for name, logits in frozen.items()}
        if self.algorithm.full_vocabulary:
            found["divergence"] = own, token_divergence(own, frozen["reference"], temperature)
        rows = {name: logits.rows(per_token) for name, (logits, per_token) in found.items()}
        return {name: row.view(len(plays), len(places), -1) for name, row in rows.items()}

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """(plays, k, T) in the order of the roles from the parts of the adapters, whose T differ."""
        longest = max(part.shape[-1] for part in parts)
        joined = torch.cat([pad(part, (0, longest - part.shape[-1])) for part in parts], dim=1)
        places = torch.tensor([place for places in self.places.values() for place in places], device=joined.device)
        return joined[:, places.argsort()]

    def _logits(self, model: Actor, groups: list[Group]) -> Logits:
        return response_logits(model, groups, self.config.train.layout, self.pad_token_id)
