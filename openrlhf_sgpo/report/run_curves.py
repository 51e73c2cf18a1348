"""Curves of a run: per round, per optimiser step, and the law of the held-out margins."""

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

MOST_POINTS = 1000
BINS = 40
# Title, note, key of the figure, the value of a policy that is no better than the start, and whether it is a share.
_ROUNDS: tuple[tuple[str, str, str, float | None, bool], ...] = (
    ("Accuracy", "share of held-out pairs with a positive margin", "accuracy", 0.5, True),
    ("Margin", "mean of the held-out pairs", "margin", 0.0, False),
    ("Response length", "tokens per fresh answer", "response_length", None, False),
    ("Divergence from the reference", "nats per fresh answer", "kl", None, False),
    ("Win rate over the start", "the oracle's mean preference", "win_rate", 0.5, True),
    ("Agreement with human labels", "of the oracle, on the round's prompts", "label_accuracy", 0.5, True),
)
_FOLLOWER = ("value", "empirical", "bound")
# Title, note, and patterns of the keys in metrics.jsonl.
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
    """A plot for each figure that some round has. rows: evaluation and certificate of each moment."""
    found = []
    for title, note, key, level, share in _ROUNDS:
        known = [(name, row) for name, row in zip(names, rows, strict=True) if row.get(key) is not None]
        if known:
            reach = [half_of(row, key) for _, row in known]
            series = Series(title, [name for name, _ in known], [row[key] for _, row in known], reach, reach)
            note += ", with 95% intervals" if any(one is not None for one in reach) else ""
            found.append(plot(title, lines([series], "lines+markers", level=level, share=share), note))
    solved = [(name, row) for name, row in zip(names, rows, strict=True) if row.get("value") is not None]
    if solved:
        shown = [
            Series(key.replace("_", " "), [name for name, _ in solved], [row.get(key) for _, row in solved])
            for key in _FOLLOWER
        ]
        note = "before the round's steps; empirical: without the follower, bound: what no follower can pass"
        found.append(plot("The follower's problem", lines(shown, "lines+markers"), note))
    return found


def step_plots(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """A plot for each group of metrics that the run logged, over all its steps. rows: of metrics.jsonl."""
    steps = list(_steps(rows))
    breaks = [
        step - 0.5
        for step, row, before in zip(steps[1:], rows[1:], rows, strict=False)
        if row["stage"] != before["stage"]
    ]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    found = []
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
        found.append(plot(title, whole_numbers(figure, "x", steps), note, height=220))
    return [plots(*found)] if found else []


def _steps(rows: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Steps counted over the whole run. Rounds of pairs count from 1 each, rounds of plays go on."""
    before = last = 0
    for row in rows:
        if row["step"] <= last:
            before += last
        last = row["step"]
        yield before + last


def thinned(values: Sequence[float]) -> list[float]:
    """Means of blocks of equal length (the last may be shorter), as few as leave at most 1,000 of them."""
    block = ceil(len(values) / MOST_POINTS)
    return (
        [fmean(values[first : first + block]) for first in range(0, len(values), block)] if block > 1 else list(values)
    )


def held_out_plot(margins: Mapping[str, Sequence[float]]) -> list[Markup]:
    """How the held-out margins are distributed, by round; a policy that equals the reference has none to show."""
    known = {name: values for name, values in margins.items() if any(values)}
    if not known:
        return []
    everything = [value for values in known.values() for value in values]
    edges = np.linspace(min(everything), max(everything), BINS + 1)
    centres = ((edges[1:] + edges[:-1]) / 2).tolist()
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in known.items()}
    series = [Series(name, centres, of_bins) for name, of_bins in counts.items()]
    figure = lines(series, x_title="margin")
    figure.update_traces(line_shape="hvh")
    figure.update_layout(yaxis_title="pairs")
    whole_numbers(figure, "y", [0, *map(max, counts.values())])
    return [plot("Margins of held-out pairs", figure, "after each round, against the initial reference", height=300)]
