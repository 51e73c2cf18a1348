"""The leaderboard of a folder: the results of all its models as JSON, CSV and a table per benchmark and judge."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from openrlhf_sgpo.benchmarks.evalscope import write_evalscope
from openrlhf_sgpo.benchmarks.task import Result
from openrlhf_sgpo.intervals import half_of_result, kendall, spearman
from openrlhf_sgpo.run_folder import read_json, write_json, write_text
from openrlhf_sgpo.table import ANCHOR, PLUS_MINUS, agreement_words, aligned, plus_minus

RESULT = "result.json"


def collect(out: Path) -> list[Result]:
    """The results of all models in the folder, grouped by task and judge, best first."""
    results = list(_stored(out).values())

    def place(result: Result) -> tuple[Any, ...]:
        first = next(iter(result.figures.values()), None)
        descending = -(first if first is not None else float("-inf"))
        return result.task, judge_name(result.judge), -result.expected, descending, result.model

    return sorted(results, key=place)


def pools(out: Path, task: str) -> list[dict[Path, Result]]:
    """The results of a task by their folders, in groups that can be compared."""
    groups: dict[Any, dict[Path, Result]] = {}
    for path, result in _stored(out).items():
        if result.task == task:
            groups.setdefault((judge_name(result.judge), result.expected), {})[path.parent] = result
    return list(groups.values())


def _stored(out: Path) -> dict[Path, Result]:
    columns = {item.name for item in fields(Result)}
    return {
        path: Result(**{name: value for name, value in read_json(path).items() if name in columns})
        for path in sorted(out.glob(f"*/*/**/{RESULT}"))
    }


def judge_name(judge: Mapping[str, Any] | None) -> str:
    """The judge's model, with " letters" if its written letters were read; empty for a task without a judge."""
    if not judge:
        return ""
    return str(judge["model"]) + (" letters" if judge.get("logprobs") is False else "")


def judge_folder(judge: Mapping[str, Any] | None) -> str:
    """The judge's name as a folder's; empty for a task without a judge."""
    return re.sub(r"[^\w.+-]+", "_", judge_name(judge).strip("/"))


def write_leaderboard(out: Path) -> str:
    """Write leaderboard.json, leaderboard.csv, table.txt and EvalScope's reports to the folder; returns the table."""
    results = collect(out)
    agreements = [entry for _, rows in _groups(results) for entry in anchor_correlations(list(rows))]
    write_json(out / "leaderboard.json", {"rows": [asdict(result) for result in results], "agreement": agreements})
    write_text(out / "leaderboard.csv", _csv(results))
    write_evalscope(out, ((judge_folder(result.judge) or "without_judge", result) for result in results))
    text = leaderboard_table(results)
    write_text(out / "table.txt", text)
    return text


def leaderboard_table(results: Sequence[Result]) -> str:
    """One block per benchmark, judge and number of items, so only comparable scores share a block."""
    return "\n".join(_block(task, judge, list(rows)) for (task, judge, _), rows in _groups(results))


def _groups(results: Sequence[Result]) -> Iterable[tuple[tuple[str, str, int], Iterable[Result]]]:
    """Adjacent results that can be compared."""
    return groupby(results, key=lambda row: (row.task, judge_name(row.judge), row.expected))


def anchor_correlations(rows: Sequence[Result]) -> list[dict[str, Any]]:
    """How far a judge orders the anchors as the published leaderboard does: rank correlations, by figure. rows: comparable
    results, of which the anchors count."""
    entries = []
    for name in dict.fromkeys(name for row in rows for name in row.published):
        pairs = [
            (value, row.published[name])
            for row in rows
            if name in row.published and (value := row.figures.get(name)) is not None
        ]
        judged, published = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        rho, tau = spearman(judged, published), kendall(judged, published)
        if rho and tau:
            entries.append(
                {
                    "task": rows[0].task,
                    "judge": rows[0].judge,
                    "figure": name,
                    "anchors": len(pairs),
                    "spearman": rho._asdict(),
                    "kendall": tau._asdict(),
                }
            )
    return entries


def _block(task: str, judge: str, rows: list[Result]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    published = [
        name for name in names if any(name in row.published and row.figures.get(name) is not None for row in rows)
    ]
    lines = [["", *map(_title, names), *(f"published {_title(name)}" for name in published), "n", "unread", "length"]]
    for row in rows:
        figures = [plus_minus(row.figures.get(name), half_of_result(asdict(row), name), 2) for name in names]
        figures += [plus_minus(row.published.get(name), None, 2) for name in published]
        lines.append(
            [
                *(row.model + ANCHOR * bool(row.published), *figures),
                *(f"{row.n}/{row.expected}", str(row.parse_failures), f"{row.average_length:.0f}"),
            ]
        )
    categories = list(dict.fromkeys(name for row in rows for name in row.categories))
    table = [["", *categories]] + [
        [row.model, *(f"{row.categories[name]:.2f}" if name in row.categories else "-" for name in categories)]
        for row in rows
    ]
    noted: dict[str, list[str]] = {}
    for row in rows:
        for note in (_words(row.decoding), *row.notes):
            noted.setdefault(note, []).append(row.model)
    notes = [
        f"{'all models' if len(models) == len(rows) > 1 else ', '.join(models)}: {note}"
        for note, models in noted.items()
    ]
    trust = [agreement_words(entry) for entry in anchor_correlations(rows)]
    title = f"{task}, judge {judge}" if judge else task
    parts = [title, "", *aligned(lines), *(["", *aligned(table)] if categories else []), "", PLUS_MINUS, *trust, *notes]
    return "\n".join(parts) + "\n"


def _title(name: str) -> str:
    return name.replace("_", " ")


def _words(decoding: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in decoding.items())


def _csv(results: Sequence[Result]) -> str:
    """One line per model, benchmark and figure; categories count as figures."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            *("task", "judge", "model", "figure", "value", "standard_error", "low", "high", "n", "expected"),
            *("parse_failures", "average_length", "published", "decoding", "notes"),
        ]
    )
    for row in results:
        counts = [row.n, row.expected, row.parse_failures, row.average_length]
        remarks = [_words(row.decoding), "; ".join(row.notes)]
        for name, value in {**row.figures, **{f"category {key}": mean for key, mean in row.categories.items()}}.items():
            low, high = row.intervals.get(name, (None, None))
            values = [name, value, row.errors.get(name), low, high]
            published = row.published.get(name)
            writer.writerow([row.task, judge_name(row.judge), row.model, *values, *counts, published, *remarks])
    return text.getvalue()
