"""Runs algorithms on tabular games: their real loss code, softmax policies, exact expectations instead of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from openrlhf_sgpo.games.tabular import Array, Game

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.algorithms.base import Algorithm, PairBatch
    from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Plays


# Size of the weighted batch as repeated samples, for hooks without weights; preferences are multiples of 1/200.
OCCURRENCES = 3600


@dataclass
class Policies:
    """Softmax policies as float64 logits: policy (n,), the only policy or the leader, and follower (n, n), row y for draft y.

    previous: the policy's log-probabilities at the start of the round.
    """

    policy: Tensor
    follower: Tensor
    previous: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.new_round()

    def new_round(self) -> None:
        self.previous = self.policy.detach().log_softmax(-1)


@dataclass(frozen=True)
class Path:
    """Probabilities at every step: policies (steps + 1, n) and followers (steps + 1, n, n)."""

    policies: Array
    followers: Array


def start(game: Game, policy: Any = None, follower: Any = None) -> Policies:
    """Policies with the given probabilities, by default the game's references."""
    import torch

    policy = game.leader_reference if policy is None else policy
    follower = game.follower_reference if follower is None else follower
    tables = np.log(policy, dtype=np.float64), np.log(follower, dtype=np.float64)
    return Policies(*(torch.tensor(table, dtype=torch.float64, requires_grad=True) for table in tables))


def expected_loss(
    game: Game, algorithm: Algorithm[Any], policies: Policies, samples: int = 0, generator: Any = None
) -> Tensor:
    """The expectation of the algorithm's loss over everything that can be sampled, differentiable.

    Every combination of answers is one item of a large batch, weighted by its probability, through which no gradient flows:
    it stands for sampling. Algorithms that train on pairs get all pairs of two samples from ``game.behaviour``, labelled both
    ways in proportion to the preference. For algorithms that learn from fresh answers, samples > 0 draws that many plays
    instead, with preferences of 0 or 1, as from an oracle that casts single votes.
    """
    batch, weights = _batch(game, algorithm, policies, samples, generator)
    return (weights * algorithm.loss(batch)).sum()


def _batch(
    game: Game, algorithm: Algorithm[Any], policies: Policies, samples: int, generator: Any
) -> tuple[PairBatch | Plays, Tensor]:
    """(batch of everything that can be sampled, its weights)"""
    from openrlhf_sgpo.algorithms.plays import PlayAlgorithm

    if isinstance(algorithm, PlayAlgorithm):
        return _all_plays(game, algorithm, policies, samples, generator)
    if samples:
        raise ValueError(f"{algorithm.name} trains on pairs and always uses all of them: leave samples at 0")
    return _all_pairs(game, policies)


def _all_pairs(game: Game, policies: Policies) -> tuple[PairBatch, Tensor]:
    """(all pairs of two samples from ``game.behaviour``, labelled both ways, their probabilities)"""
    import torch

    from openrlhf_sgpo.algorithms.base import PairBatch

    policy, reference = policies.policy.log_softmax(-1), torch.tensor(game.leader_reference).log()
    chosen, rejected = torch.tensor(list(product(range(game.size), repeat=2))).T
    behaviour = torch.tensor(game.behaviour)
    weights = 2 * behaviour[chosen] * behaviour[rejected] * torch.tensor(game.preferences)[chosen, rejected]
    return PairBatch(policy[chosen], policy[rejected], reference[chosen], reference[rejected]), weights


