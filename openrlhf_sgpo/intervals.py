"""Intervals and tests for means, shares and ratios: over prompts, over seeds, or over both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
NORMAL_95 = 1.96  # standard errors to both sides that hold 95% of a normal distribution
LEAST_RANKED = 5  # pairs for the interval of a rank correlation
# The same for Student's t, by degrees of freedom from 1; beyond these it is close to 1.96 + 2.7 / degrees.
_STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def student_95(count: int) -> float:
    """Half of the 95% interval of a mean of ``count`` values, at least 2, in standard errors and correct within 0.5%.

    A table instead of SciPy's quantile, because pages are drawn where SciPy is not installed."""
    degrees = count - 1
    return _STUDENT_95[degrees - 1] if degrees <= len(_STUDENT_95) else NORMAL_95 + 2.7 / degrees


def scores(margins: Sequence[float]) -> list[float]:
    """A score for each pair: 1 if its margin is positive, 1/2 for a tie, so an untrained policy has accuracy 0.5."""
    return [(margin > 0) + 0.5 * (margin == 0) for margin in margins]


def share_error(values: Sequence[float]) -> float | None:
    """Standard error of a share, the mean of ``values`` in [0, 1]; None if all are ties or there are none.

    Agresti and Coull's (The American Statistician 52, 1998): as if there were two more of each kind, so it is not 0 where all
    are right.
    """
    if all(value == 0.5 for value in values):
        return None
    n = len(values) + NORMAL_95**2
    share = (sum(values) + NORMAL_95**2 / 2) / n
    return (share * (1 - share) / n) ** 0.5


def change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of after - before over the same pairs, in [-1, 1], and half of its 95% interval.

    Agresti and Min's (Biometrics 61, 2005): as if one more pair had changed half in each direction.
    """
    differences = [new - old for old, new in zip(before, after, strict=True)]
    n, total = len(differences) + 2, sum(differences)
    squares = sum(difference * difference for difference in differences)
    return total / len(differences), NORMAL_95 * (squares + 1 - total**2 / n) ** 0.5 / n


def half_of(row: Mapping[str, Any], key: str) -> float | None:
    """Half of the 95% interval of row[key], from its standard error, row[key + "_error"]; None without one."""
    error = row.get(f"{key}_error")
    return None if error is None else NORMAL_95 * error


def half_of_result(row: Mapping[str, Any], name: str) -> float | None:
    """Half of the 95% interval of a figure in a row of leaderboard.json; None where it is unknown."""
    interval, error = (row.get("intervals") or {}).get(name), (row.get("errors") or {}).get(name)
    if interval:
        return (interval[1] - interval[0]) / 2
    return None if error is None else NORMAL_95 * error


def half_over_seeds(value: Mapping[str, Any]) -> float | None:
    """Half of the 95% interval of a mean over seeds, {mean, error, values}, by Student's t, because seeds are few; None for one
    seed."""
    return None if value.get("error") is None else student_95(len(value["values"])) * value["error"]


def linearised(totals: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """A value per unit whose mean is the ratio R = sum(totals) / sum(sizes), and whose standard error and bootstrap are those
    of R to first order: R + (totals[i] - R sizes[i]) / mean(sizes) (the ratio estimator; Cochran, Sampling Techniques, 1977,
    chapter 6). Equal sizes give totals[i] / sizes[i]."""
    ratio = sum(totals) / sum(sizes)
    return [ratio + (total - ratio * size) / fmean(sizes) for total, size in zip(totals, sizes, strict=True)]


def bootstrap_interval(
    values: npt.ArrayLike, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """(low, high): percentile bootstrap interval of the mean of ``values``, shape (n,). Raises ValueError if there are none."""
    array = _checked(values, 1)
    n = array.shape[0]
    # How often each value is drawn in n draws with replacement.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    low, high = np.quantile(counts @ array / n, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class RankCorrelation(NamedTuple):
    """A rank correlation of n pairs in [-1, 1], with its 95% interval."""

    value: float
    low: float
    high: float
    n: int


def spearman(first: Sequence[float], second: Sequence[float]) -> RankCorrelation | None:
    """Spearman's rho with the interval tanh(atanh(rho) -+ 1.96 sqrt((1 + rho^2 / 2) / (n - 3))) (Bonett and Wright,
    Psychometrika 65, 2000), over pairs that are drawn like these. None for fewer than 5 pairs, or if either is constant.

    One step of rho is 12 / (n^3 - n). At -1 and 1, where atanh is infinite, the interval is that of half a step inwards."""
    from scipy.stats import spearmanr

    n = len(first)
    return _rank_interval(
        first, second, spearmanr, 6 / (n**3 - n) if n > 1 else 0, lambda rho: (1 + rho**2 / 2) / (n - 3)
    )


def kendall(first: Sequence[float], second: Sequence[float]) -> RankCorrelation | None:
    """Kendall's tau-b, as ``spearman``: the variance of atanh(tau) is 0.437 / (n - 4) (Fieller, Hartley and Pearson, Biometrika
    44, 1957), one step of tau is 4 / (n^2 - n)."""
    from scipy.stats import kendalltau

    n = len(first)
    return _rank_interval(first, second, kendalltau, 2 / (n**2 - n) if n > 1 else 0, lambda _: 0.437 / (n - 4))


def _rank_interval(
    first: Sequence[float],
    second: Sequence[float],
    statistic: Callable[..., Any],
    half_step: float,
    variance: Callable[[float], float],
) -> RankCorrelation | None:
    n = len(first)
    if n < LEAST_RANKED or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    value = float(statistic(first, second).statistic)
    inner = max(half_step - 1, min(1 - half_step, value))
    half = NORMAL_95 * variance(inner) ** 0.5
    low, high = (math.tanh(math.atanh(inner) + sign * half) for sign in (-1, 1))
    return RankCorrelation(value, min(low, value), max(high, value), n)


@dataclass(frozen=True)
class TwoLevelMean:
    """The mean of ``values[i, j, p]``, its standard error, and the degrees of freedom of that error."""

    mean: float
    error: float
    degrees_of_freedom: float
    prompts: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """(low, high): mean -+ t * error, with the quantile of Student's t for these degrees of freedom."""
        from scipy.special import stdtrit

        half = float(stdtrit(self.degrees_of_freedom, (1 + level) / 2)) * self.error if self.error else 0.0
        return self.mean - half, self.mean + half

    def p_value(self, null: float) -> float:
        """Two-sided p-value of "the mean is ``null``": below 0.05 where the 95% interval excludes ``null``. It is never below
        2^(1 - prompts), the smallest that a sign test can give: a few equal values have no variance."""
        from scipy.special import stdtr

        distance = abs(self.mean - null)
        if not distance:
            return 1.0
        tail = 2 * float(stdtr(self.degrees_of_freedom, -distance / self.error)) if self.error else 0.0
        return min(1.0, max(tail, 2.0 ** (1 - self.prompts)))


