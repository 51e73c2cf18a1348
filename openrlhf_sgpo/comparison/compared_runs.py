"""The runs of a comparison: which folders are seeds of one algorithm, what they cost, and where they are not alike.

Imports no torch.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from openrlhf_sgpo.config import TrainSettings
from openrlhf_sgpo.flags import SettingsError
from openrlhf_sgpo.inference import Policy, policy_of, stored_settings
from openrlhf_sgpo.ledger import read_ledger
from openrlhf_sgpo.run_check import check_rounds
from openrlhf_sgpo.run_folder import ADDRESS, STORED, RunFolder, differences, read_json
from openrlhf_sgpo.training.sizes import optimiser_steps

START = "start"  # how files call the model from which all runs started
BUDGET = ("samples", "judge_calls", "tokens_generated", "tokens_trained", "tokens_scored")
# In what runs may differ and still be seeds of one algorithm.
_FREE = ("train.seed", "ckpt.", "logger.", "vllm.", "resume", "dry_run", *ADDRESS)
_DATA = {
    "--data.dataset": "were trained on different human pairs",
    "--data.prompt_dataset": "were trained on different prompts",
    "--eval.dataset": "have different held-out pairs, so that accuracy and margin cannot be compared",
}


@dataclass(frozen=True)
class ComparedRun:
    """A finished run. settings: its resolved configuration."""

    folder: str
    settings: dict[str, Any]
    policy: Policy

    @property
    def seed(self) -> int:
        return self.settings["train"]["seed"]

    @property
    def initial(self) -> str:
        return _place(self.settings["model"]["model_name_or_path"])

    @property
    def reference(self) -> str:
        """The initial model for algorithms that have no reference."""
        return _place(self.settings["ref"]["model_name_or_path"] or self.settings["model"]["model_name_or_path"])

    def digests(self) -> dict[str, str]:
        """A hash of each data set, by flag."""
        return RunFolder(self.folder).data()

    def evaluation(self) -> dict[str, Any]:
        """The figures of the last round."""
        return read_json(RunFolder(self.folder).round(self.policy.round or 0) / "evaluation.json")

    def ledger(self) -> dict[str, float]:
        """What training cost, evaluation between rounds left out: ``BUDGET``, seconds and optimiser steps."""
        stages = read_ledger(Path(self.folder, "ledger.json"))["stages"]
        costs = [cost for name, cost in stages.items() if not name.endswith("/evaluate")]
        return {name: sum(cost.get(name, 0) for cost in costs) for name in (*BUDGET, "seconds")} | {
            "steps": self._steps()
        }

    def _steps(self) -> int:
        stored, folder, steps = self.settings["train"], RunFolder(self.folder), 0
        train = TrainSettings(**{item.name: stored[item.name] for item in fields(TrainSettings) if item.name in stored})
        for number in range((self.policy.round or 0) + 1):
            stages = folder.manifest(number)["stages"]
            if "play" in stages:
                steps += stages["play"]["steps"]
            elif "train" in stages:
                trained = stages["train"]
                steps += optimiser_steps(trained["pairs"], trained["epochs"], train, trained["ranks"])
        return steps


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seed. trials: tuning trials that went before."""

    name: str
    runs: list[ComparedRun]
    trials: int = 1


def named_folders(text: str) -> tuple[str, list[str]]:
    """Name and folders of an item of ``--runs``; the name is empty if it is one folder without a name."""
    name, equals, folders = text.partition("=")
    return (name, folders.split(",")) if equals and "/" not in name else ("", [text])


def read_groups(texts: Sequence[str], trials: Sequence[str]) -> list[RunGroup]:
    """The runs of ``--runs``, FOLDER or NAME=FOLDER,FOLDER,..., by name in the given order. Folders without a name are
    grouped by algorithm. trials: NAME=K. Raises SettingsError with all that is wrong with names and folders."""
    problems: list[str] = []
    named: dict[str, list[ComparedRun]] = {}
    explicit: set[str] = set()
    for text in texts:
        name, folders = named_folders(text)
        if name in named or name == START or not re.fullmatch(r"[\w.-]*", name):
            problems.append(
                f"--runs {text}: give each group one name of letters, digits, '_', '.' and '-', which is not {START!r}"
            )
        if name:
            explicit.add(name)
        for run in filter(None, (_read(folder, problems) for folder in folders)):
            named.setdefault(name or run.settings["algo"].rpartition(":")[2], []).append(run)
    for name, runs in named.items():
        problems += _not_seeds(name, runs, name in explicit)
    found = [run for runs in named.values() for run in runs]
    if len(named) < 2 and not problems:
        problems.append("--runs: a comparison needs runs of at least two algorithms or settings; name them NAME=FOLDER")
    problems += _not_comparable(found) + _trial_problems(trials, named)
    if problems:
        raise SettingsError(*problems)
    counts = {name: int(count) for name, _, count in (text.partition("=") for text in trials)}
    return [RunGroup(name, runs, counts.get(name, 1)) for name, runs in named.items()]


