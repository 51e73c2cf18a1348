"""Intervals and tests of means, against simulated data whose mean is known, and worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from openrlhf_sgpo.evaluation.statistics import (
    bootstrap_interval,
    holm,
    two_level_error,
    two_level_interval,
    two_level_p_value,
)

PAIRS = [(1, 1), (2, 3), (3, 2), (3, 3)]


def votes(*shape: int, seed: int = 0, win: float = 0.6) -> np.ndarray:
    """Preferences of 0, 1/2 and 1."""
    return np.random.default_rng(seed).choice([0.0, 0.5, 1.0], size=shape, p=[0.9 - win, 0.1, win])


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    generator = np.random.default_rng(1)
    trials = 400
    hits = 0
    for _ in range(trials):
        low, high = bootstrap_interval(generator.normal(2, 1, 60), draws=500)
        hits += low <= 2 <= high
    # Three standard errors of the share of hits; the percentile bootstrap of 60 values covers a little less than it says.
    assert abs(hits / trials - 0.94) < 3 * math.sqrt(0.95 * 0.05 / trials)


def test_the_interval_of_a_mean_is_that_of_its_normal_limit():
    values = np.random.default_rng(2).normal(0, 1, 4000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    low, high = bootstrap_interval(values, level=0.5)
    half *= 0.6745 / 1.96
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_seeds_count_only_where_they_are_drawn_anew():
    """Preferences that differ by seed and not by prompt: an interval over prompts has no width, whatever the seeds do."""
    generator = np.random.default_rng(3)
    trials, covered = 300, 0
    for _ in range(trials):
        effects = generator.normal(0, 0.1, (8, 1, 1)) - generator.normal(0, 0.1, (1, 8, 1))
        values = np.broadcast_to(0.5 + effects, (8, 8, 5))
        low, high = two_level_interval(values, draws=400)
        covered += low <= 0.5 <= high
        over_prompts = bootstrap_interval(values.mean(axis=(0, 1)), draws=400)
        assert over_prompts[0] == pytest.approx(over_prompts[1])
    # A bootstrap of eight values has their variance with a divisor of 8 in place of 7, and no t quantiles: about 0.9.
    assert 0.84 <= covered / trials <= 0.97


def test_two_levels_with_both_kinds_of_effects_cover():
    generator = np.random.default_rng(4)
    trials, covered = 300, 0
    for _ in range(trials):
        effects = generator.normal(0, 0.05, (6, 1, 1)) + generator.normal(0, 0.05, (1, 6, 1))
        values = 0.5 + effects + generator.normal(0, 0.5, (1, 1, 40)) + generator.normal(0, 0.1, (6, 6, 40))
        low, high = two_level_interval(values, draws=400)
        covered += low <= 0.5 <= high
    assert covered / trials >= 0.9


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_exchanging_the_groups_mirrors_the_interval(first, second):
    values = votes(first, second, 40)
    exchanged = 1 - values.transpose(1, 0, 2)
    low, high = two_level_interval(values)
    assert two_level_interval(exchanged) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert two_level_p_value(exchanged) == two_level_p_value(values)
    assert two_level_error(exchanged) == pytest.approx(two_level_error(values), abs=1e-12)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_prompts_are_drawn_for_all_pairs_of_seeds_at_once(first, second):
    """If all pairs of seeds have the same preferences, further seeds say nothing, and the interval is that of one."""
    one = votes(1, 1, 200, seed=5)
    several = np.broadcast_to(one, (first, second, 200))
    assert two_level_error(several) == pytest.approx(one.std() / math.sqrt(200), rel=0.05)


def test_one_seed_each_is_the_bootstrap_over_prompts():
    values = votes(1, 1, 300, seed=6)
    both = two_level_interval(values), bootstrap_interval(values[0, 0], draws=10_000)
    half = 1.96 * values.std() / math.sqrt(300)
    assert both[0] == pytest.approx(both[1], abs=0.1 * half)


def test_the_p_value_and_the_interval_agree():
    """Below 0.05 where the interval leaves out 1/2, but for the draw that the data count as and ties at the edge."""
    outcomes = set()
    for seed in range(60):
        values = votes(2, 2, 50, seed=seed, win=0.57)
        (low, high), p = two_level_interval(values), two_level_p_value(values)
        outside = not low <= 0.5 <= high
        outcomes.add(outside)
        assert (p < 0.05) == outside or abs(p - 0.05) < 0.002
    assert outcomes == {True, False}


def test_the_p_value_is_rarely_small_where_nothing_differs():
    generator = np.random.default_rng(7)
    p_values = [two_level_p_value(generator.integers(0, 2, (1, 1, 80)), draws=400) for _ in range(400)]
    assert np.mean(np.array(p_values) < 0.05) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_values_that_do_not_vary():
    for share in (0.0, 0.5, 1.0):
        values = np.full((2, 3, 30), share)
        assert two_level_interval(values) == (share, share)
        assert two_level_error(values) == 0
    assert two_level_p_value(np.full((2, 3, 30), 0.5)) == 1
    # All prompts won: a sign test of n prompts gives 2 * 2^-n, and no other may give less.
    assert [two_level_p_value(np.ones((1, 1, n))) for n in (1, 3, 5)] == [1, 1 / 4, 1 / 16]
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    assert two_level_interval([[[0.25]]]) == (0.25, 0.25)


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
