"""Intervals and tests of means: over prompts, and over seeds and prompts. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def bootstrap_interval(
    values: npt.ArrayLike, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """(low, high): percentile bootstrap interval of the mean of ``values``, shape (n,). Raises ValueError if there are none."""
    known = _checked(values, 1)
    counts = _counts(np.random.default_rng(seed), draws, known.shape[0])
    return _percentiles(counts @ known / known.shape[0], level)


def two_level_interval(
    values: npt.ArrayLike, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """(low, high): interval of the mean of ``values[i, j, p]``, shape (first's seeds, second's seeds, prompts): what seed i of
    the one group gets against seed j of the other on prompt p.

    Percentiles of a bootstrap in which the seeds of each group and the prompts are drawn anew with replacement, each for
    itself. All pairs of seeds answer the same prompts, and so they do in every draw (the pigeonhole bootstrap of Owen,
    Annals of Applied Statistics 1, 2007). Exchanging the groups, values'[j, i, p] = 1 - values[i, j, p], gives (1 - high,
    1 - low). With one seed each it is the bootstrap over prompts and speaks of these two policies only. Raises ValueError.
    """
    return _percentiles(_two_level_means(_checked(values, 3), seed, draws), level)


def two_level_error(values: npt.ArrayLike, seed: int = 0, draws: int = 10_000) -> float:
    """Standard error of the mean of ``values``, shaped as in ``two_level_interval``: the standard deviation of its draws.
    Raises ValueError."""
    return float(np.std(_two_level_means(_checked(values, 3), seed, draws)))


def two_level_p_value(values: npt.ArrayLike, seed: int = 0, draws: int = 10_000) -> float:
    """Two-sided p-value of "the mean of ``values`` is 1/2", values as in ``two_level_interval``: twice the share of the same
    draws that are on the other side of 1/2, the data counted as one more draw.

    Of the same draws, so that it is below 0.05 where the 95% interval leaves out 1/2. A permutation of seeds, the
    alternative, cannot be significant with the two or three seeds that such comparisons have. It is never below
    2^(1 - prompts), the least that a sign test of so many prompts can give: draws of few equal values do not vary.
    Raises ValueError.
    """
    known = _checked(values, 3)
    means = _two_level_means(known, seed, draws)
    beyond = min(np.count_nonzero(means <= 0.5), np.count_nonzero(means >= 0.5))
    return min(1.0, max(2 * (beyond + 1) / (len(means) + 1), 2.0 ** (1 - known.shape[2])))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the given order (Holm, Scandinavian Journal of Statistics 6, 1979): with m hypotheses and the k-th
    smallest p_(k), max over l <= k of min(1, (m - l + 1) p_(l)). Those below a level may be rejected together at it."""
    adjusted = np.zeros(len(p_values))
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values, dtype=np.float64)[order]))
    return [float(one) for one in adjusted]


def _two_level_means(values: Array, seed: int, draws: int) -> Array:
    """Means of ``draws`` resampled data sets, shape (draws,), rounded up to an even number."""
    first, second, prompts = values.shape
    generator = np.random.default_rng(seed)
    half = (draws + 1) // 2
    # Each drawing of seeds is used twice, for the one group and for the other: no order of the groups is favoured.
    one, other = generator.random((2, half, max(first, second)))
    of_first = _counts_of(np.concatenate([one, other])[:, :first])
    of_second = _counts_of(np.concatenate([other, one])[:, :second])
    of_prompts = np.tile(_counts(generator, half, prompts), (2, 1))
    # Whole numbers of draws: sums of wins and ties, and so equality with one half, are exact.
    sums = (of_prompts @ values.reshape(-1, prompts).T).reshape(-1, first, second)
    return np.einsum("di,dj,dij->d", of_first, of_second, sums) / values.size


def _counts(generator: np.random.Generator, draws: int, n: int) -> Array:
    """How often each of n things is drawn in n drawings with replacement, shape (draws, n)."""
    return generator.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)


def _counts_of(uniform: Array) -> Array:
    """The same from uniform numbers in [0, 1), shape (draws, n), one for each drawing."""
    n = uniform.shape[1]
    return (np.floor(uniform * n)[:, :, None] == np.arange(n)).sum(axis=1).astype(np.float64)


def _percentiles(means: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _checked(values: npt.ArrayLike, dimensions: int) -> Array:
    known = np.asarray(values, dtype=np.float64)
    if known.ndim != dimensions or not known.size or not np.isfinite(known).all():
        raise ValueError(f"an interval needs finite values in {dimensions} dimensions, got shape {known.shape}")
    return known