def group_warnings(groups: Sequence[RunGroup]) -> list[str]:
    """What keeps a comparison of these groups from being a fair one, but for their budgets."""
    warnings = []
    counts = {group.name: len(group.runs) for group in groups}
    if len(set(counts.values())) > 1:
        warnings.append(f"the numbers of seeds differ: {_listed(counts)}")
    for name in (name for name, count in counts.items() if count == 1):
        warnings.append(f"{name} has one seed: intervals say nothing of what another seed would give")
    for group in groups:
        changed = sorted({key for run in group.runs for key in _changed(group.runs[0], run)})
        if changed:
            warnings.append(f"the runs of {group.name} differ in {', '.join(f'--{key}' for key in changed)}")
    runs = [run for group in groups for run in group.runs]
    digests = [run.digests() for run in runs]
    warnings += [f"the runs {what}" for name, what in _DATA.items() if len({one.get(name) for one in digests}) > 1]
    if len(sizes := {run.evaluation().get("pairs", 0) for run in runs}) > 1:
        numbers = ", ".join(map(str, sorted(sizes)))
        warnings.append(
            f"the runs were measured on different numbers of held-out pairs ({numbers}), so that accuracy and margin cannot be "
            "compared"
        )
    betas = {group.name: group.runs[0].settings["model"]["beta"] for group in groups}
    if len(set(betas.values())) > 1:
        warnings.append(f"--model.beta, the unit of margins, differs: {_listed(betas)}")
    return warnings


def oracle_warnings(groups: Sequence[RunGroup], oracle: str, reward: str, judge: str) -> list[str]:
    """Whether the oracle that compares has trained some of them. reward, judge: the models of these groups of its settings."""

    def taught(run: ComparedRun) -> bool:
        theirs = run.settings
        models = theirs["reward"]["model_name_or_path"], theirs["judge"]["model"]
        # Without a model, implicit is each round's own policy.
        return (theirs["oracle"], *models) == (oracle, reward, judge) and (oracle != "implicit" or bool(reward))

    pupils = [group.name for group in groups if taught(group.runs[0])]
    others = [group.name for group in groups if group.name not in pupils]
    if not pupils or not others:
        return []
    return [f"--oracle {oracle}, which compares them, also trained {', '.join(pupils)}, but not {', '.join(others)}"]


def _read(folder: str, problems: list[str]) -> ComparedRun | None:
    settings = stored_settings(folder)
    if settings is None:
        problems.append(f"--runs {folder!r} is no run folder: there is no {STORED} of a run in it")
    elif not Path(folder, "table.txt").exists():
        problems.append(f"--runs {folder} is a run that is not finished; finish it with train --resume")
    else:
        try:
            run = RunFolder(folder)
            check_rounds(run)
            _check_costs(run)
            return ComparedRun(folder, settings, policy_of(folder, None, "runs"))
        except ValueError as error:
            problems.append(f"--runs {folder}: {error}")
    return None


def _check_costs(run: RunFolder) -> None:
    """Raises ValueError if the ledger lacks a finished stage: who lost it would seem to have cost less."""
    path = run.path / "ledger.json"
    known = read_ledger(path)["stages"]
    for number in run.rounds():
        for stage in run.manifest(number)["stages"]:
            name = f"round_{number}/{'annotate' if number and stage == 'pairs' else stage}"
            if name not in known and stage != "evaluate":
                raise ValueError(
                    f"{path} does not know what {name} cost, so that budgets cannot be compared; restore it from a copy, or "
                    "train the run again"
                )


def _place(model: str) -> str:
    """A folder's absolute path, so that it is equal however it was written; a hub name as it is."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def _changed(one: ComparedRun, other: ComparedRun) -> list[str]:
    return [key for key in differences(one.settings, other.settings) if not key.startswith(_FREE)]


def _not_seeds(name: str, runs: Sequence[ComparedRun], explicit: bool) -> list[str]:
    """Why runs are not seeds of the same algorithm. Those that were given one name may have other settings."""
    problems = []
    for one, other in combinations(runs, 2):
        if os.path.realpath(one.folder) == os.path.realpath(other.folder):
            problems.append(f"--runs: {one.folder} is given twice")
        elif not explicit and (changed := _changed(one, other)):
            problems.append(
                f"--runs: {one.folder} and {other.folder} are both of --algo {name}, but differ in "
                f"{', '.join(f'--{key}' for key in changed)}; name them NAME=FOLDER"
            )
        elif one.seed == other.seed:
            problems.append(f"--runs: {one.folder} and {other.folder} of {name} have the same --train.seed {one.seed}")
    return problems


def _not_comparable(runs: Sequence[ComparedRun]) -> list[str]:
    """Which runs start from another model than the first one, or measure divergences from another one."""
    return [
        f"--runs: {what} of {one.folder} is {getattr(one, name)}, of {runs[0].folder} {getattr(runs[0], name)}; compare runs "
        "of one model"
        for name, what in (("initial", "the initial model"), ("reference", "the initial reference"))
        for one in runs[1:]
        if getattr(one, name) != getattr(runs[0], name)
    ]


def _trial_problems(trials: Sequence[str], names: Any) -> list[str]:
    given = [text.partition("=") for text in trials]
    return [
        f"--trials {name}{equals}{count}: give NAME=K with a name of --runs ({', '.join(names)}) and K of at least 1, each once"
        for place, (name, equals, count) in enumerate(given)
        if name not in names or not re.fullmatch("0*[1-9][0-9]*", count) or name in [one for one, _, _ in given[:place]]
    ]


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
