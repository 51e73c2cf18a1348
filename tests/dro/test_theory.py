"""The section "What the theory does and does not say" of docs/algorithms/sgpo.md, executed."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.nn import functional

from openrlhf_sgpo.dro import solve_worst_case
from openrlhf_sgpo.dro.losses import loss_value

PAGE = Path(__file__).parents[2] / "docs" / "algorithms" / "sgpo.md"


def dpo(margins):
    """Mean of DPO's loss, written out."""
    return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)


@pytest.fixture(scope="module")
def section():
    text = PAGE.read_text(encoding="utf-8")
    (section,) = re.findall(r"## What the theory does and does not say\n(.*?)\n## ", text, re.DOTALL)
    return " ".join(section.split())


def test_the_printed_payoff_is_the_same_for_every_policy():
    """E_alpha[log sigmoid] over the atoms of the follower's answer is -V of the policy that it answers, and contains nothing
    of another policy, although that one's V is different."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(50, generator=generator, dtype=torch.float64) + shift for shift in (0.0, 1.0))
    answer = solve_worst_case(first, 0.2)
    mass, shift = answer.transport()  # of what stays and what moves; shift is mass times distance
    atoms = first[:, None] - torch.where(mass > 0, shift / mass.clamp_min(1e-300), 0.0)
    assert float((first[:, None] - atoms).mul(mass).sum(1).mean()) == pytest.approx(0.2)  # inside the ball
    payoff = float((mass * functional.logsigmoid(atoms)).sum(1).mean())
    assert payoff == pytest.approx(-answer.value, rel=1e-12)
    assert solve_worst_case(second, 0.2).value < answer.value - 0.1


def test_distributions_that_are_far_apart_may_have_the_same_loss(section):
    loss = dpo([-3.0, 3.0])
    place = -math.log(math.expm1(loss))
    assert dpo([place, place]) == pytest.approx(loss, rel=1e-14)
    assert wasserstein_distance([-3.0, 3.0], [place, place]) == pytest.approx(3.0)
    assert "`alpha` has margins -3 and 3, `beta` has both at -1.31" in section and f"{place:.2f}" == "-1.31"
    assert f"The distance is 3, and DPO's loss is the same {loss:.3f} under both" in section


def test_in_a_wide_support_v_is_the_loss_of_dpo_plus_the_radius(section):
    margins = torch.tensor([-3.0, 3.0], dtype=torch.float64)
    excess = [solve_worst_case(margins, 0.5, window=(edge, 4.0)).value - dpo([-3, 3]) for edge in (-10, -100, -1000)]
    words = f"{excess[0]:.4f}, {excess[1]:.5f} and {excess[2]:.6f}".replace("0.", ".")
    assert f"V exceeds DPO's loss by {words} at a = -10, -100 and -1000" in section
    for shift in (0.0, 1.0, -2.0):  # the same for every policy
        wide = solve_worst_case(margins + shift, 0.5, window=(-1e7, 6.0)).value
        assert wide == pytest.approx(dpo([shift - 3, shift + 3]) + 0.5, abs=1e-6)


def worst_value(values, losses, at_edge, edge, radius):
    """V by its dual, which is convex and piecewise linear in lam: its minimum is at 0 or at the slope of a chord."""
    slopes = np.append((at_edge - losses) / (values - edge), 0.0)
    return min(slope * radius + np.maximum(losses, at_edge - slope * (values - edge)).mean() for slope in slopes)


def test_uniform_knots_can_lower_v_and_nested_ones_cannot():
    generator, edge, last = np.random.default_rng(0), -2.0, 3.0
    fell = 0
    for _ in range(30):
        values = np.clip(generator.normal(0.5, 0.8, 40), edge + 1e-6, last)
        uniform, nested = [], []
        for pieces in range(1, 9):
            knots = np.linspace(edge, last, pieces)
            slopes = -1 / (1 + np.exp(knots))
            heights = np.log1p(np.exp(-knots))

            def tangents(places, knots=knots, slopes=slopes, heights=heights):
                return (heights + slopes * (np.atleast_1d(places)[:, None] - knots)).max(1)

            uniform.append(worst_value(values, tangents(values), tangents(edge)[0], edge, 0.1))
            solved = solve_worst_case(torch.from_numpy(values), 0.1, pieces=pieces, window=(edge, last))
            nested.append(solved.value)
            losses = loss_value(torch.from_numpy(values), space="margin", pieces=pieces, window=(edge, last))
            start = float(loss_value(torch.tensor(edge).double(), space="margin", pieces=pieces, window=(edge, last)))
            assert solved.value == pytest.approx(worst_value(values, losses.numpy(), start, edge, 0.1), rel=1e-12)
        fell += (np.diff(uniform) < -1e-9).any()
        assert (np.diff(nested) > -1e-12).all()
    assert fell >= 3
