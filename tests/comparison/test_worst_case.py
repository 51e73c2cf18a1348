"""V of compared groups on their held-out pairs: from margins alone, with one support for all."""

import math
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch

from openrlhf_sgpo.comparison.worst_case import worst_cases
from openrlhf_sgpo.dro import solve_worst_case

PAIRS = 40


def group(name, runs, algo="dpo", beta=0.1, **options):
    """A group of runs with these held-out margins, one row per seed."""

    def run(row):
        margins = {f"pair {number}": margin for number, margin in enumerate(row.tolist())}
        settings = {"algo": algo, "model": {"beta": beta}, algo: options}
        return SimpleNamespace(settings=settings, margins=lambda: margins)

    return SimpleNamespace(name=name, runs=[run(row) for row in runs])


def draw(seed, scale):
    return scale * torch.randn(2, PAIRS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_differences_are_those_of_v_at_radius_0_and_at_the_group_s_own():
    dpo, narrow, wide = draw(0, 1.0), draw(0, 0.5), draw(1, 0.8)
    groups = [group("dpo", dpo), group("narrow", narrow, "sgpo", radius=0.05), group("wide", wide, "sgpo", radius=0.4)]
    result = worst_cases(groups)
    low = min(float(runs.min()) for runs in (dpo, narrow, wide)) - 1
    assert result["pairs"] == PAIRS and result["edge"] == low

    def value(runs, radius):
        return fmean(solve_worst_case(run, radius, window=(low, 9.0)).value for run in runs)

    assert result["radii"][0] == 0 and result["radii"][-1] == 4.0
    for name, runs in (("dpo", dpo), ("narrow", narrow), ("wide", wide)):
        assert result["curves"][name] == pytest.approx([value(runs, radius) for radius in result["radii"]], rel=1e-12)
    assert result["curves"]["dpo"][0] == pytest.approx(float(torch.nn.functional.softplus(-dpo).mean()), rel=1e-12)
    expected = {
        (first, second, radius): value(left, radius) - value(right, radius)
        for second, right, own_radius in (("narrow", narrow, 0.05), ("wide", wide, 0.4))
        for first, left in (("dpo", dpo), ("narrow", narrow), ("wide", wide))
        for radius in (0.0, own_radius)
        if first != second
    }
    rows = {(row["first"], row["second"], row["radius"]): row for row in result["differences"]}
    assert {key: row["difference"] for key, row in rows.items()} == pytest.approx(expected, abs=1e-12)
    assert all(row["low"] < row["difference"] < row["high"] for row in rows.values())


def test_with_one_seed_the_interval_is_that_of_the_mean_over_pairs():
    """At radius 0 V is the mean of DPO's loss."""
    first, second = draw(0, 1.0)[:1], draw(1, 0.5)[:1]
    result = worst_cases([group("dpo", first), group("sgpo", second, "sgpo", radius=0.1)])
    losses = (torch.nn.functional.softplus(-first) - torch.nn.functional.softplus(-second))[0].tolist()
    row = result["differences"][0]
    half = 2.023 * stdev(losses) / math.sqrt(PAIRS)  # Student's t with 39 degrees of freedom
    assert (row["radius"], row["difference"]) == (0.0, pytest.approx(fmean(losses)))
    assert (row["high"] - row["low"]) / 2 == pytest.approx(half, rel=1e-3)


@pytest.mark.parametrize(
    "other",
    [
        group("sgpo", draw(1, 1.0), "sgpo", radius=0.0),
        group("sgpo", draw(1, 1.0), "sgpo", radius=0.1, space="probability"),
        group("sgpo", draw(1, 1.0), "sgpo", radius=0.1, beta=0.2),
        group("sgpo", draw(1, 1.0)[:, :7], "sgpo", radius=0.1),
        group("sgpo", draw(1, 1.0)[:, :0], "sgpo", radius=0.1),
        group("kl_dpo", draw(1, 1.0), "kl_dpo", radius=0.1),
    ],
)
def test_what_cannot_be_compared_is_left_out(other):
    assert worst_cases([group("dpo", draw(0, 1.0)), other]) is None
    assert worst_cases([other, group("dpo", draw(0, 1.0))]) is None
