"""SGPO on a game of four answers, with 400 pairs of which a quarter is mislabelled: what its theory says, and what not."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from openrlhf_sgpo.algorithms.base import PairBatch, Stage
from openrlhf_sgpo.algorithms.sgpo import SGPO, SGPOSettings
from openrlhf_sgpo.dro import solve_worst_case

BETA = 1.0
REWARDS = torch.tensor([1.0, 0.3, -0.3, -1.0], dtype=torch.float64)
PAIRS = 400


@cache
def labelled():
    """(chosen, rejected), each (PAIRS,), drawn from a Bradley-Terry model, then flipped."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(4, (PAIRS,), generator=generator)
    second = (first + torch.randint(1, 4, (PAIRS,), generator=generator)) % 4
    wins = torch.rand(PAIRS, generator=generator).double() < torch.sigmoid(REWARDS[first] - REWARDS[second])
    wins ^= torch.rand(PAIRS, generator=generator) < 0.25
    return torch.where(wins, first, second), torch.where(wins, second, first)


def batch(logits):
    chosen, rejected = labelled()
    log_probs, zeros = logits.log_softmax(-1), torch.zeros(PAIRS, dtype=torch.float64)
    return PairBatch(log_probs[chosen], log_probs[rejected], zeros, zeros, torch.arange(PAIRS))


def train(steps=800, stages=1, **options):
    """Logits of mean 0 after each stage, (stages, 4): gradient descent on all pairs, the follower on fresh margins."""
    algorithm = SGPO(SGPOSettings(**options, refresh_window=PAIRS), BETA)
    logits, ends = torch.zeros(4, dtype=torch.float64, requires_grad=True), []
    for number in range(stages):
        algorithm.begin_stage(Stage(batch(logits).margins(BETA).detach(), number + 1, steps))
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(algorithm.loss(batch(logits)).mean(), logits)
            with torch.no_grad():
                logits -= gradient
            algorithm.after_step(batch(logits).margins(BETA).detach())
        ends.append((logits - logits.mean()).detach().clone())
    return torch.stack(ends)


@pytest.fixture(scope="module")
def dpo():
    return train(radius=0.0)[-1]


def value(logits, radius):
    return solve_worst_case(batch(logits).margins(BETA), radius, window=(-1.0, 1.0)).value


@pytest.mark.slow
def test_its_policy_has_the_least_worst_case_nearby(dpo):
    """Directly: no step from it lowers V, small or large; and V of DPO's policy is higher."""
    policy = train(radius=0.05)[-1]
    reached = value(policy, 0.05)
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-4, 1e-3, 1e-2, 1e-1):
        for _ in range(50):
            step = scale * torch.randn(4, generator=generator, dtype=torch.float64)
            assert value(policy + step, 0.05) >= reached - 1e-12
    assert value(dpo, 0.05) > reached + 1e-6


@pytest.mark.slow
def test_what_robustness_costs_and_buys(dpo):
    """On the pairs that both were trained on: more of DPO's loss, and less of it against the follower of training."""
    measured = {}
    for radius in (0.05, 0.2):
        policy = train(radius=radius)[-1]
        measured[radius] = [value(dpo, place) - value(policy, place) for place in (0.0, radius)]
    assert measured[0.05] == pytest.approx([-1.4e-4, 1.3e-4], rel=0.05)
    assert measured[0.2] == pytest.approx([-9.2e-4, 7.6e-4], rel=0.05)


@pytest.mark.slow
def test_dpo_is_its_limit_as_the_window_grows_so_that_dpo_has_no_regret_there(dpo):
    """Lemma 3.1: without a bound on the support V is DPO's loss plus the radius, whatever the policy."""
    distances = [float((train(radius=0.05, window_pad=pad)[-1] - dpo).abs().max()) for pad in (8.0, 1e2, 1e4)]
    assert distances[0] > 5e-3
    assert 5e-4 < distances[1] < 5e-3
    assert distances[2] < 5e-5
    for policy in (dpo, dpo + 0.3 * REWARDS):
        margins = batch(policy).margins(BETA)
        plain = float(torch.nn.functional.softplus(-margins).mean())
        assert solve_worst_case(margins, 0.05, window_pad=1e7).value == pytest.approx(plain + 0.05, abs=1e-6)


@pytest.mark.slow
def test_rounds_with_the_proximal_term_contract():
    """A follower that is frozen for a round, and a leader that answers it fully: each round covers a share of the distance."""
    ends = train(steps=150, stages=16, radius=0.2, refresh_steps=0, prox=0.5)
    limit = train(steps=400, stages=40, radius=0.2, refresh_steps=0, prox=0.5)[-1]
    distances = (ends - limit).norm(dim=1)
    rates = distances[1:12] / distances[:11]
    assert ((rates > 0.75) & (rates < 0.9)).all()
    without = train(steps=150, stages=16, radius=0.2, refresh_steps=0)
    assert (without[9:] - without[8:-1]).norm(dim=1).max() > 5e-3  # they wander on
