"""Intervals and tests of means and ratios, against simulated data whose mean is known, and worked examples."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit

from openrlhf_sgpo.intervals import (
    bootstrap_interval,
    holm,
    kendall,
    linearised,
    spearman,
    standard_error,
    student_95,
    two_level_mean,
)

PAIRS = [(1, 1), (2, 3), (3, 2), (3, 3)]


def votes(*shape: int, seed: int = 0, win: float = 0.6) -> np.ndarray:
    """Preferences of 0, 1/2 and 1."""
    return np.random.default_rng(seed).choice([0.0, 0.5, 1.0], size=shape, p=[0.9 - win, 0.1, win])


@pytest.mark.slow
def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    generator = np.random.default_rng(1)
    trials = 400
    hits = 0
    for _ in range(trials):
        low, high = bootstrap_interval(generator.normal(2, 1, 60), draws=500)
        hits += low <= 2 <= high
    # Three standard errors of the share of hits; the percentile bootstrap of 60 values covers a little less than it says.
    assert abs(hits / trials - 0.94) < 3 * math.sqrt(0.95 * 0.05 / trials)


@pytest.mark.slow
def test_the_interval_of_a_mean_is_that_of_its_normal_limit():
    values = np.random.default_rng(2).normal(0, 1, 4000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    low, high = bootstrap_interval(values, level=0.5)
    half *= 0.6745 / 1.96
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def simulate(seeds, seed_deviation, prompt_deviation, trials, generator, prompts=40):
    """(trials, seeds, seeds, prompts): effects of the first's seeds, the second's and the prompts around 1/2, and noise."""
    shape = (trials, seeds, seeds, prompts)
    effects = generator.normal(0, seed_deviation, (trials, seeds, 1, 1)) - generator.normal(
        0, seed_deviation, (trials, 1, seeds, 1)
    )
    return (
        0.5 + effects + generator.normal(0, prompt_deviation, (trials, 1, 1, prompts)) + generator.normal(0, 0.1, shape)
    )


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("deviations", [(0.03, 0.3), (0.1, 0.3), (0.0, 0.3), (0.1, 0.02)])
def test_intervals_cover_and_p_values_hold_their_level_with_few_seeds(seeds, deviations):
    """Type I error near 5%, coverage near 95%, where seeds, prompts or both decide. Where seeds do nothing, counting them as
    well costs a little width."""
    trials = 800
    covered = rejected = 0
    for values in simulate(seeds, *deviations, trials, np.random.default_rng(4)):
        estimate = two_level_mean(values)
        low, high = estimate.interval()
        covered += low <= 0.5 <= high
        rejected += estimate.p_value(0.5) < 0.05
    assert covered + rejected == trials
    # Satterthwaite's approximation itself is off by a point or two with two seeds each.
    assert 0.925 <= covered / trials <= 0.995


def test_the_error_is_that_of_a_sum_of_independent_parts():
    """By hand: rows (0, 1), columns and prompts that do not differ."""
    values = np.broadcast_to(np.array([0.0, 1.0])[:, None, None], (2, 3, 10))
    estimate = two_level_mean(values)
    assert (estimate.mean, estimate.error**2, estimate.degrees_of_freedom) == pytest.approx((0.5, 0.5 / 2, 1.0))
    low, high = estimate.interval()
    assert high - 0.5 == pytest.approx(12.706 * 0.5, rel=1e-4) and low == pytest.approx(1 - high)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_exchanging_the_groups_mirrors_the_interval(first, second):
    values = votes(first, second, 40)
    estimate, exchanged = two_level_mean(values), two_level_mean(1 - values.transpose(1, 0, 2))
    low, high = estimate.interval()
    assert exchanged.interval() == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert exchanged.p_value(0.5) == pytest.approx(estimate.p_value(0.5), abs=1e-12)
    assert exchanged.error == pytest.approx(estimate.error, abs=1e-12)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_further_seeds_with_the_same_preferences_say_nothing(first, second):
    single = votes(1, 1, 200, seed=5)
    several = np.broadcast_to(single, (first, second, 200))
    expected = single.std(ddof=1) / math.sqrt(200)
    assert two_level_mean(several).error == pytest.approx(expected)
    assert two_level_mean(several).degrees_of_freedom == pytest.approx(199)


def test_one_seed_each_is_the_t_interval_over_prompts():
    values = votes(1, 1, 300, seed=6)
    low, high = bootstrap_interval(values[0, 0], draws=10_000)
    half = 1.968 * values.std(ddof=1) / math.sqrt(300)
    assert two_level_mean(values).interval() == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-4)
    assert two_level_mean(values).interval() == pytest.approx((low, high), abs=0.1 * half)


def test_the_p_value_and_the_interval_agree():
    outcomes = set()
    for seed in range(60):
        estimate = two_level_mean(votes(2, 2, 50, seed=seed, win=0.65))
        low, high = estimate.interval()
        outside = not low <= 0.5 <= high
        outcomes.add(outside)
        assert (estimate.p_value(0.5) < 0.05) == outside
    assert outcomes == {True, False}


def test_values_that_do_not_vary():
    for share in (0.0, 0.5, 1.0):
        values = np.full((2, 3, 30), share)
        assert two_level_mean(values).interval() == (share, share)
        assert two_level_mean(values).error == 0
    assert two_level_mean(np.full((2, 3, 30), 0.5)).p_value(0.5) == 1
    # All prompts won: a sign test of n prompts gives 2 * 2^-n, and no other may give less.
    assert [two_level_mean(np.ones((1, 1, n))).p_value(0.5) for n in (1, 3, 5)] == [1, 1 / 4, 1 / 16]
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    assert two_level_mean([[[0.25]]]).interval() == (0.25, 0.25)


def test_holm_worked_by_hand():
    # Sorted: 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 are 0.02, 0.03, 0.06, 0.04, and the last may not be below the third.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert holm([0.7, 0.7, 0.7]) == [1, 1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_rejects_what_its_steps_reject():
    """The step-down rule: go through the sorted p-values while p_(k) <= level / (m - k + 1)."""
    generator = np.random.default_rng(8)
    for _ in range(50):
        p_values = generator.random(6) ** 3
        rejected: set[int] = set()
        for place, index in enumerate(np.argsort(p_values)):
            if p_values[index] > 0.05 / (6 - place):
                break
            rejected.add(int(index))
        assert {index for index, value in enumerate(holm(p_values)) if value <= 0.05} == rejected


@pytest.mark.parametrize("values", [[], [math.nan], [[1.0]]])
def test_what_has_no_interval(values):
    with pytest.raises(ValueError, match="an interval needs finite values in 1 dimensions"):
        bootstrap_interval(values)


@pytest.mark.parametrize("count", [*range(2, 40), 10_000])
def test_few_values_have_the_wide_intervals_of_students_law(count):
    assert student_95(count) == pytest.approx(stdtrit(count - 1, 0.975), rel=0.005)


units = st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=1, max_size=20)


@given(units)
def test_the_mean_is_the_ratio_of_the_sums(units):
    totals, sizes = zip(*units, strict=True)
    assert fmean(linearised(totals, sizes)) == pytest.approx(sum(totals) / sum(sizes), abs=1e-9)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.integers(1, 9))
def test_equal_sizes_leave_the_ratios_of_the_units(totals, size):
    assert linearised(totals, [size] * len(totals)) == pytest.approx([total / size for total in totals], abs=1e-9)


def test_the_uncertainty_is_that_of_ratios_of_data_sets_drawn_anew():
    random = np.random.default_rng(1)
    sizes = random.integers(1, 7, 400)
    # Large units follow more of theirs, so that totals and sizes go together and the mean of totals / sizes is another number.
    totals = random.binomial(sizes, 0.3 + 0.1 * sizes)
    drawn = random.integers(0, 400, (4000, 400))
    ratios = totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    values = linearised(totals.tolist(), sizes.tolist())
    spread = ratios.std()
    assert standard_error(values) == pytest.approx(spread, rel=0.05)
    assert bootstrap_interval(values) == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.15 * spread)
    assert abs(fmean(totals / sizes) - fmean(values)) > 3 * spread


@pytest.mark.parametrize("correlation", [spearman, kendall])
def test_a_rank_correlation_sees_order_alone(correlation):
    generator = np.random.default_rng(3)
    first = list(generator.normal(size=12))
    second = [value + noise for value, noise in zip(first, generator.normal(size=12), strict=True)]
    measured = correlation(first, second)
    assert -1 < measured.low < measured.value < measured.high < 1 and measured.n == 12
    assert correlation([math.exp(value) for value in first], second) == measured
    mirrored = correlation([-value for value in first], second)
    assert mirrored[:3] == pytest.approx((-measured.value, -measured.high, -measured.low))
    assert correlation(first[:4], second[:4]) is None and correlation([1.0] * 12, second) is None


def test_spearman_is_the_correlation_of_the_ranks_and_kendall_counts_pairs():
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, 1.0, 4.0, 3.0, 6.0, 5.0]
    assert spearman(first, second).value == pytest.approx(float(np.corrcoef(first, second)[0, 1]))
    assert kendall(first, second).value == pytest.approx((12 - 3) / 15)


@pytest.mark.parametrize("n", [5, 8, 20])
def test_equal_orders_of_a_few_prove_little(n):
    """A true rho of the lower end would give equal orders by chance now and then; more pairs prove more."""
    order = list(range(n))
    for correlation, least in ((spearman, 0.2), (kendall, 0.3)):
        measured, fewer = correlation(order, order), correlation(order[:5], order[:5])
        assert (measured.value, measured.high) == pytest.approx((1, 1))
        assert fewer.low < least and fewer.low <= measured.low < 1


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 20])
def test_the_interval_of_a_rank_correlation_covers_it_as_often_as_it_says(n):
    """rho and tau of a normal pair with correlation r are 6 / pi asin(r / 2) and 2 / pi asin(r)."""
    generator, r, trials = np.random.default_rng(4), 0.8, 600
    hits = {spearman: 0, kendall: 0}
    true = {spearman: 6 / math.pi * math.asin(r / 2), kendall: 2 / math.pi * math.asin(r)}
    for _ in range(trials):
        first = generator.normal(size=n)
        second = r * first + math.sqrt(1 - r * r) * generator.normal(size=n)
        for correlation in hits:
            measured = correlation(list(first), list(second))
            hits[correlation] += measured.low <= true[correlation] <= measured.high
    for count in hits.values():
        assert abs(count / trials - 0.95) < 0.035
