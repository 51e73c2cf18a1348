"""Plays in training: the forward pass that turns fresh answers and their preferences into a batch for the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Plays
from openrlhf_sgpo.data.records import Answer, Prompt
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.ledger import Stopwatch
from openrlhf_sgpo.openrlhf import DEFAULT_ADAPTER, use_adapter
from openrlhf_sgpo.training.log_probs import Predictions, figures_of, predictions, response_log_probs, token_divergence

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import Actor


@dataclass(frozen=True)
class Play:
    """Answers to one prompt, in the order of the algorithm's roles, each with the tokens of its context. preferences: the
    oracle's matrix over the answers. rewards: its scores of them, if the algorithm reads them."""

    prompt: Prompt
    answers: list[tuple[tuple[int, ...], Answer]]
    preferences: list[list[float]]
    rewards: list[float] = field(default_factory=list)

    def groups(self, places: Sequence[int] | None = None) -> list[Group]:
        """The answers, or those at some places, behind one copy of each context, in the order of the roles."""
        groups: list[Group] = []
        for context, sample in self.answers if places is None else [self.answers[place] for place in places]:
            if groups and groups[-1].prompt == context:
                groups[-1] = Group(context, (*groups[-1].responses, sample.token_ids))
            else:
                groups.append(Group(context, (sample.token_ids,)))
        return groups


class PlayForward:
    """Forward passes over micro-batches of plays. frozen: the models that the algorithm names in ``models``. clock: times
    their forward passes as the part ``log_probs``.

    Log-probabilities are taken at the temperature at which the answers were drawn, because a policy gradient is that of the
    distribution that was sampled.
    """

    def __init__(
        self,
        algorithm: PlayAlgorithm,
        pad_token_id: int,
        temperature: float,
        clock: Stopwatch,
        frozen: Mapping[str, Actor],
    ):
        self.algorithm = algorithm
        self.pad_token_id = pad_token_id
        self.temperature = temperature
        self.clock = clock
        self.frozen = frozen
        self.places: dict[str, list[int]] = {}  # of the answers, by the adapter that gives them
        for place, role in enumerate(algorithm.roles):
            self.places.setdefault(algorithm.adapters.get(role, DEFAULT_ADAPTER), []).append(place)

    def batch(self, model: Actor, samples: list[Play], step: int) -> Plays:
        """What the loss reads, with gradient."""
        parts = [self._tokens(model, samples, adapter, places) for adapter, places in self.places.items()]
        tokens = {name: self._joined([part[name] for part in parts]) for name in parts[0]}
        log_probs = tokens["log_probs"]
        absent = torch.full_like(log_probs, torch.nan).detach()
        judged = partial(torch.tensor, dtype=log_probs.dtype, device=log_probs.device)
        return Plays(
            log_probs,
            tokens.get("reference", absent),
            tokens.get("previous", absent),
            judged([play.preferences for play in samples]),
            tokens.get("divergence"),
            step,
            judged([play.rewards for play in samples]) if self.algorithm.scored else None,
        )

    def losses(self, batch: Plays) -> Tensor:
        return self.algorithm.loss(batch)

    def log_probs(self, model: Actor, samples: list[Play]) -> Tensor:
        """Of all answers under the policy, shape (plays * k,)."""
        sums = []
        for adapter, places in self.places.items():
            groups = [group for play in samples for group in play.groups(places)]
            with use_adapter(model, adapter):
                sums.append(response_log_probs(model, groups, self.pad_token_id))
        return torch.cat(sums)

    def recorded(self, batch: Plays) -> Tensor:
        """Log-probabilities of the answers under the policy before the step, and under the first of the frozen models, shape
        (plays, 2k)."""
        anchor = getattr(batch, self.algorithm.models[0])
        return torch.cat([batch.log_probs.sum(-1), anchor.sum(-1)], dim=1)

    def tokens(self, samples: list[Play]) -> list[int]:
        """Of each play, every context once."""
        return [sum(map(len, play.groups())) for play in samples]

    def summary(self, recorded: Tensor) -> tuple[dict[str, float], dict[str, float]]:
        """Figures that must be finite, causes before their effects; and metrics of a step. For each role: kl, the mean
        log-ratio to the first frozen model, and entropy, minus the mean log-probability, in nats per answer."""
        policy, anchor = recorded.tensor_split(2, dim=1)
        causes = {
            "mean log-probability of the answers": policy.mean().item(),
            f"mean log-probability of the answers under the {self.algorithm.models[0]} model": anchor.mean().item(),
        }
        metrics = {}
        for role in dict.fromkeys(self.algorithm.roles):
            places = [place for place, other in enumerate(self.algorithm.roles) if other == role]
            metrics[f"{role}/kl"] = (policy - anchor)[:, places].mean().item()
            metrics[f"{role}/entropy"] = -policy[:, places].mean().item()
        return causes, metrics

    def _tokens(self, model: Actor, samples: list[Play], adapter: str, places: list[int]) -> dict[str, Tensor]:
        """The token tensors of ``Plays`` by their names, (plays, places, T), for the answers that one adapter has given."""
        groups = [group for play in samples for group in play.groups(places)]
        with torch.no_grad(), self.clock("log_probs"):
            frozen = {name: predictions(other, groups, self.pad_token_id) for name, other in self.frozen.items()}
            rows = {name: predicted.rows(predicted.log_probs(self.temperature)) for name, predicted in frozen.items()}

        def figures(policy: Predictions) -> tuple[Tensor, ...]:
            log_probs = policy.rows(policy.log_probs(self.temperature))
            if not self.algorithm.full_vocabulary:
                return (log_probs,)
            return log_probs, policy.rows(token_divergence(policy, frozen["reference"], self.temperature))

        with use_adapter(model, adapter):
            values = figures_of(model, groups, self.pad_token_id, figures)
        rows |= dict(zip(("log_probs", "divergence"), values, strict=False))
        return {name: row.view(len(samples), len(places), -1) for name, row in rows.items()}

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """(plays, k, T) in the order of the roles from the parts of the adapters, whose T differ."""
        longest = max(part.shape[-1] for part in parts)
        joined = torch.cat([pad(part, (0, longest - part.shape[-1])) for part in parts], dim=1)
        places = torch.tensor([place for places in self.places.values() for place in places], device=joined.device)
        return joined[:, places.argsort()]
