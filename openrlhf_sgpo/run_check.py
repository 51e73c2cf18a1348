"""Whether a run folder still holds what its stages wrote: compared with the digests in the manifests, before it is used.

Every error names the file and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from openrlhf_sgpo.integrity import SEAL, check_digest, check_file, hash_of
from openrlhf_sgpo.run_folder import MANIFEST, METRICS, STORED, TABLE, RunFolder, read_configuration, read_growing


def check_round(run: RunFolder, number: int | None, stages: Sequence[str] = (), policy: bool = True) -> None:
    """Raises ValueError, naming file and remedy, unless what the finished stages left is as it was written.

    stages: only these. policy: False allows that the weights are not there at all, which may have been deleted to make
    room; a folder of weights that is there must be whole.
    """
    path = run.round(number)
    for name, facts in run.manifest(number)["stages"].items():
        for file, expected in facts.get("files", {}).items() if not stages or name in stages else ():
            folder, slash, _ = file.partition("/")
            if policy or not slash or (path / folder).is_dir():
                check_file(path / file, expected, run.remedy(number))


def check_rounds(run: RunFolder, policies: int = 1) -> None:
    """``check_round`` of the start and of all rounds, which follow one another without a gap, and of their metrics.

    policies: of how many rounds before the one that is to be worked on the weights must be there.
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
    """Raises ValueError if there is a table of results, but not all that it was made of."""
    if not (run.path / TABLE).exists():
        return
    plays = run.finished(1, "play")
    for number in (None, *range(1 if plays else 0, 1 + read_configuration(run.path / STORED)["rounds"]["count"])):
        if not run.finished(number, "evaluate"):
            path = run.round(number) / MANIFEST
            raise ValueError(f"{path} is missing or not finished, although the run has ended; {run.remedy(number)}")


def metrics_digest(run: RunFolder, number: int) -> dict[str, Any]:
    """Of the rows of metrics.jsonl that belong to a round."""
    path = run.path / METRICS
    rows = [row for row in read_growing(path) if row.get("stage") == f"round {number}"]
    return {"rows": len(rows), SEAL: hash_of(json.dumps(row, sort_keys=True).encode() for row in rows)}


def check_metrics(run: RunFolder, numbers: Iterable[int]) -> None:
    """Raises ValueError if metrics.jsonl is there and rows of finished stages are not what was written."""
    path = run.path / METRICS
    remedy = "restore it from a copy, or delete it: the curves of finished stages are then lost, and nothing else"
    for number in numbers if path.exists() else ():
        for facts in run.manifest(number)["stages"].values():
            if "metrics" in facts:
                found = metrics_digest(run, number)
                check_digest(f"{path}, round {number}", found, facts["metrics"], remedy)


def forget_metrics(run: RunFolder) -> bool:
    """Where metrics.jsonl is gone, expect no rows of the finished stages; returns whether there were such stages."""
    lost = False
    for number in [] if (run.path / METRICS).exists() else run.rounds():
        for stage, facts in run.manifest(number)["stages"].items():
            if facts.pop("metrics", None):
                lost = True
                run.record(number, stage, facts)
    return lost
