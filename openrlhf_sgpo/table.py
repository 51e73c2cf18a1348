"""The table at the end of a run: one row for the start and one per round."""

from __future__ import annotations

from typing import Any

FIGURES = (  # title, key, digits
    ("accuracy", "accuracy", 3),
    ("margin", "margin", 4),
    ("kl", "kl", 2),
    ("length", "response_length", 1),
    ("labels", "label_accuracy", 3),
    ("value", "value", 4),
)
STAGES = ("generate", "annotate", "follower", "train", "evaluate")


def results_table(rows: list[dict[str, Any]], stages: dict[str, dict[str, float]]) -> str:
    """rows: evaluation rows with ``name``, and what was measured of accuracy, margin, kl, response_length, label_accuracy and
    value; stages: the ledger's entries, from which the seconds of each stage are taken. Missing figures are a dash."""
    header = ["", *(title for title, _, _ in FIGURES), *STAGES]
    lines = [header]
    for row in rows:
        folder = "initial" if row["name"] == "start" else row["name"].replace(" ", "_")
        figures = [_figure(row.get(key), digits) for _, key, digits in FIGURES]
        seconds = [_figure(stages.get(f"{folder}/{stage}", {}).get("seconds"), 1) for stage in STAGES]
        lines.append([row["name"], *figures, *seconds])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    note = (
        "accuracy, margin: held-out pairs against the initial reference; kl: nats per sampled response, to the same\n"
        "length: tokens per response; labels: agreement of the oracle with human pairs of the round's prompts\n"
        "value: the follower's problem before the round's steps; the rest: seconds"
    )
    return "\n".join([*text, note]) + "\n"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
