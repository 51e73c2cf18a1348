"""V as a function of the radius: the same as solving for every radius, with the shape that theory gives it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from openrlhf_sgpo.dro import influences, saving, solve_worst_case, support_of, worst_case_curve

PROBLEMS = [
    {},
    {"pieces": 6},
    {"window": (-0.5, 1.0)},  # some samples lie left of it
    {"space": "probability"},
    {"space": "probability", "pieces": 3},
]


def samples(count=50, seed=0):
    """Some are tied."""
    margins = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(margins > 1, margins.round(), margins)


@pytest.mark.parametrize("keywords", PROBLEMS)
def test_a_curve_is_the_value_at_every_radius(keywords):
    margins = samples()
    radii = [0.0, 1e-6, *np.linspace(0.01, 4.0, 40)]
    curve = worst_case_curve(margins, radii, **keywords)
    solved = [solve_worst_case(margins, radius, **keywords) for radius in radii]
    assert any(solution.saturated for solution in solved) and not solved[4].saturated
    assert curve == pytest.approx([solution.value for solution in solved], rel=1e-13)


def test_it_begins_at_the_loss_of_dpo_rises_ever_more_slowly_and_ends_at_what_the_support_allows():
    margins = samples()
    radii = np.linspace(0.0, 4.0, 401)
    curve = worst_case_curve(margins, radii)
    assert curve[0] == pytest.approx(float(functional.softplus(-margins).mean()), rel=1e-14)
    assert curve[-1] == pytest.approx(math.log1p(math.exp(1 - float(margins.min()))), rel=1e-14)
    slopes = np.diff(curve) / np.diff(radii)
    assert (slopes >= 0).all() and all(later <= earlier + 1e-12 for earlier, later in pairwise(slopes))
    assert slopes[0] <= 1.0  # the Lipschitz constant: Theorem 2.4


@pytest.mark.parametrize("keywords", PROBLEMS)
@pytest.mark.parametrize("radius", [0.021, 0.1, 0.3])
def test_its_slope_is_the_slope_of_the_chord(keywords, radius):
    margins = samples()
    below, above = worst_case_curve(margins, [radius - 1e-7, radius + 1e-7], **keywords)
    assert (above - below) / 2e-7 == pytest.approx(solve_worst_case(margins, radius, **keywords).slope, abs=1e-7)


@pytest.mark.parametrize("keywords", PROBLEMS)
@pytest.mark.parametrize("radius", [0.0, 0.053, 0.2, 5.0])
def test_influences_average_to_the_value_and_say_what_a_further_sample_changes(radius, keywords):
    margins = samples().unique()  # where samples tie at the threshold, V has a kink
    if keywords.get("space") != "probability":
        keywords = {"window": (float(margins.min()) - 1.0, float(margins.max()) + 1.0)} | keywords
    shares = influences(margins, radius, **keywords)
    value = solve_worst_case(margins, radius, **keywords).value
    assert float(shares.mean()) == pytest.approx(value, rel=1e-13)
    many = margins.repeat(2000)
    for index in (0, 7, 20, len(margins) - 1):
        grown = torch.cat([many, margins[index : index + 1]])
        change = (solve_worst_case(grown, radius, **keywords).value - value) * len(grown)
        assert change == pytest.approx(float(shares[index]) - value, abs=1e-6)


def test_intervals_from_influences_hold_the_difference_of_two_policies():
    """Of 300 samples of 100 pairs under two policies, about 95% of the intervals hold the difference of all pairs."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(100_000, generator=generator, dtype=torch.float64)
    second = 0.7 * first + 0.3 * torch.randn(100_000, generator=generator, dtype=torch.float64)
    window, radius = (-6.0, 6.0), 0.2
    truth = float(influences(first, radius, window=window).mean() - influences(second, radius, window=window).mean())
    held = 0
    for _ in range(300):
        chosen = torch.randint(100_000, (100,), generator=generator)
        shares = influences(first[chosen], radius, window=window) - influences(second[chosen], radius, window=window)
        held += abs(float(shares.mean()) - truth) < 1.98 * float(shares.std()) / 10
    assert 0.92 < held / 300 < 0.98


@pytest.mark.parametrize("keywords", PROBLEMS)
def test_what_a_policy_saves_is_the_difference_of_two_values(keywords):
    policy, base = samples(), samples(seed=1)
    keywords = {"window": support_of([policy, base])} | keywords if keywords.get("space") is None else keywords
    figures = saving(policy, base, 0.1, **keywords)
    values = [solve_worst_case(margins, 0.1, **keywords).value for margins in (policy, base)]
    assert figures[:2] == pytest.approx(values, rel=1e-13)
    assert figures.saved == pytest.approx(values[1] - values[0], abs=1e-13) and figures.error > 0
    assert saving(base, policy, 0.1, **keywords)[2:] == pytest.approx((-figures.saved, figures.error))
    assert saving(policy, policy, 0.1, **keywords)[2:] == (0.0, 0.0)
    assert saving(policy[:1], base[:1], 0.0, **keywords).error is None


def test_with_a_wide_support_robustness_buys_what_it_costs():
    """V is then DPO's loss plus the radius for every policy (Lemma 3.1), so the same is saved at every radius."""
    policy, base = samples(), samples(seed=1)
    without, wide = (saving(policy, base, radius, window=(-1e6, 10.0)).saved for radius in (0.0, 0.3))
    narrow = saving(policy, base, 0.3, window=support_of([policy, base])).saved
    assert wide == pytest.approx(without, abs=1e-5)
    assert abs(narrow - without) > 1e-3


def test_the_support_of_several_policies_reaches_beyond_all_their_margins():
    policies = [torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 3.0])]
    assert support_of(policies) == (-3.0, 4.0)
    assert support_of(policies, "probability") == (0.0, 1.0)


def test_a_bad_radius_is_refused():
    with pytest.raises(ValueError, match="radius must be finite"):
        worst_case_curve(samples(), [0.0, math.inf])