def _all_plays(
    game: Game, algorithm: PlayAlgorithm, policies: Policies, samples: int, generator: Any
) -> tuple[Plays, Tensor]:
    """(all combinations of answers by role, or ``samples`` random ones, their weights)"""
    import torch

    from openrlhf_sgpo.algorithms.plays import Plays

    policy, follower = policies.policy.log_softmax(-1), policies.follower.log_softmax(-1)
    reference = torch.tensor(game.leader_reference).log()
    follower_reference = torch.tensor(game.follower_reference).log()
    mixture = ((1 - algorithm.mixture) * policy + algorithm.mixture * reference).log_softmax(-1)
    by_role = {"policy": policy, "mixture": mixture, "previous": policies.previous}
    answers = torch.tensor(list(product(range(game.size), repeat=len(algorithm.roles))))
    log_weights = torch.zeros(len(answers), dtype=torch.float64)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for column, role in enumerate(algorithm.roles):
        answer = answers[:, column]
        if role == "follower":
            draft = answers[:, 0]
            log_probs, base = follower[draft, answer], follower_reference[draft, answer]
            log_weights = log_weights + log_probs.detach()
            # Every draft has its own row of the follower, and so its own divergence.
            divergence = (follower.exp() * (follower - follower_reference)).sum(-1)[draft]
            columns.append((log_probs, base, base, divergence))
        else:
            log_weights = log_weights + by_role[role].detach()[answer]
            divergence = (policy.exp() * (policy - reference)).sum(-1).expand(len(answer))
            columns.append((policy[answer], reference[answer], policies.previous[answer], divergence))
    preferences = torch.tensor(game.preferences)[answers[:, :, None], answers[:, None, :]]
    weights = log_weights.exp()
    chosen = torch.arange(len(answers))
    if samples:
        chosen = torch.multinomial(weights, samples, replacement=True, generator=generator)
        weights = torch.full((samples,), 1 / samples, dtype=torch.float64)
        preferences = _votes(preferences[chosen], generator)
    # One token per answer.
    log_probs, base, previous, exact = (
        torch.stack(by_answer, dim=1)[chosen].unsqueeze(-1) for by_answer in zip(*columns, strict=True)
    )
    plays = Plays(log_probs, base, previous, preferences, exact if algorithm.full_vocabulary else None)
    return plays, weights


def _votes(preferences: Tensor, generator: Any) -> Tensor:
    """One vote per pair of answers, consistent in both orders; the diagonal stays one half."""
    import torch

    upper = torch.bernoulli(preferences, generator=generator).triu(1)
    lower = (1 - upper.transpose(-1, -2)).tril(-1)
    return upper + lower + 0.5 * torch.eye(preferences.shape[-1], dtype=preferences.dtype)


def drive(
    game: Game,
    algorithm: Algorithm[Any],
    *,
    steps: int,
    learning_rate: float,
    rounds: int = 1,
    policies: Policies | None = None,
    samples: int = 0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Gradient descent on the expected loss, ``rounds`` rounds of ``steps`` steps each; the path has a point per step.

    Raises ValueError if a policy stops being finite, because the learning rate is too large.
    """
    import torch

    from openrlhf_sgpo.algorithms.base import Algorithm, Stage

    policies = start(game) if policies is None else policies
    # The hooks take no weights: each sample is repeated by its share of ``OCCURRENCES``, with its value after the step.
    watches = type(algorithm).after_step is not Algorithm.after_step

    def watched() -> Tensor:
        batch, weights = _batch(game, algorithm, policies, samples, generator)
        return algorithm.watched(batch).detach().repeat_interleave((OCCURRENCES * weights).round().long())

    parameters = [policies.policy, policies.follower]
    generator = torch.Generator().manual_seed(seed)
    leaders, followers = [_probabilities(policies.policy)], [_probabilities(policies.follower)]
    for number in range(rounds):
        policies.new_round()
        margins = None if algorithm.fresh_answers else watched()
        algorithm.begin_stage(Stage(margins, number + 1, steps, seed))
        for _ in range(steps):
            loss = expected_loss(game, algorithm, policies, samples, generator)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter -= learning_rate * gradient
            if watches:
                algorithm.after_step(watched())
            leaders.append(_probabilities(policies.policy))
            followers.append(_probabilities(policies.follower))
        if not np.isfinite(leaders[-1]).all() or not np.isfinite(followers[-1]).all():
            raise ValueError(f"{algorithm.name} diverged: lower the learning rate, {learning_rate}")
        if progress:
            progress(number)
    return Path(np.array(leaders), np.array(followers))


def _probabilities(logits: Tensor) -> Array:
    return np.asarray(logits.detach().softmax(-1).numpy())
