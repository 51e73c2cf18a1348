"""Importance weights of plays that a policy has sampled which is not the one that is trained."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from openrlhf_sgpo.algorithms.online_ipo import OnlineIPO
from openrlhf_sgpo.algorithms.plays import importance_weights
from openrlhf_sgpo.algorithms.rloo import RLOO, RLOOSettings
from openrlhf_sgpo.algorithms.slhf import SLHF, SLHFSettings
from openrlhf_sgpo.games import GAMES
from openrlhf_sgpo.games.drive import _all_plays, start

GAME = GAMES["condorcet"]()


def gradients(algorithm, policies, cap=None):
    """Of the expected loss over everything that the answering policies can sample, with weights if there is a cap."""
    batch, probabilities = _all_plays(GAME, algorithm, policies, 0, None)
    weights = 1 if cap is None else importance_weights(batch.drift, cap)
    loss = (probabilities * weights * algorithm.loss(batch)).sum()
    derivatives = torch.autograd.grad(loss, [policies.policy, policies.follower], allow_unused=True)
    return torch.cat([derivative.flatten() for derivative in derivatives if derivative is not None])


@pytest.mark.parametrize(
    "algorithm",
    [SLHF(SLHFSettings(followers=2), 0.1), RLOO(RLOOSettings(answers=3), 0.1), OnlineIPO(None, 0.1)],
    ids=lambda algorithm: algorithm.name,
)
def test_weighted_plays_have_the_gradient_of_plays_of_the_policy(algorithm):
    """E_mu[w grad loss] = E_pi[grad loss] without truncation. Under a cap below all ratios every play has the same weight,
    which leaves the gradient of mu's plays."""
    policies = start(GAME, (0.1, 0.2, 0.7))
    expected = gradients(algorithm, policies)
    generator = torch.Generator().manual_seed(0)
    policies.answering = (
        torch.randn(3, generator=generator, dtype=torch.float64),
        torch.randn(3, 3, generator=generator, dtype=torch.float64),
    )
    stale = gradients(algorithm, policies)
    assert not torch.allclose(stale, expected, rtol=0.1)
    assert torch.allclose(gradients(algorithm, policies, float("inf")), expected, rtol=1e-10, atol=1e-14)
    assert torch.allclose(gradients(algorithm, policies, 1e-9) / 1e-9, stale, rtol=1e-10, atol=1e-14)


def test_weights_are_ratios_of_whole_plays_up_to_the_cap():
    """Of two answers with up to two tokens: products over tokens and answers; what is not known counts as 1."""
    nan = torch.nan
    drift = torch.tensor(
        [[[0.5, -0.2], [0.1, nan]], [[1.0, 1.0], [0.5, 0.5]], [[nan, nan], [-1.0, -0.5]], [[nan, nan], [nan, nan]]]
    ).requires_grad_()
    weights = importance_weights(drift, cap=2.0)
    assert weights.tolist() == pytest.approx([exp(0.4), 2.0, exp(-1.5), 1.0])
    assert not weights.requires_grad
    assert importance_weights(torch.full((1, 1, 1), log(2.0)), 3.0).item() == pytest.approx(2.0)
