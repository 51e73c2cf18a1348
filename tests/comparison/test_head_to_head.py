"""Figures of a comparison against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from openrlhf_sgpo.comparison.compared_runs import BUDGET, named_folders
from openrlhf_sgpo.comparison.head_to_head import (
    budget_warnings,
    comparison_table,
    cross_play,
    mean_ledger,
    over_seeds,
    versus_start,
    with_holm,
)


def ledger(**changes: float) -> dict[str, float]:
    return dict.fromkeys((*BUDGET, "seconds", "steps", "trials"), 100.0) | changes


def test_a_figure_is_a_mean_over_seeds_with_its_error():
    assert over_seeds([0.5, 0.7]) == {"mean": pytest.approx(0.6), "error": pytest.approx(0.1), "values": [0.5, 0.7]}
    assert over_seeds([0.5]) == {"mean": 0.5, "error": None, "values": [0.5]}
    assert over_seeds([]) == {"mean": None, "error": None, "values": []}


def test_cross_play_counts_ties_one_half_and_every_pair_of_seeds():
    # Seed 1 of the first wins, ties and loses against the one seed of the second; its seed 2 wins twice and ties.
    row = cross_play(("a", "b"), [[[1, 0.5, 0]], [[1, 1, 0.5]]])
    assert (row["first"], row["second"], row["comparisons"]) == ("a", "b", 6)
    assert row["win_rate"] == pytest.approx(4 / 6)
    assert row["low"] <= row["win_rate"] <= row["high"] <= 1


def test_the_other_side_of_a_pair_is_its_mirror():
    values = np.random.default_rng(0).choice([0, 0.5, 1], size=(2, 3, 25))
    row, mirror = cross_play(("a", "b"), values), cross_play(("b", "a"), 1 - values.transpose(1, 0, 2))
    assert mirror["win_rate"] == pytest.approx(1 - row["win_rate"])
    assert (mirror["low"], mirror["high"]) == pytest.approx((1 - row["high"], 1 - row["low"]))
    assert mirror["p_value"] == pytest.approx(row["p_value"])


def test_holm_is_over_all_pairs():
    rows = with_holm([{"first": "a", "p_value": 0.04}, {"first": "b", "p_value": 0.01}, {"first": "c", "p_value": 0.5}])
    # 0.01 * 3, 0.04 * 2, 0.5 * 1
    assert [row["p_holm"] for row in rows] == pytest.approx([0.08, 0.03, 0.5])
    assert [row["first"] for row in rows] == ["a", "b", "c"]


def test_the_error_of_the_divergence_is_over_prompts_and_seeds():
    prompts = np.random.default_rng(1).exponential(2, 400)
    row = versus_start("a", np.full((1, 1, 400), 0.75), prompts[None])
    assert (row["win_rate"], row["low"], row["high"]) == (0.75, 0.75, 0.75)
    assert row["kl"] == pytest.approx(prompts.mean())
    assert row["kl_error"] == pytest.approx(prompts.std() / math.sqrt(400), rel=0.05)
    # Seeds 3 nats apart have a sample variance of 9 / 2, and their mean half of it.
    both = versus_start("a", np.full((2, 1, 400), 0.75), np.stack([prompts, prompts + 3]))
    assert both["kl"] == pytest.approx(prompts.mean() + 1.5)
    assert both["kl_error"] == pytest.approx(math.sqrt(prompts.var() / 400 + 9 / 4), rel=0.05)


def test_a_ledger_is_a_mean_over_seeds():
    costs = mean_ledger([ledger(steps=10, samples=40), ledger(steps=20, samples=40)], trials=3)
    assert (costs["steps"], costs["samples"], costs["trials"], costs["seconds"]) == (15, 40, 3, 100)


@pytest.mark.parametrize("budget", [*BUDGET, "steps", "trials"])
def test_a_budget_that_is_not_equal_gives_a_warning(budget):
    assert budget_warnings({"a": ledger(), "b": ledger(**{budget: 105.0})}) == []
    (warning,) = budget_warnings({"a": ledger(), "b": ledger(**{budget: 106.0}), "c": ledger()})
    assert warning == f"the budgets of {budget.replace('_', ' ')} differ: a 100, b 106, c 100"


def test_nothing_against_something_is_a_difference_and_seconds_are_no_budget():
    assert budget_warnings({"a": ledger(judge_calls=0), "b": ledger(judge_calls=0)}) == []
    (warning,) = budget_warnings({"a": ledger(judge_calls=0), "b": ledger(judge_calls=1, seconds=9)})
    assert "judge calls" in warning


def test_the_table_shows_what_was_not_measured_as_a_dash():
    names = ("accuracy", "margin", "kl", "response_length")
    groups = [
        {
            "name": "a",
            "runs": [{}, {}],
            "figures": {name: over_seeds([1.0, 2.0]) for name in names},
            "ledger": ledger(),
        },
        {"name": "b", "runs": [{}], "figures": {name: over_seeds([]) for name in names}, "ledger": ledger()},
    ]
    against = [versus_start(name, np.full((1, 1, 4), 0.5), np.zeros((1, 4))) for name in ("a", "b")]
    pairs = with_holm([cross_play(("a", "b"), np.ones((1, 1, 3)))])
    text = comparison_table(
        {
            "prompts": 3,
            "oracle": {"name": "judge"},
            "groups": groups,
            "cross_play": pairs,
            "versus_start": against,
            "warnings": ["budgets differ"],
        }
    )
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "1.500 \N{PLUS-MINUS SIGN} 6.355" in rows["a"]
    assert rows["b"].split()[2:6] == ["-"] * 4
    # Three prompts, all won: a sign test's 2 * 2^-3, and one pair is its own family.
    assert rows["a over b"].split() == [
        "a",
        "over",
        "b",
        "1.000",
        "\N{PLUS-MINUS SIGN}",
        "0.000",
        "0.2500",
        "0.2500",
        "3",
    ]
    assert "warning: budgets differ" in rows


def test_a_name_ends_before_the_first_slash():
    assert named_folders("runs/a") == ("", ["runs/a"])
    assert named_folders("wide=runs/a,runs/b") == ("wide", ["runs/a", "runs/b"])
    assert named_folders("runs/lr=3/a") == ("", ["runs/lr=3/a"])
