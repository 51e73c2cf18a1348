"""EGPO in tables: what its loss regresses on, what a pair of steps is, and that it arrives where self-play circles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openrlhf_sgpo import games
from openrlhf_sgpo.algorithms.base import NoSettings
from openrlhf_sgpo.algorithms.egpo import EGPO
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.games.drive import drive, expected_loss, start

BETA = 0.1
GAME = games.GAMES["condorcet"]()
SKEWED = (0.1, 0.2, 0.7)


def gradient(policy, beta=BETA):
    policies = start(GAME, policy)
    return torch.autograd.grad(expected_loss(GAME, EGPO(NoSettings(), beta), policies), policies.policy)[0].numpy()


@pytest.mark.parametrize("policy", [SKEWED, (1 / 3, 1 / 3, 1 / 3)])
def test_expected_gradient(policy):
    """4 pi(y) [ a(y) - E_pi a ] with a(y) = s(y) - p(y > pi) / beta, the advantage that is missing."""
    pi = np.array(policy)
    missing = np.log(pi / GAME.leader_reference) - games.win_rates(GAME, pi) / BETA
    assert np.allclose(gradient(policy), 4 * pi * (missing - pi @ missing), atol=1e-12)


def test_at_rest_at_the_regularised_nash_equilibrium_and_nowhere_else():
    assert abs(gradient(games.regularised_nash(GAME, BETA).policy)).max() < 1e-11
    assert abs(gradient(games.nash(GAME).policy)).max() > 1e-2


def test_a_pair_of_steps():
    """The gradient at the half step, applied from the start."""
    rate = 0.05
    path = drive(GAME, EGPO(NoSettings(), BETA), steps=2, learning_rate=rate, policies=start(GAME, SKEWED)).policies
    half = np.exp(np.log(SKEWED) - rate * gradient(SKEWED))
    whole = np.exp(np.log(SKEWED) - rate * gradient(half / half.sum()))
    assert np.allclose(path[1:], [half / half.sum(), whole / whole.sum()], atol=1e-12)


def papers_step(policy, rate):
    """theta + eta beta [theta_ref - theta + p(y > opponent) / beta], against the policy and then against the half step."""
    opponent = policy
    for _ in range(2):
        opponent = games.mirror_step(GAME, policy, rate, BETA, opponent)
    return opponent


def test_the_papers_update_has_the_same_fixed_point():
    policy = np.array(SKEWED)
    for _ in range(100):
        policy = papers_step(policy, 2.0)
    assert np.allclose(policy, games.regularised_nash(GAME, BETA).policy, atol=1e-8)


def test_steps_come_in_pairs():
    config = Config()
    config.rounds.steps, config.ckpt.save_steps = 7, 3
    problems = EGPO(NoSettings(), BETA).problems(config)
    assert [problem.split(":")[0] for problem in problems] == ["--rounds.steps", "--ckpt.save_steps"]
    config.rounds.steps, config.ckpt.save_steps = 8, -1
    assert EGPO(NoSettings(), BETA).problems(config) == []
