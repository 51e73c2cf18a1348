"""The leaderboard of a folder: the rows of all its models, as JSON, CSV and a table per benchmark and judge."""

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


def write_result(result: Result, folder: Path) -> None:
    write_json(folder / RESULT, asdict(result))


def collect(out: Path) -> list[Result]:
    """The results of all models in the folder, by task and judge, the best first."""
    rows = [read_json(path) for path in sorted(out.glob(f"*/*/**/{RESULT}"))]
    known = {item.name for item in fields(Result)}
    results = [Result(**{name: value for name, value in row.items() if name in known}) for row in rows]

    def place(one: Result) -> tuple[Any, ...]:
        first = next(iter(one.figures.values()), None)
        return (
            one.task,
            judge_name(one.judge),
            -one.expected,
            -(first if first is not None else float("-inf")),
            one.model,
        )

    return sorted(results, key=place)


def judge_name(judge: Mapping[str, Any] | None) -> str:
    """The judge's model, and whether its written letters were read; empty for a task without a judge."""
    if not judge:
        return ""
    return str(judge["model"]) + (" letters" if judge.get("logprobs") is False else "")


def write_leaderboard(out: Path) -> str:
    """leaderboard.json, leaderboard.csv and table.txt in the folder; returns the table."""
    results = collect(out)
    write_json(out / "leaderboard.json", {"rows": [asdict(one) for one in results]})
    write_text(out / "leaderboard.csv", _csv(results))
    text = leaderboard_table(results)
    write_text(out / "table.txt", text)
    return text


def leaderboard_table(results: Sequence[Result]) -> str:
    """A block per benchmark, judge and number of items, so that scores that do not compare never share one."""
    blocks = []
    for (task, judge, _), rows in groupby(results, key=lambda one: (one.task, judge_name(one.judge), one.expected)):
        blocks.append(_block(task, judge, list(rows)))
    return "\n".join(blocks)


def _block(task: str, judge: str, rows: list[Result]) -> str:
    names = list(dict.fromkeys(name for one in rows for name in one.figures))
    lines = [["", *(name.replace("_", " ") for name in names), "n", "unread", "length"]]
    for one in rows:
        figures = [_figure(one, name) for name in names]
        lines.append(
            [one.model, *figures, f"{one.n}/{one.expected}", str(one.parse_failures), f"{one.average_length:.0f}"]
        )
    categories = list(dict.fromkeys(name for one in rows for name in one.categories))
    table = [["", *categories]] + [
        [one.model, *(f"{one.categories[name]:.2f}" if name in one.categories else "-" for name in categories)]
        for one in rows
    ]
    notes = list(dict.fromkeys(f"{one.model}: {note}" for one in rows for note in (_words(one.decoding), *one.notes)))
    title = f"{task}, judge {judge}" if judge else task
    parts = [title, "", *aligned(lines), *(["", *aligned(table)] if categories else []), "", f"{PLUS_MINUS}", *notes]
    return "\n".join(parts) + "\n"


def _words(decoding: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in decoding.items())


def _figure(one: Result, name: str) -> str:
    value = one.figures.get(name)
    return plus_minus(value, half_of_result(asdict(one), name), 2)


def _csv(results: Sequence[Result]) -> str:
    """A line per model, benchmark and figure; categories are figures too."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            *("task", "judge", "model", "figure", "value", "standard_error", "low", "high", "n", "expected"),
            *("parse_failures", "average_length", "decoding", "notes"),
        ]
    )
    for one in results:
        shared = [
            one.n,
            one.expected,
            one.parse_failures,
            one.average_length,
            _words(one.decoding),
            "; ".join(one.notes),
        ]
        for name, value in {**one.figures, **{f"category {key}": mean for key, mean in one.categories.items()}}.items():
            low, high = one.intervals.get(name, (None, None))
            figures = [name, value, one.errors.get(name), low, high]
            writer.writerow([one.task, judge_name(one.judge), one.model, *figures, *shared])
    return text.getvalue()
