"""RLOO's two rewards: scores give RLHF's gradient, win rates that of self-play, and a baseline adds nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from openrlhf_sgpo import games
from openrlhf_sgpo.algorithms.plays import Plays
from openrlhf_sgpo.algorithms.rloo import RLOO, RLOOSettings
from openrlhf_sgpo.games.drive import expected_loss, start

TAU = 0.3
REWARDS = np.array([0.7, -0.2, 0.1])
GAME = replace(games.tabular.bradley_terry(REWARDS), leader_reference=np.array([0.5, 0.3, 0.2]))
POLICY = (0.1, 0.2, 0.7)


def gradient(answers, policy=POLICY, reward="score", game=GAME):
    policies = start(game, policy)
    algorithm = RLOO(RLOOSettings(answers, reward), TAU)
    return torch.autograd.grad(expected_loss(game, algorithm, policies), policies.policy)[0]


@pytest.mark.parametrize("answers", [2, 3])
def test_scores_give_the_gradient_of_the_regularised_reward(answers):
    logits = torch.tensor(np.log(POLICY), requires_grad=True)
    log_probs = logits.log_softmax(-1)
    reference = torch.tensor(GAME.leader_reference).log()
    objective = (log_probs.exp() * (torch.tensor(REWARDS) - TAU * (log_probs - reference))).sum()
    (climb,) = torch.autograd.grad(objective, logits)
    assert torch.allclose(gradient(answers), -climb, atol=1e-14)
    assert climb.abs().max() > 0.05


def test_scores_rest_at_rlhfs_optimum_and_win_rates_elsewhere():
    rlhf = games.tilted(GAME.leader_reference, REWARDS, TAU)
    assert gradient(2, rlhf).abs().max() < 1e-14
    assert gradient(2, rlhf, "win_rate").abs().max() > 1e-2
    assert gradient(2, games.regularised_nash(GAME, TAU).policy, "win_rate").abs().max() < 1e-13


def test_a_constant_in_the_scores_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    log_probs, reference = (-torch.rand((4, 3, 2), generator=generator, dtype=torch.float64) for _ in range(2))
    scores = torch.randn((4, 3), generator=generator, dtype=torch.float64)
    batch = Plays(log_probs, reference, reference, torch.full((4, 3, 3), 0.5), rewards=scores)
    algorithm = RLOO(RLOOSettings(3, "score"), TAU)
    shifted = replace(batch, rewards=scores + torch.tensor([[100.0], [-3.0], [7.0], [0.0]]))
    assert torch.allclose(algorithm.loss(batch), algorithm.loss(shifted), atol=1e-10)


def test_cyclic_preferences_have_no_scores():
    with pytest.raises(ValueError, match="not Bradley-Terry's"):
        gradient(2, game=games.GAMES["condorcet"]())
