"""The start and the rounds of a run as its files tell them, and the verdict on them. Needs no plotly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_sgpo.report.verdict import run_verdict
from openrlhf_sgpo.run_check import check_ended, check_metrics, check_round
from openrlhf_sgpo.run_folder import CERTIFICATE, RunFolder, read_json, read_jsonl


@dataclass(frozen=True)
class Moment:
    """The policy at the start or after a round. row: its evaluation, as in the table at the end of a run. certificate: the
    round's follower, empty if there is none. margins: of held-out pairs, by id. samples: held-out answers."""

    name: str
    row: dict[str, Any]
    certificate: dict[str, Any]
    margins: dict[str, float]
    samples: list[dict[str, Any]]


def read_moments(folder: Path) -> list[Moment]:
    """The start and the rounds so far, in order. Raises ValueError, naming the file, if a file of a finished stage has
    changed."""
    run = RunFolder(str(folder))
    check_ended(run)
    check_metrics(run, run.rounds())
    return [_moment(run, number) for number in (None, *run.rounds()) if run.round(number).is_dir()]


def moments_so_far(folder: Path, finished: dict[int | None, Moment]) -> list[Moment]:
    """The same of a run that goes on, of which no file can have changed since ``finished``: those read so far whose round has
    ended, by number. Further ones are added."""
    run = RunFolder(str(folder))
    moments = []
    for number in (None, *run.rounds()):
        if not run.round(number).is_dir():
            continue
        moment = finished.get(number) or _moment(run, number)
        if run.finished(number, "evaluate"):
            finished[number] = moment
        moments.append(moment)
    return moments


def _moment(run: RunFolder, number: int | None) -> Moment:
    check_round(run, number, policy=False)
    path, stages = run.round(number), run.manifest(number)["stages"]
    written = {file for facts in stages.values() for file in facts.get("files", {})}

    def read(file: str) -> dict[str, Any]:
        return read_json(path / file) if file in written else {}

    def rows(file: str) -> list[dict[str, Any]]:
        return read_jsonl(path / file) if file in written else []

    certificate = read(CERTIFICATE)
    labels = stages.get("pairs", {}).get("label_accuracy")
    row = read("evaluation.json") | {"value": certificate.get("value"), "label_accuracy": labels}
    margins = {row["id"]: row["margin"] for row in rows("held_out.jsonl")}
    name = "start" if number is None else f"round {number}"
    return Moment(name, row, certificate, margins, rows("samples.jsonl"))


def verdict(moments: Sequence[Moment]) -> list[str]:
    """What the figures of a run say, in sentences."""
    return run_verdict(
        [moment.name for moment in moments],
        [moment.margins for moment in moments],
        [moment.row for moment in moments],
    )
