"""Runs algorithms on tabular games: their real loss code, softmax policies, exact expectations instead of samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
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

    reference: log-probabilities of the game's reference, or of what has become it. previous: those of the policy at the start
    of the round. answering: logits of policy and follower that give the answers; None if it is those that are trained.
    """

    policy: Tensor
    follower: Tensor
    reference: Tensor
    previous: Tensor = field(init=False)
    answering: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.new_round()

    def new_round(self) -> None:
        self.previous = self.policy.detach().log_softmax(-1)

    def logits(self) -> tuple[Tensor, Tensor]:
        """Those of policy and follower, as they are now."""
        return self.policy.detach().clone(), self.follower.detach().clone()


@dataclass(frozen=True)
class Path:
    """Probabilities at the start and after every step, steps of all rounds in a row: policies (steps + 1, n) and followers
    (steps + 1, n, n). ends: steps taken up to the end of each round, 0 first, (rounds + 1,)."""

    policies: Array
    followers: Array
    ends: list[int]

    @property
    def rounds(self) -> Array:
        """Policies at the start and at the end of each round, (rounds + 1, n)."""
        return self.policies[self.ends]


def start(game: Game, policy: Any = None, follower: Any = None) -> Policies:
    """Policies with the given probabilities, by default the game's references."""
    import torch

    policy = game.leader_reference if policy is None else policy
    follower = game.follower_reference if follower is None else follower
    tables = np.log(policy, dtype=np.float64), np.log(follower, dtype=np.float64)
    leader, responder = (torch.tensor(table, dtype=torch.float64, requires_grad=True) for table in tables)
    return Policies(leader, responder, torch.tensor(game.leader_reference).log())


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


@lru_cache
def _tensors(game: Game) -> tuple[Tensor, Tensor, Tensor]:
    """(preferences, behaviour, log follower_reference)"""
    import torch

    preferences, behaviour, follower = (
        torch.tensor(array) for array in (game.preferences, game.behaviour, game.follower_reference)
    )
    return preferences, behaviour, follower.log()


@lru_cache
def _combinations(size: int, count: int) -> Tensor:
    """All ways to choose ``count`` answers, in order and with repetition, (size^count, count)."""
    import torch

    return torch.tensor(list(product(range(size), repeat=count)))


def _all_pairs(game: Game, policies: Policies) -> tuple[PairBatch, Tensor]:
    """(all pairs of two samples from ``game.behaviour``, labelled both ways, their probabilities)"""
    from openrlhf_sgpo.algorithms.base import PairBatch

    preferences, behaviour, _ = _tensors(game)
    policy, reference = policies.policy.log_softmax(-1), policies.reference
    chosen, rejected = _combinations(game.size, 2).T
    weights = 2 * behaviour[chosen] * behaviour[rejected] * preferences[chosen, rejected]
    return PairBatch(policy[chosen], policy[rejected], reference[chosen], reference[rejected]), weights


def _all_plays(
    game: Game, algorithm: PlayAlgorithm, policies: Policies, samples: int, generator: Any
) -> tuple[Plays, Tensor]:
    """(all combinations of answers by role, or ``samples`` random ones, their weights)"""
    import torch

    from openrlhf_sgpo.algorithms.plays import Plays

    preferences, _, follower_reference = _tensors(game)
    reference = policies.reference
    policy, follower = policies.policy.log_softmax(-1), policies.follower.log_softmax(-1)
    drafting, improving = (logits.log_softmax(-1) for logits in policies.answering or policies.logits())
    mixed = ((1 - algorithm.mixture) * drafting + algorithm.mixture * reference).log_softmax(-1)
    by_role = {"policy": drafting, "reference": reference, "previous": policies.previous, "mixture": mixed}
    answers = _combinations(game.size, len(algorithm.roles))
    log_weights = torch.zeros(len(answers), dtype=torch.float64)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    divergence = torch.zeros(len(answers), dtype=torch.float64)  # computed only where the loss reads it
    for column, role in enumerate(algorithm.roles):
        answer = answers[:, column]
        if role == "follower":
            draft = answers[:, 0]
            log_probs, base = follower[draft, answer], follower_reference[draft, answer]
            sampled = improving[draft, answer]
            if algorithm.full_vocabulary:  # every draft has its own row of the follower, and so its own divergence
                divergence = (follower.exp() * (follower - follower_reference)).sum(-1)[draft]
            columns.append((log_probs, base, base, divergence, log_probs.detach() - sampled))
        else:
            sampled = by_role[role][answer]
            if algorithm.full_vocabulary:
                divergence = (policy.exp() * (policy - reference)).sum(-1).expand(len(answer))
            drift = policy.detach()[answer] - sampled if role == "policy" else torch.zeros_like(sampled)
            columns.append((policy[answer], reference[answer], policies.previous[answer], divergence, drift))
        log_weights = log_weights + sampled
    matrices = preferences[answers[:, :, None], answers[:, None, :]]
    scores = _scores(game)[answers] if algorithm.scored else None
    weights = log_weights.exp()
    # One token per answer.
    tokens = [torch.stack(by_answer, dim=1).unsqueeze(-1) for by_answer in zip(*columns, strict=True)]
    if samples:
        drawn = torch.multinomial(weights, samples, replacement=True, generator=generator)
        weights = torch.full((samples,), 1 / samples, dtype=torch.float64)
        tokens, matrices = [token[drawn] for token in tokens], _votes(matrices[drawn], generator)
        scores = None if scores is None else scores[drawn]
    log_probs, base, previous, exact, drifts = tokens
    divergences = exact if algorithm.full_vocabulary else None
    return Plays(log_probs, base, previous, matrices, divergences, rewards=scores, drift=drifts), weights


