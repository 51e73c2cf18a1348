"""The table at the end of a run: one row for the start and one per round."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import stdev
from typing import Any

FIGURES = (  # title, key, digits
    ("accuracy", "accuracy", 3),
    ("margin", "margin", 4),
    ("kl", "kl", 2),
    ("length", "response_length", 1),
    ("wins", "win_rate", 3),
    ("labels", "label_accuracy", 3),
    ("value", "value", 4),
)
STAGES = ("generate", "annotate", "oracle", "score", "follower", "log_probs", "train", "sync", "evaluate")


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns of cells with a rule under the header; the first column is flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [text[0], "  ".join("-" * width for width in widths), *text[1:]]


def results_table(rows: list[dict[str, Any]], stages: dict[str, dict[str, float]]) -> str:
    """rows: evaluation rows with ``name``, and what was measured of accuracy, margin, kl, response_length, label_accuracy and
    value; stages: the ledger's entries, from which the seconds of each stage are taken. Missing figures are a dash."""
    found = [_seconds(row["name"], stages) for row in rows]
    # Rounds of pairs and rounds of plays have different stages.
    shown = [stage for stage in STAGES if any(seconds.get(stage) is not None for seconds in found)]
    header = ["", *(title for title, _, _ in FIGURES), *shown]
    lines = [header]
    for row, seconds in zip(rows, found, strict=True):
        figures = [_figure(row.get(key), digits) for _, key, digits in FIGURES]
        lines.append([row["name"], *figures, *(_figure(seconds.get(stage), 1) for stage in shown)])
    text = aligned(lines)
    note = (
        "accuracy, margin: held-out pairs against the initial reference; kl: nats per sampled response, to the same\n"
        "length: tokens per response; wins: the oracle's mean preference for such a response over the start's\n"
        "labels: agreement of the oracle with human pairs of the round's prompts\n"
        "value: the follower's problem before the round's steps; the rest: seconds"
    )
    return "\n".join([*text, note]) + "\n"


def _seconds(name: str, stages: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """Seconds by stage, or by part of every step where a round consists of plays."""
    folder = "initial" if name == "start" else name.replace(" ", "_")
    parts = {key.removeprefix("seconds_"): value for key, value in stages.get(f"{folder}/play", {}).items()}
    return {
        **parts,
        **{stage: stages[key].get("seconds") for stage in STAGES if (key := f"{folder}/{stage}") in stages},
    }


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
