"""Checks that a run folder still holds what its stages wrote, by the digests in the manifests, before it is used.

Every error names the file and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from openrlhf_sgpo.integrity import SEAL, check_digest, check_file, hash_of
from openrlhf_sgpo.run_folder import MANIFEST, METRICS, STORED, TABLE, RunFolder, read_configuration, read_growing


def check_round(run: RunFolder, number: int | None, stages: Sequence[str] = (), policy: bool = True) -> None:
    """Raises ValueError, naming file and remedy, if results of finished stages are missing or changed.

    stages: check only these. policy: False allows folders of weights to be missing, because they may have been deleted to
    save space; those that exist must be intact.
    """
    path = run.round(number)
    for name, facts in run.manifest(number)["stages"].items():
        for file, expected in facts.get("files", {}).items() if not stages or name in stages else ():
            folder, slash, _ = file.partition("/")
            if policy or not slash or (path / folder).is_dir():
                check_file(path / file, expected, run.remedy(number))


def check_rounds(run: RunFolder, policies: int = 1) -> None:
    """``check_round`` for the start and all rounds, which must be consecutive, and a check of their metrics.

    policies: for how many rounds before the next one the weights must exist.
    """
    check_round(run, None)
    begun = [number for number in run.rounds() if run.manifest(number)["stages"]]
    if not begun:
        return
    last = begun[-1]
    following = last + run.finished(last, "evaluate")
    for number in range(1 if run.finished(last, "play") else 0, last + 1):
        if number < last and not run.finished(number, "evaluate"):
            raise ValueError(
                f"{run.round(number)} is missing or has lost its {MANIFEST}, but round {last} has begun; "
                f"{run.remedy(number)}"
            )
        check_round(run, number, policy=number >= following - policies)
    check_metrics(run, begun)


def check_ended(run: RunFolder) -> None:
    """Raises ValueError if the table of results exists, but some of the results do not."""
    if not (run.path / TABLE).exists():
        return
    plays = run.finished(1, "play")
    for number in (None, *range(1 if plays else 0, 1 + read_configuration(run.path / STORED)["rounds"]["count"])):
        if not run.finished(number, "evaluate"):
            path = run.round(number) / MANIFEST
            raise ValueError(f"{path} is missing or not finished, although the run has ended; {run.remedy(number)}")


def metrics_digest(run: RunFolder, number: int) -> dict[str, Any]:
    """The digest of a round's rows in metrics.jsonl."""
    path = run.path / METRICS
    rows = [row for row in read_growing(path) if row.get("stage") == f"round {number}"]
    return {"rows": len(rows), SEAL: hash_of(json.dumps(row, sort_keys=True).encode() for row in rows)}


def check_metrics(run: RunFolder, numbers: Iterable[int]) -> None:
    """Raises ValueError if metrics.jsonl exists and rows of finished stages were changed."""
    path = run.path / METRICS
    remedy = "restore it from a copy, or delete it: only the curves of finished stages are then lost"
    for number in numbers if path.exists() else ():
        for facts in run.manifest(number)["stages"].values():
            if "metrics" in facts:
                check_digest(f"{path}, round {number}", metrics_digest(run, number), facts["metrics"], remedy)


def forget_metrics(run: RunFolder) -> bool:
    """If metrics.jsonl is gone, stops expecting rows of finished stages; returns whether any were expected."""
    lost = False
    for number in [] if (run.path / METRICS).exists() else run.rounds():
        for stage, facts in run.manifest(number)["stages"].items():
            if facts.pop("metrics", None):
                lost = True
                run.record(number, stage, facts)
    return lost
