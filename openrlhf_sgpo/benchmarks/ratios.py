"""Ratios of sums, whose uncertainty comes from drawing units (prompts, questions) that have several verdicts each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def linearised(totals: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """A value per unit whose mean is the ratio R = sum(totals) / sum(sizes), and whose standard error and bootstrap are those
    of R to first order: R + (totals[i] - R sizes[i]) / mean(sizes) (the ratio estimator; Cochran, Sampling Techniques, 1977,
    chapter 6). Equal sizes give totals[i] / sizes[i]."""
    ratio = sum(totals) / sum(sizes)
    return [ratio + (total - ratio * size) / fmean(sizes) for total, size in zip(totals, sizes, strict=True)]
