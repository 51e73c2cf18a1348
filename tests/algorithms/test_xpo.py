"""XPO: its limit, the sign of its bonus, and its fixed point."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openrlhf_sgpo import games
from openrlhf_sgpo.algorithms.online_dpo import OnlineDPO, OnlineDPOSettings
from openrlhf_sgpo.algorithms.plays import Plays
from openrlhf_sgpo.algorithms.xpo import XPO, XPOSettings
from openrlhf_sgpo.games.drive import expected_loss, start

BETA = 0.3
GAME = games.Game(games.GAMES["condorcet"]().preferences, leader_reference=np.array([0.5, 0.3, 0.2]))
POLICY = (0.1, 0.2, 0.7)


def gradient(alpha, policy=POLICY):
    """Of the expected loss with soft labels, by the logits."""
    policies = start(GAME, policy)
    return torch.autograd.grad(expected_loss(GAME, XPO(XPOSettings("soft", alpha), BETA), policies), policies.policy)[0]


@pytest.mark.parametrize("labels", ["ranked", "soft"])
def test_without_bonus_its_loss_is_online_dpos(labels):
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-torch.rand((5, 2, 3), generator=generator) for _ in range(2))
    wins = torch.rand(5, generator=generator)
    preferences = torch.stack([torch.stack([0.5 + 0 * wins, wins], -1), torch.stack([1 - wins, 0.5 + 0 * wins], -1)], 1)
    batch = Plays(policy, reference, reference, preferences)
    plain = OnlineDPO(OnlineDPOSettings(labels), BETA).loss(batch)
    assert torch.equal(XPO(XPOSettings(labels, 0.0), BETA).loss(batch), plain)
    with_bonus = XPO(XPOSettings(labels, 0.5), BETA).loss(batch)
    assert torch.allclose(with_bonus - plain, 0.5 * policy[:, 1].sum(-1))


def test_the_bonus_climbs_the_divergence_of_the_reference_from_the_policy():
    logits = torch.tensor(np.log(POLICY), requires_grad=True)
    reference = torch.tensor(GAME.leader_reference)
    divergence = (reference * (reference.log() - logits.log_softmax(-1))).sum()
    (climb,) = torch.autograd.grad(divergence, logits)
    assert torch.allclose(gradient(0.2) - gradient(0.0), -0.2 * climb, atol=1e-14)
    assert climb.abs().max() > 0.1


def test_optimism_is_that_divergence():
    """For any reward: what its best policy gains over the mean reward of the reference, beta KL(ref || that policy)."""
    rewards = np.array([1.3, -0.4, 0.2])
    best = games.tilted(GAME.leader_reference, rewards, BETA)
    value = best @ rewards - BETA * games.kl(best, GAME.leader_reference)
    assert value - GAME.leader_reference @ rewards == pytest.approx(BETA * games.kl(GAME.leader_reference, best))


@pytest.mark.parametrize("alpha", [0.0, 0.001, 0.01])
def test_at_rest_exactly_at_its_solution(alpha):
    target = games.xpo(GAME, BETA, alpha).policy
    assert gradient(alpha, target).abs().max() < 1e-11
    assert gradient(alpha, games.online_dpo(GAME, BETA).policy).abs().max() > 1e-4


def test_more_optimism_leads_further_from_the_reference():
    distances = [
        games.kl(GAME.leader_reference, games.xpo(GAME, BETA, alpha).policy) for alpha in (0, 0.005, 0.01, 0.02)
    ]
    assert np.all(np.diff(distances) > 1e-3)
