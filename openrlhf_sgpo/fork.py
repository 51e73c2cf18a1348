"""Reuses results of another run: runs that differ only in the leader's stage share the seed stage and first samples."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from openrlhf_sgpo import algorithms
from openrlhf_sgpo.algorithms.dpo import DPO
from openrlhf_sgpo.ledger import read_ledger, write_ledger
from openrlhf_sgpo.run_check import check_ended, check_metrics, check_round
from openrlhf_sgpo.run_folder import (
    ADDRESS,
    CARD,
    MANIFEST,
    METRICS,
    RunFolder,
    differences,
    read_configuration,
    read_growing,
    whole_folder,
    write_jsonl,
    write_sealed,
)

# Settings that may differ, because the seed stage and the first round's samples and labels do not depend on them.
_FREE = ("algo", "rounds.loss_reference", "train.max_epochs", "adam.lr", "ckpt.", "logger.", *ADDRESS, "train.layout")
_SHARED_STAGES = ("generate", "pairs")


def check_source(source: RunFolder, folder: RunFolder, resolved: dict[str, Any], data: dict[str, str]) -> None:
    """Checks that ``take_over`` can succeed, before the folder is created.

    Raises ValueError if the run does not exist, its seed stage is unfinished, or its settings or data differ.
    """
    if _is_done(folder):
        return
    flag = f"--ckpt.fork_from {source.path}"
    stored = source.path / "resolved_config.yaml"
    if not (stored.exists() and source.finished(0, "train") and source.finished(None, "evaluate")):
        raise ValueError(f"{flag} is not a run with a finished seed stage")
    _check_same(flag, read_configuration(stored), resolved)
    source_data = source.data()
    changed = [name for name, digest in data.items() if source_data.get(name, digest) != digest]
    if changed:
        raise ValueError(f"{flag}: {' and '.join(changed)} had another content in that run")
    check_ended(source)
    for number, stages in ((None, ()), (0, ()), (1, _SHARED_STAGES)):
        check_round(source, number, stages)
    check_metrics(source, [0])


def take_over(source: RunFolder, folder: RunFolder) -> None:
    """Copies the finished seed stage of ``source`` into ``folder``, and its first round up to the labels.

    Files that are already in the folder stay, so this can be repeated after a kill. Policies are hard links where the file
    system allows it; the ledger entries and metrics of these stages are copied too.
    """
    if _is_done(folder):
        return
    first = source.manifest(1)
    kept = {name: facts for name, facts in first["stages"].items() if name in _SHARED_STAGES}
    if "pairs" in kept and not folder.round(1).exists():
        with whole_folder(folder.round(1)) as partial:
            for name in ("prompts.jsonl", "responses.jsonl", "pairs.jsonl"):
                _link(source.round(1) / name, partial / name)
            write_sealed(partial / MANIFEST, first | {"stages": kept})
    # Scores are appended to, so they are copied. Those of later policies are dropped when these are trained.
    for name in ("log_probs", "rewards", "judgements"):
        if (source.path / name).exists() and not (folder.path / name).exists():
            with whole_folder(folder.path / name) as partial:
                shutil.copytree(source.path / name, partial, dirs_exist_ok=True)
    stages = read_ledger(source.path / "ledger.json")["stages"]
    prefixes = ("initial/", "round_0/", *(f"round_1/{name}" for name in ("generate", "annotate") if "pairs" in kept))
    shared = {name: cost for name, cost in stages.items() if name.startswith(prefixes)}
    write_ledger(folder.path / "ledger.json", shared)
    write_jsonl(
        folder.path / METRICS, (row for row in read_growing(source.path / METRICS) if row["stage"] == "round 0")
    )
    # The seed stage comes last: once it exists, the copy is complete, and a resumed run skips it.
    for name in ("initial", "round_0"):
        with whole_folder(folder.path / name) as partial:
            # A model card tells of the run that has written it.
            cards = shutil.ignore_patterns(CARD)
            shutil.copytree(source.path / name, partial, ignore=cards, copy_function=_link, dirs_exist_ok=True)


def _is_done(folder: RunFolder) -> bool:
    return folder.finished(0, "train") and folder.path.joinpath("initial").exists()


def _check_same(flag: str, source: dict[str, Any], resolved: dict[str, Any]) -> None:
    for name in (source["algo"], resolved["algo"]):
        algorithm = algorithms.get(name)
        if not (algorithm.needs.rounds or algorithm is DPO):
            raise ValueError(f"{flag}: the seed stage of --algo {name} has its own loss, so it cannot be shared")
    groups = {algorithms.get(name).name for name in (source["algo"], resolved["algo"])}
    changed = {
        key: values
        for key, values in differences(source, resolved).items()
        if key.partition(".")[0] not in groups and not key.startswith(_FREE)
    }
    if changed:
        listed = "\n  ".join(f"--{key}: {old!r} there, {new!r} here" for key, (old, new) in changed.items())
        raise ValueError(
            f"{flag} has other settings, which would give another seed stage or other samples:\n  {listed}"
        )


def _link(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system, or no support for links
        shutil.copy2(source, destination)
