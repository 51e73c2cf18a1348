"""Results as EvalScope's reports: ``evalscope service --outputs`` and EvalScope's tables show them beside its own.

The format is that of its report files, reports/MODEL/DATASET.json of a run, in their first version, which all versions read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openrlhf_sgpo.benchmarks.task import Result
from openrlhf_sgpo.run_folder import write_json

FOLDER = "evalscope"
SCORES = ("mt_bench",)  # whose figures are no percentages


def evalscope_report(result: Result) -> dict[str, Any]:
    """A result as a report. Percentages become shares, as in EvalScope; figures that are unavailable are left out."""
    scale = 1.0 if result.task in SCORES else 0.01
    values = {name: scale * value for name, value in result.figures.items() if value is not None}
    metrics = []
    for name, value in values.items():
        totals = {"num": result.n, "score": value, "macro_score": value}
        subset = {"name": "default", "score": value, "num": result.n}
        metrics.append({"name": name, **totals, "categories": [{"name": ["default"], **totals, "subsets": [subset]}]})
    return {
        "name": f"{result.model}@{result.task}",
        "dataset_name": result.task,
        "dataset_pretty_name": result.task,
        "dataset_description": "; ".join(result.notes),
        "model_name": result.model,
        "score": next(iter(values.values())),
        "metrics": metrics,
        "analysis": "N/A",
    }


def write_evalscope(out: Path, results: Iterable[tuple[str, Result]]) -> None:
    """Write the reports to the folder, as a run for each judge, whose results cannot be compared. results: with the names of
    their judges' folders."""
    for judge, result in results:
        if any(value is not None for value in result.figures.values()):
            path = out / FOLDER / judge / "reports" / result.model / f"{result.task}.json"
            write_json(path, evalscope_report(result))
