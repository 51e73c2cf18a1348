"""The ratio of sums and its uncertainty, against ratios of data sets that are drawn anew."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_sgpo.benchmarks.ratios import linearised
from openrlhf_sgpo.intervals import bootstrap_interval
from openrlhf_sgpo.table import standard_error

units = st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=1, max_size=20)


@given(units)
def test_the_mean_is_the_ratio_of_the_sums(found):
    totals, sizes = zip(*found, strict=True)
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
