"""Plots of a run: per round, per optimiser step, and the distribution of held-out margins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import ceil
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup

from openrlhf_sgpo.intervals import half_of
from openrlhf_sgpo.report.figures import Series, lines, plot, plots, whole_numbers
from openrlhf_sgpo.report.markup import words

MOST_POINTS = 1000
BINS = 40
# Title, note, key of the figure, value of a policy no better than the start, whether it is a share.
_ROUNDS: tuple[tuple[str, str, str, float | None, bool], ...] = (
    ("Accuracy", "share of held-out pairs with a positive margin", "accuracy", 0.5, True),
    ("Margin", "mean of the held-out pairs", "margin", 0.0, False),
    ("Response length", "tokens per fresh answer", "response_length", None, False),
    ("Divergence from the reference", "nats per fresh answer", "kl", None, False),
    ("Win rate over the start", "the oracle's mean preference", "win_rate", 0.5, True),
    ("Agreement with human labels", "the oracle's, on the round's prompts", "label_accuracy", 0.5, True),
)
_FOLLOWER = ("value", "empirical", "bound")
# Title, note, patterns of keys in metrics.jsonl.
_STEPS = (
    ("Loss", "mean over the step", ("train/loss",)),
    ("Margin", "mean over the step's pairs", ("train/rewards/margins",)),
    ("Accuracy", "share of the step's pairs with a positive margin", ("train/rewards/accuracies",)),
    ("Preference for the first answer", "mean over the step's plays", ("train/wins",)),
    ("Divergence from the reference", "mean log-ratio in nats per answer, by role", ("train/*/kl",)),
    ("Entropy", "nats per answer, by role", ("train/*/entropy",)),
    ("Length", "tokens per answer, by role", ("train/*/length",)),
    (
        "The follower, solved again",
        "worst (or best) case and loss without an attack",
        ("train/*/value", "train/*/empirical"),
    ),
    ("Gradient norm", "before clipping", ("train/grad_norm",)),
    ("Learning rate", "of the step", ("train/learning_rate",)),
)
_SHARES = ("Accuracy", "Preference for the first answer")


def round_plots(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """One plot per figure that any round has. rows: evaluation and certificate of each moment."""
    drawn = []
    for title, note, key, level, share in _ROUNDS:
        measured = [(name, row) for name, row in zip(names, rows, strict=True) if row.get(key) is not None]
        if measured:
            reach = [half_of(row, key) for _, row in measured]
            series = Series(title, [name for name, _ in measured], [row[key] for _, row in measured], reach, reach)
            note += ", with 95% intervals" if any(half is not None for half in reach) else ""
            drawn.append(plot(title, lines([series], "lines+markers", level=level, share=share), note))
    solved = [(name, row) for name, row in zip(names, rows, strict=True) if row.get("value") is not None]
    if solved:
        shown = [
            Series(words(key), [name for name, _ in solved], [row.get(key) for _, row in solved]) for key in _FOLLOWER
        ]
        note = "before the round's steps; empirical: without the follower, bound: the limit for any follower"
        drawn.append(plot("The follower's problem", lines(shown, "lines+markers"), note))
    return drawn


def step_plots(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """One plot per group of logged metrics, over all steps of the run. rows: of metrics.jsonl."""
    steps = list(_steps(rows))
    breaks = [
        step - 0.5
        for step, row, before in zip(steps[1:], rows[1:], rows, strict=False)
        if row["stage"] != before["stage"]
    ]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    drawn = []
    for title, note, patterns in _STEPS:
        shown = [key for key in keys if any(fnmatchcase(key, pattern) for pattern in patterns)]
        if not shown:
            continue
        series, block = [], 1
        for key in shown:
            points = [(step, row[key]) for step, row in zip(steps, rows, strict=True) if key in row]
            block = max(block, ceil(len(points) / MOST_POINTS))
            series.append(
                Series(key.removeprefix("train/"), thinned([x for x, _ in points]), thinned([y for _, y in points]))
            )
        if block > 1:
            note += f"; each point is the mean of {block} steps"
        figure = lines(series, x_title="step", breaks=breaks, share=title in _SHARES)
        drawn.append(plot(title, whole_numbers(figure, "x", steps), note, height=220))
    return [plots(*drawn)] if drawn else []


def _steps(rows: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Steps counted over the whole run. Rounds of pairs restart at 1, rounds of plays continue."""
    before = last = 0
    for row in rows:
        if row["step"] <= last:
            before += last
        last = row["step"]
        yield before + last


def thinned(values: Sequence[float]) -> list[float]:
    """Means of consecutive blocks of the smallest equal length that leaves at most 1,000; the last may be shorter."""
    block = ceil(len(values) / MOST_POINTS)
    return (
        [fmean(values[first : first + block]) for first in range(0, len(values), block)] if block > 1 else list(values)
    )


def held_out_plot(margins: Mapping[str, Sequence[float]]) -> list[Markup]:
    """Distribution of the held-out margins by round; all-zero margins, of a policy equal to the reference, are left out."""
    measured = {name: values for name, values in margins.items() if any(values)}
    if not measured:
        return []
    all_margins = [value for values in measured.values() for value in values]
    edges = np.linspace(min(all_margins), max(all_margins), BINS + 1)
    centres = ((edges[1:] + edges[:-1]) / 2).tolist()
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in measured.items()}
    series = [Series(name, centres, bin_counts) for name, bin_counts in counts.items()]
    figure = lines(series, x_title="margin")
    for curve in figure["data"]:
        curve["line"] = {"shape": "hvh"}
    figure["layout"]["yaxis"]["title"] = {"text": "pairs"}
    whole_numbers(figure, "y", [0, *map(max, counts.values())])
    return [plot("Margins of held-out pairs", figure, "after each round, against the initial reference", height=300)]