@lru_cache
def _scores(game: Game) -> Tensor:
    """Rewards whose differences are the log-odds of the preferences, (n,). Raises ValueError if there are none."""
    import torch

    log_odds = torch.tensor(game.preferences).logit()
    rewards = log_odds[:, 0]
    if not torch.allclose(log_odds, rewards[:, None] - rewards[None, :], rtol=0, atol=1e-9):
        raise ValueError("the preferences of this game are not Bradley-Terry's: its answers have no scores")
    return rewards


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
    settled: float = 0.0,
    behind: bool = False,
) -> Path:
    """Gradient descent on the expected loss, ``rounds`` rounds of up to ``steps`` steps each; the path has a point per step.

    settled: a round ends early once a step moves no logit by more than this. behind: answers are those of the policies one step
    ago, as with ``--rollout.steps_behind 1``. Raises ValueError if a policy stops being
    finite, because the learning rate is too large.
    """
    import torch

    from openrlhf_sgpo.algorithms.base import Algorithm, Stage

    policies = start(game) if policies is None else policies
    # The hooks take no weights: each sample is repeated by its share of ``OCCURRENCES``, with its value after the step.
    watches = type(algorithm).after_step is not Algorithm.after_step

    def watched() -> Tensor:
        batch, weights = _batch(game, algorithm, policies, samples, generator)
        return algorithm.watched(batch).detach().repeat_interleave((OCCURRENCES * weights).round().long())

    reset = algorithm.reference_rounds
    parameters = [policies.policy, policies.follower]
    generator = torch.Generator().manual_seed(seed)
    leaders, followers = ([parameter.detach().clone()] for parameter in parameters)
    ends = [0]
    for number in range(rounds):
        policies.new_round()
        if reset and number and number % reset == 0:
            policies.reference = policies.previous
        margins = None if algorithm.fresh_answers else watched()
        algorithm.begin_stage(Stage(margins, number + 1, steps, seed))
        latest = policies.logits()
        for step in range(steps):
            if behind:
                policies.answering, latest = latest, policies.logits()
            loss = expected_loss(game, algorithm, policies, samples, generator)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            half = algorithm.extragradient and step % 2 == 0
            if half or not algorithm.extragradient:
                starts = [parameter.detach().clone() for parameter in parameters]
            largest = 0.0
            with torch.no_grad():
                for parameter, start_point, gradient in zip(parameters, starts, gradients, strict=True):
                    if gradient is not None:
                        parameter.copy_(start_point - learning_rate * gradient)
                        largest = max(largest, learning_rate * float(gradient.abs().max()))
            if watches:
                algorithm.after_step(watched())
            leaders.append(policies.policy.detach().clone())
            followers.append(policies.follower.detach().clone())
            if largest < settled and not half:
                break
        if not (leaders[-1].isfinite().all() and followers[-1].isfinite().all()):
            raise ValueError(f"{algorithm.name} diverged: lower the learning rate, {learning_rate}")
        ends.append(len(leaders) - 1)
    policies_path, followers_path = (torch.stack(logits).softmax(-1).numpy() for logits in (leaders, followers))
    return Path(policies_path, followers_path, ends)
