"""ROPO's loss: its steepest slope, its limits, and flips at random."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_batches import BETA, batch, draw

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.ropo import ROPO, ROPOSettings, ropo_loss

GRID = torch.linspace(-12, 12, 20_001, dtype=torch.float64)


def slope(margins, alpha):
    margins = margins.clone().requires_grad_()
    return torch.autograd.grad(ropo_loss(margins, alpha).sum(), margins)[0]


@pytest.mark.parametrize("alpha", [1.0, 2.0, 14.0, 100.0])
def test_the_steepest_slope_is_minus_1_and_fades_on_both_sides(alpha):
    slopes = slope(GRID, alpha)
    assert slopes.min().item() == pytest.approx(-1, abs=1e-6)
    steepest = GRID[slopes.argmin()]
    if alpha > 1:  # at 1 it is at minus infinity
        assert torch.sigmoid(-steepest).item() == pytest.approx((1 + alpha) / (2 * alpha), abs=1e-3)
    assert slope(torch.tensor([-40.0], dtype=torch.float64), alpha).item() == pytest.approx(
        -4 * alpha / (1 + alpha) ** 2
    )


def test_without_the_bounded_part_it_is_dpo():
    margins = draw(50)
    distances = []
    for alpha in (1e-2, 1e-4, 1e-6):
        scaled = ropo_loss(margins, alpha) * (1 + alpha) ** 2 / (4 * alpha)
        distances.append(float((scaled - dpo_loss(margins)).abs().max()))
    assert distances[0] <= 1e-2 and distances[1] <= 1e-4 and distances[2] <= 1e-6


def test_a_large_alpha_leaves_the_bounded_part():
    margins = draw(50)
    assert torch.allclose(ropo_loss(margins, 1e7), 4 * torch.sigmoid(-margins), rtol=0, atol=1e-5)


@given(margin=st.floats(-20, 20), alpha=st.floats(0.01, 100), rate=st.floats(0, 0.5))
def test_flips_scale_the_gradient_of_the_bounded_part_and_nothing_else(margin, alpha, rate):
    """At flip rate e the bounded part keeps 1 - 2 e of its gradient; DPO's part gets e added, whatever the margin."""
    margins, factor = torch.tensor([margin], dtype=torch.float64), 4 * alpha / (1 + alpha) ** 2
    under_flips = (1 - rate) * slope(margins, alpha) - rate * slope(-margins, alpha)
    share = torch.sigmoid(margins)
    expected = factor * (share - 1 + rate - (1 - 2 * rate) * alpha * share * (1 - share))
    assert torch.allclose(under_flips, expected, rtol=0, atol=1e-12)


def test_the_algorithm_applies_it_to_margins():
    margins = draw(20)
    assert torch.equal(ROPO(ROPOSettings(3.0), BETA).loss(batch(margins)), ropo_loss(margins, 3.0))


def test_gradient():
    assert torch.autograd.gradcheck(lambda values: ropo_loss(values, 14.0), draw(9).requires_grad_())


def test_alpha_is_positive():
    (problem,) = flags.out_of_range({"ropo": ROPOSettings(0.0)})
    assert problem == "--ropo.alpha: 0.0 is out of range, use more than 0"
