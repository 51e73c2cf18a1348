"""The leaderboard of a folder: the results of all its models as JSON, CSV and a table per benchmark and judge."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from openrlhf_sgpo.benchmarks.task import Result
from openrlhf_sgpo.intervals import half_of_result
from openrlhf_sgpo.run_folder import read_json, write_json, write_text
from openrlhf_sgpo.table import PLUS_MINUS, aligned, plus_minus

RESULT = "result.json"


def collect(out: Path) -> list[Result]:
    """The results of all models in the folder, grouped by task and judge, best first."""
    rows = [read_json(path) for path in sorted(out.glob(f"*/*/**/{RESULT}"))]
    columns = {item.name for item in fields(Result)}
    results = [Result(**{name: value for name, value in row.items() if name in columns}) for row in rows]

    def place(result: Result) -> tuple[Any, ...]:
        first = next(iter(result.figures.values()), None)
        descending = -(first if first is not None else float("-inf"))
        return result.task, judge_name(result.judge), -result.expected, descending, result.model

    return sorted(results, key=place)


def judge_name(judge: Mapping[str, Any] | None) -> str:
    """The judge's model, with " letters" if its written letters were read; empty for a task without a judge."""
    if not judge:
        return ""
    return str(judge["model"]) + (" letters" if judge.get("logprobs") is False else "")


def write_leaderboard(out: Path) -> str:
    """Write leaderboard.json, leaderboard.csv and table.txt to the folder; returns the table."""
    results = collect(out)
    write_json(out / "leaderboard.json", {"rows": [asdict(result) for result in results]})
    write_text(out / "leaderboard.csv", _csv(results))
    text = leaderboard_table(results)
    write_text(out / "table.txt", text)
    return text


def leaderboard_table(results: Sequence[Result]) -> str:
    """One block per benchmark, judge and number of items, so only comparable scores share a block."""
    groups = groupby(results, key=lambda row: (row.task, judge_name(row.judge), row.expected))
    return "\n".join(_block(task, judge, list(rows)) for (task, judge, _), rows in groups)


def _block(task: str, judge: str, rows: list[Result]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    lines = [["", *(name.replace("_", " ") for name in names), "n", "unread", "length"]]
    for row in rows:
        figures = [plus_minus(row.figures.get(name), half_of_result(asdict(row), name), 2) for name in names]
        lines.append(
            [row.model, *figures, f"{row.n}/{row.expected}", str(row.parse_failures), f"{row.average_length:.0f}"]
        )
    categories = list(dict.fromkeys(name for row in rows for name in row.categories))
    table = [["", *categories]] + [
        [row.model, *(f"{row.categories[name]:.2f}" if name in row.categories else "-" for name in categories)]
        for row in rows
    ]
    notes = list(dict.fromkeys(f"{row.model}: {note}" for row in rows for note in (_words(row.decoding), *row.notes)))
    title = f"{task}, judge {judge}" if judge else task
    parts = [title, "", *aligned(lines), *(["", *aligned(table)] if categories else []), "", PLUS_MINUS, *notes]
    return "\n".join(parts) + "\n"


def _words(decoding: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in decoding.items())


def _csv(results: Sequence[Result]) -> str:
    """One line per model, benchmark and figure; categories count as figures."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            *("task", "judge", "model", "figure", "value", "standard_error", "low", "high", "n", "expected"),
            *("parse_failures", "average_length", "decoding", "notes"),
        ]
    )
    for row in results:
        counts = [row.n, row.expected, row.parse_failures, row.average_length]
        remarks = [_words(row.decoding), "; ".join(row.notes)]
        for name, value in {**row.figures, **{f"category {key}": mean for key, mean in row.categories.items()}}.items():
            low, high = row.intervals.get(name, (None, None))
            values = [name, value, row.errors.get(name), low, high]
            writer.writerow([row.task, judge_name(row.judge), row.model, *values, *counts, *remarks])
    return text.getvalue()
