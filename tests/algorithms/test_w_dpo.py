"""WDPO: the penalty by definition, its gradient, and what training needs for second derivatives."""

from dataclasses import replace

import pytest
import torch
from pair_batches import BETA, batch, draw

from openrlhf_sgpo.algorithms.base import PairBatch
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.w_dpo import WDPO, WDPOSettings
from openrlhf_sgpo.config import Config


def embedded(scale=1.0):
    """Three pairs whose log-probabilities are a nonlinear function of six rows of embeddings (6, 2, 4), which are a leaf."""
    embeddings = scale * draw(48, 3).view(6, 2, 4)
    embeddings = embeddings.requires_grad_()
    log_probs = -embeddings.square().sum((1, 2)) - embeddings.sin().sum((1, 2))
    reference = draw(6, 4)
    (chosen, rejected), (base_chosen, base_rejected) = log_probs.view(3, 2).T, reference.view(3, 2).T
    return PairBatch(chosen, rejected, base_chosen, base_rejected, embeddings=embeddings), embeddings


def test_the_penalty_is_the_squared_gradient_of_each_pair():
    """d l / d e = -sigmoid(-m) beta (+-1) d log_prob / d e, written down by hand."""
    pairs, embeddings = embedded()
    margins = pairs.margins(BETA)
    slopes = (-2 * embeddings - embeddings.cos()).square().sum((1, 2)).view(3, 2).sum(1)
    expected = dpo_loss(margins) + 0.7 * (BETA * torch.sigmoid(-margins)) ** 2 * slopes
    losses = WDPO(WDPOSettings(0.7), BETA).loss(pairs)
    assert torch.allclose(losses, expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), embeddings, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), embeddings)
    assert torch.allclose(gradient, expected_gradient, rtol=0, atol=1e-12)


def test_rho_0_is_dpo_to_the_last_bit():
    assert torch.equal(WDPO(WDPOSettings(0.0), BETA).loss(batch(draw(9))), dpo_loss(draw(9)))
    with pytest.raises(ValueError, match="input embeddings"):
        WDPO(WDPOSettings(1.0), BETA).loss(batch(draw(9)))


def test_it_is_the_first_order_worst_case_of_moved_embeddings():
    """For a small rho the best of many moves d of l(e + d) - |d|^2 / (4 rho) is the move along the gradient, and its value is
    the loss."""
    pairs, embeddings = embedded()
    rho = 1e-4
    (gradient,) = torch.autograd.grad(dpo_loss(pairs.margins(BETA)).sum(), embeddings)
    losses = WDPO(WDPOSettings(rho), BETA).loss(embedded()[0])

    def payoff(move):
        moved = (embeddings + move).detach()
        log_probs = (-moved.square().sum((1, 2)) - moved.sin().sum((1, 2))).view(3, 2)
        margins = replace(pairs, policy_chosen=log_probs[:, 0], policy_rejected=log_probs[:, 1]).margins(BETA)
        return dpo_loss(margins) - move.square().sum((1, 2)).view(3, 2).sum(1) / (4 * rho)

    best = payoff(2 * rho * gradient)
    assert torch.allclose(best, losses, rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = 2 * rho * (gradient + torch.randn(gradient.shape, generator=generator, dtype=torch.float64))
        assert bool((payoff(other) <= best + 1e-7).all())


def test_settings_that_have_no_second_derivative_are_refused():
    config = Config()
    config.ds.zero_stage = 3
    problems = WDPO(WDPOSettings(), 0.1).problems(config)
    assert [problem.partition(":")[0] for problem in problems] == [
        "--ds.attn_implementation",
        "--ds.zero_stage",
    ]
    config.ds.zero_stage = 2
    for name, value in WDPO.defaults.items():
        group, leaf = name.split(".")
        setattr(getattr(config, group), leaf, value)
    assert WDPO(WDPOSettings(), 0.1).problems(config) == []
