"""Plays in training: the forward pass that turns fresh answers and their preferences into a batch for the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Plays, importance_weights
from openrlhf_sgpo.config import RolloutSettings
from openrlhf_sgpo.data.records import Answer, Prompt
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.ledger import Stopwatch
from openrlhf_sgpo.openrlhf import DEFAULT_ADAPTER, use_adapter
from openrlhf_sgpo.training.log_probs import Predictions, figures_of, predictions, response_log_probs, token_divergence

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import Actor


LARGEST = 80.0  # log-ratio whose exponential a float32 holds


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
    """Forward passes over micro-batches of plays. rollout: how answers were sampled. frozen: the models that the algorithm
    names in ``models``. clock: times their forward passes as the part ``log_probs``.

    Log-probabilities are taken at the temperature at which the answers were drawn, because a policy gradient is that of the
    distribution that was sampled.
    """

    def __init__(
        self,
        algorithm: PlayAlgorithm,
        pad_token_id: int,
        rollout: RolloutSettings,
        clock: Stopwatch,
        frozen: Mapping[str, Actor],
    ):
        self.algorithm = algorithm
        self.pad_token_id = pad_token_id
        self.temperature = rollout.temperature
        self.cap = rollout.importance_cap
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
            self._drift(samples, tokens),
        )

    def losses(self, batch: Plays) -> Tensor:
        losses = self.algorithm.loss(batch)
        assert batch.drift is not None
        return losses * importance_weights(batch.drift, self.cap) if self.cap else losses

    def log_probs(self, model: Actor, samples: list[Play]) -> Tensor:
        """Of all answers under the policy, shape (plays * k,)."""
        sums = []
        for adapter, places in self.places.items():
            groups = [group for play in samples for group in play.groups(places)]
            with use_adapter(model, adapter):
                sums.append(response_log_probs(model, groups, self.pad_token_id))
        return torch.cat(sums)

    def recorded(self, batch: Plays) -> Tensor:
        """Log-probabilities of the answers under the policy before the step, and under the first of the frozen models; the sum
        of their drift, and mean and maximum of its exponential over tokens. Shape (plays, 5k)."""
        anchor, drift = getattr(batch, self.algorithm.models[0]), batch.drift
        assert drift is not None
        ratios = drift.clamp(max=LARGEST).exp()
        means = ratios.nanmean(-1)
        most = ratios.nan_to_num(0.0).amax(-1)
        return torch.cat([batch.log_probs.sum(-1), anchor.sum(-1), drift.nansum(-1), means, most], dim=1)

    def tokens(self, samples: list[Play]) -> list[int]:
        """Of each play, every context once."""
        return [sum(map(len, play.groups())) for play in samples]

    def summary(self, recorded: Tensor) -> tuple[dict[str, float], dict[str, float]]:
        """Figures that must be finite, causes before their effects; and metrics of a step. For each role: kl, the mean
        log-ratio to the first frozen model, and entropy, minus the mean log-probability, in nats per answer. ratio: mean and
        maximum of pi / mu over answers and over tokens, see ``Plays.drift``, if any is known; and with ``cap`` the share of
        plays whose weight was cut."""
        policy, anchor, drift, means, most = recorded.tensor_split(5, dim=1)
        causes = {
            "mean log-probability of the answers": policy.mean().item(),
            f"mean log-probability of the answers under the {self.algorithm.models[0]} model": anchor.mean().item(),
        }
        metrics = {}
        for role in dict.fromkeys(self.algorithm.roles):
            places = [place for place, other in enumerate(self.algorithm.roles) if other == role]
            metrics[f"{role}/kl"] = (policy - anchor)[:, places].mean().item()
            metrics[f"{role}/entropy"] = -policy[:, places].mean().item()
        if (known := means.isfinite()).any():
            ratios = drift[known].clamp(max=LARGEST).exp()
            # An engine's log-probabilities depend in their last digits on which requests it happens to compute together.
            metrics["ratio/mean"] = _rounded(ratios.mean())
            metrics["ratio/max"] = _rounded(ratios.max())
            metrics["ratio/token_mean"] = _rounded(means[known].mean())
            metrics["ratio/token_max"] = _rounded(most[known].max())
            if self.cap:
                metrics["ratio/capped"] = (drift.sum(1) > log(self.cap)).float().mean().item()
        return causes, metrics

    def _drift(self, samples: list[Play], tokens: Mapping[str, Tensor]) -> Tensor:
        """See ``Plays.drift``. tokens: the other token tensors by their names."""
        policy = tokens["log_probs"].detach()
        by_role = {"policy": policy, "follower": policy} | {name: tokens[name] for name in self.frozen}
        unknown = torch.full_like(policy, torch.nan)
        intended = [by_role.get(role, unknown)[:, place] for place, role in enumerate(self.algorithm.roles)]
        longest = policy.shape[-1]
        sampled = [
            [[*sample.log_probs, *[torch.nan] * (longest - len(sample.log_probs))] for _, sample in play.answers]
            for play in samples
        ]
        return torch.stack(intended, dim=1) - policy.new_tensor(sampled)

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


def _rounded(figure: Tensor) -> float:
    """To four digits."""
    return float(f"{figure.item():.4g}")
