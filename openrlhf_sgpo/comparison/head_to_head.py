"""Figures of a comparison: preferences between groups of runs, their intervals, and their costs. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from openrlhf_sgpo.comparison.compared_runs import BUDGET
from openrlhf_sgpo.intervals import TwoLevelMean, half_over_seeds, holm, standard_error, two_level_mean
from openrlhf_sgpo.table import PLUS_MINUS, aligned, plus_minus, plus_minus_rate

Row = dict[str, Any]

TOLERANCE = 0.05  # budgets that differ by less count as equal: the lengths of answers vary
_FIGURES = (("accuracy", 3), ("margin", 4), ("kl", 2), ("response_length", 1))
_NOTE = f"""{PLUS_MINUS}, over seeds or prompts; accuracy, margin: held-out pairs
kl: nats per fresh answer, to the initial reference
length: tokens per answer; over start: the oracle's mean preference over the answers of the model from which all runs started
costs of training, mean over seeds; tokens in thousands"""


def over_seeds(values: Sequence[float]) -> Row:
    """Mean over seeds and its standard error, None for one seed; both None where nothing was measured."""
    return {"mean": fmean(values) if values else None, "error": standard_error(values), "values": list(values)}


def cross_play(names: tuple[str, str], preferences: npt.ArrayLike) -> Row:
    """The first group against the second. preferences[i, j, p]: the preference for seed i's answer to prompt p in the first
    group over seed j's in the second, 1/2 for a tie. For interval and p-value see ``intervals.two_level_mean``."""
    values = np.asarray(preferences, dtype=np.float64)
    estimate = two_level_mean(values)
    return {
        "first": names[0],
        "second": names[1],
        **_win_rate(estimate),
        "degrees_of_freedom": estimate.degrees_of_freedom,
        "p_value": estimate.p_value(0.5),
        "comparisons": values.size,
    }


def with_holm(rows: Sequence[Row]) -> list[Row]:
    """The same rows with ``p_holm``, the p-value adjusted for all pairs of the comparison."""
    adjusted = holm([row["p_value"] for row in rows])
    return [row | {"p_holm": value} for row, value in zip(rows, adjusted, strict=True)]


def versus_start(name: str, preferences: npt.ArrayLike, divergences: npt.ArrayLike) -> Row:
    """A group against the model from which it started. preferences: shape (seeds, 1, prompts); divergences: in nats, shape
    (seeds, prompts). Errors are over seeds and prompts."""
    nats = two_level_mean(np.asarray(divergences, dtype=np.float64)[:, None, :])
    return {"name": name, **_win_rate(two_level_mean(preferences)), "kl": nats.mean, "kl_error": nats.error}


def _win_rate(estimate: TwoLevelMean) -> Row:
    low, high = estimate.interval()
    return {"win_rate": estimate.mean, "low": max(0.0, low), "high": min(1.0, high)}


def mean_ledger(ledgers: Sequence[Mapping[str, float]], trials: int) -> dict[str, float]:
    """Mean over the runs of a group."""
    return {name: fmean(ledger[name] for ledger in ledgers) for name in ledgers[0]} | {"trials": trials}


def budget_warnings(ledgers: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A warning for every budget that the groups, by name, did not spend equally within ``TOLERANCE``."""
    warnings = []
    for budget in (*BUDGET, "steps", "trials"):
        spent = {name: ledger[budget] for name, ledger in ledgers.items()}
        if max(spent.values()) > (1 + TOLERANCE) * min(spent.values()):
            listed = ", ".join(f"{name} {amount:g}" for name, amount in spent.items())
            warnings.append(f"the budgets of {budget.replace('_', ' ')} differ: {listed}")
    return warnings


def comparison_table(comparison: Row) -> str:
    """The text of table.txt: a line per group, a line per pair of groups, and the warnings."""
    over_start = {row["name"]: row for row in comparison["versus_start"]}
    header = ["", "seeds", "accuracy", "margin", "kl", "length", "over start", "samples", "judge calls"]
    lines = [[*header, "generated", "trained", "scored", "steps", "trials"]]
    for group in comparison["groups"]:
        ledger = group["ledger"]
        lines.append(
            [
                group["name"],
                str(len(group["runs"])),
                *(_cell(group["figures"][name], digits) for name, digits in _FIGURES),
                plus_minus_rate(over_start[group["name"]]),
                *(f"{ledger[name]:.0f}" for name in ("samples", "judge_calls")),
                *(f"{ledger[f'tokens_{name}'] / 1000:.1f}" for name in ("generated", "trained", "scored")),
                *(f"{ledger[name]:.0f}" for name in ("steps", "trials")),
            ]
        )
    pairs = [["", "preferred", "p", "p (Holm)", "comparisons"]]
    for row in comparison["cross_play"]:
        values = [f"{row[name]:.4f}" for name in ("p_value", "p_holm")]
        pairs.append([f"{row['first']} over {row['second']}", plus_minus_rate(row), *values, str(row["comparisons"])])
    judged = f"preferences of {comparison['oracle']['name']} on {comparison['prompts']} prompts"
    warnings = [f"warning: {text}" for text in comparison["warnings"]]
    return "\n".join([*aligned(lines), _NOTE, "", *aligned(pairs), judged, *warnings]) + "\n"


def _cell(value: Row, digits: int) -> str:
    return plus_minus(value["mean"], half_over_seeds(value), digits)
