"""The policy-gradient loss on answers of two tokens, all of them enumerated, and SPPO's choice of answers."""

from __future__ import annotations

import pytest
import torch

from openrlhf_sgpo.algorithms.plays import Plays, policy_gradient_loss
from openrlhf_sgpo.algorithms.slhf import SLHF, SLHFSettings
from openrlhf_sgpo.algorithms.sppo import SPPO, SPPOSettings, sppo_loss

BETA = 0.3
GAIN = torch.tensor([[0.9, 0.1, 0.4], [0.2, 0.7, 0.3], [0.5, 0.6, 0.8]], dtype=torch.float64)


def model(seed: int):
    """Log-probabilities of the first token (3,) and of the second given the first (3, 3)."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3))]
    return [values.requires_grad_() for values in logits]


def tokens(logits):
    """Token log-probabilities (9, 2) of all answers."""
    first, second = (values.log_softmax(-1) for values in logits)
    return torch.stack([first[:, None].expand(3, 3), second], dim=-1).view(9, 2)


def divergence(policy, reference):
    """KL of the next-token distributions at both tokens of all answers, (9, 2)."""
    first, second = (
        (values.log_softmax(-1).exp() * (values.log_softmax(-1) - other.log_softmax(-1).detach())).sum(-1)
        for values, other in zip(policy, reference, strict=True)
    )
    return torch.stack([first.expand(3, 3), second[:, None].expand(3, 3)], dim=-1).view(9, 2)


def gradients(level):
    policy, reference = model(0), tokens(model(1)).detach()
    log_probs = tokens(policy)
    weights = log_probs.sum(-1).exp().detach()
    exact = divergence(policy, model(1)) if level == "full_vocabulary" else None
    loss = (weights * policy_gradient_loss(log_probs, reference, GAIN.view(-1), BETA, level, exact)).sum()
    return torch.cat([values.reshape(-1) for values in torch.autograd.grad(loss, policy)])


def exact():
    policy, reference = model(0), tokens(model(1)).detach()
    log_probs = tokens(policy).sum(-1)
    objective = (log_probs.exp() * (GAIN.view(-1) - BETA * (log_probs - reference.sum(-1)))).sum()
    return torch.cat([values.reshape(-1) for values in torch.autograd.grad(-objective, policy)])


@pytest.mark.parametrize("level", ["sequence", "reward_to_go", "full_vocabulary"])
def test_exact_gradient_of_the_regularised_gain(level):
    assert torch.allclose(gradients(level), exact(), atol=1e-14)


def test_token_local_ignores_what_the_first_token_does_later():
    local = gradients("token_local")
    assert (local[:3] - exact()[:3]).abs().max() > 1e-3
    assert torch.allclose(local[3:], exact()[3:], atol=1e-14)  # nothing comes after the last token


def test_the_released_estimate_pushes_away_from_the_divergence():
    """Detached k3 times the score is the gradient of KL(pi || ref) - KL(ref || pi) (one token, no gain)."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.6, -0.4], dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    settings = SLHFSettings(parity=True, kl_level="token_local", follower_kl_credit=False, kappa=0.0)
    assert SLHF.option_problems(settings) == []
    half = torch.full((3, 2, 2), 0.5, dtype=torch.float64)
    answers = torch.stack([policy, policy.detach()], dim=1)[..., None]
    references = torch.stack([reference, policy.detach()], dim=1)[..., None]
    losses = SLHF(settings, BETA).loss(Plays(answers, references, references, half))
    (gradient,) = torch.autograd.grad((policy.detach().exp() * losses).sum(), logits, retain_graph=True)
    both = (policy.exp() * (policy - reference)).sum() - (reference.exp() * (reference - policy)).sum()
    (expected,) = torch.autograd.grad(BETA * both, logits)
    assert torch.allclose(gradient, expected, atol=1e-14) and expected.abs().max() > 1e-3
    assert "parity needs" in SLHF.option_problems(SLHFSettings(parity=True))[0]


def test_no_gradient_flows_through_the_gain():
    log_probs = tokens(model(0))
    gain = GAIN.view(-1).clone().requires_grad_()
    loss = policy_gradient_loss(log_probs, log_probs.detach(), gain, BETA, "sequence").sum()
    assert torch.autograd.grad(loss, gain, allow_unused=True) == (None,)


def test_sppo_trains_on_the_extremes():
    preferences = torch.tensor([[0.5, 0.9, 0.6], [0.1, 0.5, 0.3], [0.4, 0.7, 0.5]], dtype=torch.float64)[None]
    log_probs = torch.tensor([[[-1.0], [-2.0], [-3.0]]], dtype=torch.float64)
    previous = torch.tensor([[[-1.5], [-1.5], [-9.0]]], dtype=torch.float64)
    batch = Plays(log_probs, previous, previous, preferences)
    best = sppo_loss(torch.tensor(0.5), torch.tensor(2.0 / 3), 2.0)
    worst = sppo_loss(torch.tensor(-0.5), torch.tensor(0.9 / 3), 2.0)
    (loss,) = SPPO(SPPOSettings(answers=3, step=2.0), 0.1).loss(batch)
    assert loss.item() == pytest.approx(((best + worst) / 2).item(), rel=1e-6)