def two_level_mean(values: npt.ArrayLike) -> TwoLevelMean:
    """The mean of ``values[i, j, p]``, shape (first's seeds, second's seeds, prompts): the result of the first group's seed i
    against the second group's seed j on prompt p. All pairs of seeds answer the same prompts.

    With s2_k the sample variance of the means over all axes but k (first's seeds, second's seeds, prompts) and n_k the size of
    axis k,

        error^2 = sum_k s2_k / n_k,        degrees of freedom = error^4 / sum_k [ (s2_k / n_k)^2 / (n_k - 1) ]

    (Satterthwaite, Biometrics Bulletin 2, 1946). Variance that all three share is counted more than once, so the error can only
    be too large. One seed tells nothing about other seeds: its axis is left out. Exchanging the groups,
    values'[j, i, p] = 1 - values[i, j, p], mirrors the interval. Raises ValueError for values of another shape, or not finite.
    """
    array = _checked(values, 3)
    parts = []
    for axis, count in enumerate(array.shape):
        if count > 1:
            averaged = tuple(number for number in range(3) if number != axis)
            parts.append((float(array.mean(axis=averaged).var(ddof=1)) / count, count - 1))
    squared = sum(part for part, _ in parts)
    shares = sum(part**2 / freedom for part, freedom in parts)
    freedom = squared**2 / shares if shares else float(max((array.shape[2] - 1), 1))
    return TwoLevelMean(float(array.mean()), math.sqrt(squared), freedom, array.shape[2])


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the given order (Holm, Scandinavian Journal of Statistics 6, 1979): with m hypotheses and the k-th
    smallest p_(k), max over l <= k of min(1, (m - l + 1) p_(l)). All hypotheses below a level may be rejected at that level."""
    adjusted = np.zeros(len(p_values))
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values, dtype=np.float64)[order]))
    return [float(value) for value in adjusted]


def _checked(values: npt.ArrayLike, dimensions: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or not array.size or not np.isfinite(array).all():
        raise ValueError(f"an interval needs finite values in {dimensions} dimensions, got shape {array.shape}")
    return array
