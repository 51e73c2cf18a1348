from __future__ import annotations

import pytest
import torch

from openrlhf_sgpo.algorithms.sgpo import SGPOSettings


def log_probs(seed, size=8):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, generator=generator) * 5 - 20).requires_grad_(index < 2) for index in range(4)]


def test_radius_0_is_openrlhfs_dpo_loss():
    from openrlhf_sgpo import SGPOLoss
    from openrlhf_sgpo.openrlhf import DPOLoss

    loss = SGPOLoss(0.1, SGPOSettings(radius=0.0, refresh_steps=1))
    for seed in range(3):
        arguments = log_probs(seed)
        figures, openrlhf_figures = loss(*arguments), DPOLoss(0.1)(*arguments)
        for figure, expected in zip(figures, openrlhf_figures, strict=True):
            torch.testing.assert_close(figure, expected, rtol=0, atol=1e-7)


def test_the_follower_sees_the_window_and_evaluation_leaves_it_alone():
    from openrlhf_sgpo import SGPOLoss, solve_worst_case
    from openrlhf_sgpo.openrlhf import DPOLoss

    settings = SGPOSettings(radius=0.2, refresh_steps=2, refresh_window=12)
    loss = SGPOLoss(0.1, settings)
    first, second = log_probs(1), log_probs(2)
    assert loss(*first)[0].item() == pytest.approx(DPOLoss(0.1)(*first)[0].item(), abs=1e-7)
    with torch.no_grad():
        for _ in range(5):
            loss(*first)
    loss(*second)

    def margins(a):
        return (0.1 * ((a[0] - a[1]) - (a[2] - a[3]))).detach()

    worst = solve_worst_case(torch.cat([margins(first), margins(second)])[-12:], 0.2)
    with torch.no_grad():
        loss_after = loss(*first)[0]
    torch.testing.assert_close(loss_after, worst.robust_loss(margins(first)).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{"space": "probability"}, {"pieces": 6}])
def test_radius_0_has_the_space_and_pieces_of_other_radii(changes):
    """What differs between them is then the radius alone."""
    from openrlhf_sgpo import SGPOLoss

    later = log_probs(2)
    figures = []
    for radius in (0.0, 1e-9):
        loss = SGPOLoss(0.1, SGPOSettings(radius=radius, **changes))
        loss(*log_probs(1))
        figures.append(torch.autograd.grad(loss(*later)[0], later[:2]))
    torch.testing.assert_close(*figures, rtol=1e-5, atol=1e-9)


def test_the_support_is_that_of_the_first_solve():
    from openrlhf_sgpo import SGPOLoss

    loss = SGPOLoss(0.1, SGPOSettings(radius=0.2, refresh_window=8))
    loss(*log_probs(1))
    window = loss.algorithm._solution.window
    first = loss.algorithm._solution
    loss(*log_probs(2))
    assert loss.algorithm._solution is not first and loss.algorithm._solution.window == window


def test_settings_that_need_rounds_or_are_out_of_range_are_refused():
    from openrlhf_sgpo import SGPOLoss

    with pytest.raises(ValueError, match="--sgpo.radius: -1.0 is out of range, use at least 0"):
        SGPOLoss(0.1, SGPOSettings(radius=-1.0))
    with pytest.raises(ValueError, match="refresh_steps 0"):
        SGPOLoss(0.1, SGPOSettings(refresh_steps=0))
    with pytest.raises(ValueError, match="prox 0.5"):
        SGPOLoss(0.1, SGPOSettings(prox=0.5))


def test_margins_that_are_not_finite_stop_training():
    """Of a policy that is lost; with radius 0 too, where there is no follower to notice."""
    from openrlhf_sgpo import SGPOLoss
    from openrlhf_sgpo.finite import NotFiniteError

    for radius in (0.0, 0.2):
        loss, lost = SGPOLoss(0.1, SGPOSettings(radius=radius)), log_probs(1)
        lost[0] = torch.full_like(lost[0], torch.nan)
        with pytest.raises(NotFiniteError, match="go on from a checkpoint before, with a lower learning rate"):
            loss(*lost)


def test_a_policy_that_is_lost_is_not_saved():
    from types import SimpleNamespace

    from openrlhf_sgpo import SGPOTrainer
    from openrlhf_sgpo.finite import NotFiniteError

    trainer = SGPOTrainer.__new__(SGPOTrainer)
    trainer.model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(trainer.model.bias, torch.inf)
    with pytest.raises(NotFiniteError, match="step 10: the weight bias is not finite, so the policy is not saved"):
        trainer.save_logs_and_checkpoints(SimpleNamespace(ckpt=SimpleNamespace(save_steps=5)), 10, None)
