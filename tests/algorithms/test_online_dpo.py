"""Online DPO and its limits: iterative DPO's loss on the ranked pair, and a path of rounds of one step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from openrlhf_sgpo import games
from openrlhf_sgpo.algorithms.base import NoSettings, PairBatch
from openrlhf_sgpo.algorithms.iter_dpo import IterDPO
from openrlhf_sgpo.algorithms.online_dpo import OnlineDPO, OnlineDPOSettings
from openrlhf_sgpo.algorithms.plays import Plays
from openrlhf_sgpo.games.drive import drive, expected_loss, start

BETA = 0.3
RANKED, SOFT = (OnlineDPO(OnlineDPOSettings(labels), BETA) for labels in ("ranked", "soft"))


def plays(first: list[float]) -> Plays:
    """Plays of two answers of three tokens. first: preferences for the first answer."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-torch.rand((len(first), 2, 3), generator=generator, dtype=torch.float64) for _ in range(2))
    preferences = torch.full((len(first), 2, 2), 0.5, dtype=torch.float64)
    preferences[:, 0, 1] = torch.tensor(first, dtype=torch.float64)
    preferences[:, 1, 0] = 1 - preferences[:, 0, 1]
    return Plays(policy.requires_grad_(), reference, torch.full_like(reference, torch.nan), preferences)


def test_ranked_is_iterative_dpo_on_the_pair_that_the_oracle_ranked():
    batch = plays([0.9, 0.4, 0.51, 0.0])
    chosen = torch.tensor([0, 1, 0, 1])
    rows = torch.arange(4)
    policy, reference = (log_probs.sum(-1) for log_probs in (batch.log_probs, batch.reference))
    pairs = PairBatch(
        *(table[rows, place] for table in (policy, reference) for place in (chosen, 1 - chosen)),
    )
    expected = IterDPO(NoSettings(), BETA).loss(pairs)
    losses = RANKED.loss(batch)
    assert torch.allclose(losses, expected, atol=1e-15)
    gradients = (torch.autograd.grad(values.sum(), batch.log_probs)[0] for values in (losses, expected))
    assert torch.allclose(*gradients, atol=1e-15)


def test_soft_is_the_mean_of_ranked_over_votes():
    first = [0.9, 0.4, 0.5, 0.0]
    won, lost = (RANKED.loss(plays([vote] * 4)) for vote in (1.0, 0.0))
    share = torch.tensor(first, dtype=torch.float64)
    assert torch.allclose(SOFT.loss(plays(first)), share * won + (1 - share) * lost, atol=1e-15)


def test_a_tie_pulls_both_answers_together():
    batch = plays([0.5])
    (gradient,) = torch.autograd.grad(RANKED.loss(batch).sum(), batch.log_probs)
    difference = float((batch.log_ratios()[0, 0] - batch.log_ratios()[0, 1]).detach())
    expected = BETA * (1 / (1 + np.exp(-BETA * difference)) - 0.5)
    assert gradient[0, :, 0].tolist() == pytest.approx([expected, -expected])


def test_it_is_iterative_dpo_with_rounds_of_one_step():
    """Each round compares samples of the policy that enters it, relative to the initial reference."""
    game = games.GAMES["condorcet"]()
    policies, path = start(game, (0.1, 0.2, 0.7)), []
    for _ in range(20):
        behaviour = policies.policy.detach().softmax(-1).numpy()
        loss = expected_loss(replace(game, behaviour=behaviour), IterDPO(NoSettings(), BETA), policies)
        (gradient,) = torch.autograd.grad(loss, policies.policy)
        policies.policy = (policies.policy - 5.0 * gradient).detach().requires_grad_()
        path.append(policies.policy.detach().softmax(-1).numpy())
    online = drive(game, SOFT, steps=20, learning_rate=5.0, policies=start(game, (0.1, 0.2, 0.7)))
    assert np.allclose(online.policies[1:], path, atol=1e-12)
    assert abs(path[-1] - path[0]).max() > 0.01


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_at_rest_exactly_at_its_solution(beta):
    game, algorithm = games.GAMES["condorcet"](), OnlineDPO(OnlineDPOSettings("soft"), beta)
    target = games.online_dpo(game, beta).policy
    for policy, still in ((target, True), (games.regularised_nash(game, beta).policy, False)):
        policies = start(game, policy)
        (gradient,) = torch.autograd.grad(expected_loss(game, algorithm, policies), policies.policy)
        assert (gradient.abs().max() < 1e-11) == still


def test_with_bradley_terry_preferences_it_is_rlhf_whatever_is_compared():
    rewards = np.array([1.0, 0.0, -1.0])
    rlhf = games.tilted(np.full(3, 1 / 3), rewards, BETA)
    assert np.allclose(games.online_dpo(games.GAMES["bradley_terry"](), BETA).policy, rlhf, atol=1e-9)
