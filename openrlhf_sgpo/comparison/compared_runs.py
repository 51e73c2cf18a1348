"""The runs of a comparison: which folders are seeds of the same algorithm, what they cost, and where they differ.

Imports no torch.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from openrlhf_sgpo import flags
from openrlhf_sgpo.config import TrainSettings
from openrlhf_sgpo.inference import Policy, policy_of, stored_settings
from openrlhf_sgpo.ledger import read_ledger
from openrlhf_sgpo.run_check import check_rounds
from openrlhf_sgpo.run_folder import ADDRESS, STORED, RunFolder, differences, read_json, read_jsonl
from openrlhf_sgpo.training.sizes import optimiser_steps

START = "start"  # the name, in files, of the model from which all runs started
BUDGET = ("samples", "judge_calls", "tokens_generated", "tokens_trained", "tokens_scored")
# Settings in which seeds of the same algorithm may differ.
_FREE = ("train.seed", "ckpt.", "logger.", "vllm.", "resume", "dry_run", *ADDRESS)
_DATA = {
    "--data.dataset": "were trained on different human pairs",
    "--data.prompt_dataset": "were trained on different prompts",
    "--eval.dataset": "have different held-out pairs, so accuracy and margin cannot be compared",
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
        """The initial reference: the initial model where no other is set."""
        return _place(self.settings["ref"]["model_name_or_path"] or self.settings["model"]["model_name_or_path"])

    def digests(self) -> dict[str, str]:
        """A hash of each dataset, by flag."""
        return RunFolder(self.folder).data()

    def evaluation(self) -> dict[str, Any]:
        """The figures of the last round."""
        return read_json(RunFolder(self.folder).round(self.policy.round or 0) / "evaluation.json")

    def margins(self) -> dict[str, float]:
        """Margin of each held-out pair under the policy of the last round, by id; empty without such pairs."""
        path = RunFolder(self.folder).round(self.policy.round or 0) / "held_out.jsonl"
        return {row["id"]: row["margin"] for row in read_jsonl(path)} if path.is_file() else {}

    def ledger(self) -> dict[str, float]:
        """The cost of training without evaluation: the figures of ``BUDGET``, seconds and optimiser steps."""
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
    """Runs that differ in their seed. trials: how many tuning trials came before them."""

    name: str
    runs: list[ComparedRun]
    trials: int = 1


def named_folders(text: str) -> tuple[str, list[str]]:
    """Name and folders of an item of ``--runs``; a folder without a name has an empty one."""
    name, equals, folders = text.partition("=")
    return (name, folders.split(",")) if equals and "/" not in name else ("", [text])


def read_groups(texts: Sequence[str], trials: Sequence[str]) -> list[RunGroup]:
    """The runs of ``--runs``, FOLDER or NAME=FOLDER,FOLDER,..., by name in the given order. Folders without a name are
    grouped by algorithm. trials: NAME=K. Raises flags.SettingsError with every problem of names and folders."""
    problems: list[str] = []
    named: dict[str, list[ComparedRun]] = {}
    explicit: set[str] = set()
    for text in texts:
        name, folders = named_folders(text)
        if name in named or name == START or not re.fullmatch(r"[\w.-]*", name):
            problems.append(
                f"--runs {text}: give each group one name of letters, digits, '_', '.' and '-', other than {START!r}"
            )
        if name:
            explicit.add(name)
        for run in filter(None, (_read(folder, problems) for folder in folders)):
            named.setdefault(name or run.settings["algo"].rpartition(":")[2], []).append(run)
    for name, runs in named.items():
        problems += _not_seeds(name, runs, name in explicit)
    if len(named) < 2 and not problems:
        problems.append("--runs: a comparison needs runs of at least two algorithms or settings; name them NAME=FOLDER")
    problems += _not_comparable([run for runs in named.values() for run in runs]) + _trial_problems(trials, named)
    flags.refuse(problems)
    counts = {name: int(count) for name, _, count in (text.partition("=") for text in trials)}
    return [RunGroup(name, runs, counts.get(name, 1)) for name, runs in named.items()]


def group_warnings(groups: Sequence[RunGroup]) -> list[str]:
    """What makes a comparison of these groups unfair, except for their budgets."""
    warnings = []
    counts = {group.name: len(group.runs) for group in groups}
    if len(set(counts.values())) > 1:
        warnings.append(f"the numbers of seeds differ: {_listed(counts)}")
    for name in (name for name, count in counts.items() if count == 1):
        warnings.append(f"{name} has one seed: its intervals say nothing about other seeds")
    for group in groups:
        changed = sorted({key for run in group.runs for key in _changed(group.runs[0], run)})
        if changed:
            warnings.append(f"the runs of {group.name} differ in {', '.join(f'--{key}' for key in changed)}")
    runs = [run for group in groups for run in group.runs]
    digests = [run.digests() for run in runs]
    warnings += [f"the runs {what}" for flag, what in _DATA.items() if len({data.get(flag) for data in digests}) > 1]
    if len(sizes := {run.evaluation().get("pairs", 0) for run in runs}) > 1:
        numbers = ", ".join(map(str, sorted(sizes)))
        warnings.append(
            f"the runs were measured on different numbers of held-out pairs ({numbers}), so accuracy and margin cannot be "
            "compared"
        )
    betas = {group.name: group.runs[0].settings["model"]["beta"] for group in groups}
    if len(set(betas.values())) > 1:
        warnings.append(f"--model.beta, the unit of margins, differs: {_listed(betas)}")
    return warnings


def oracle_warnings(groups: Sequence[RunGroup], oracle: str, reward: str, judge: str) -> list[str]:
    """A warning if some groups, but not all, were trained with the oracle that compares them. reward, judge: the models in the
    oracle's settings of these names."""

    def shares_oracle(run: ComparedRun) -> bool:
        settings = run.settings
        models = settings["reward"]["model_name_or_path"], settings["judge"]["model"]
        # Without a model, implicit is the policy of each round, which differs between runs.
        return (settings["oracle"], *models) == (oracle, reward, judge) and (oracle != "implicit" or bool(reward))

    trained = [group.name for group in groups if shares_oracle(group.runs[0])]
    untrained = [group.name for group in groups if group.name not in trained]
    if not trained or not untrained:
        return []
    return [
        f"--oracle {oracle}, which compares them, also trained {', '.join(trained)}, but not {', '.join(untrained)}"
    ]


def _read(folder: str, problems: list[str]) -> ComparedRun | None:
    settings = stored_settings(folder)
    if settings is None:
        problems.append(f"--runs {folder!r} is not a run folder: it has no {STORED} of a run")
    elif not Path(folder, "table.txt").exists():
        problems.append(f"--runs {folder} is unfinished; finish it with train --resume")
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
    """Raises ValueError if the ledger lacks a finished stage, which would make the run look cheaper."""
    path = run.path / "ledger.json"
    costs = read_ledger(path)["stages"]
    for number in run.rounds():
        for stage in run.manifest(number)["stages"]:
            name = f"round_{number}/{'annotate' if number and stage == 'pairs' else stage}"
            if name not in costs and stage != "evaluate":
                raise ValueError(
                    f"{path} lacks the cost of {name}, so budgets cannot be compared; restore it from a copy, or train the run "
                    "again"
                )


def _place(model: str) -> str:
    """A folder as an absolute path, so its spelling does not matter; a hub name unchanged."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def _changed(first: ComparedRun, second: ComparedRun) -> list[str]:
    return [key for key in differences(first.settings, second.settings) if not key.startswith(_FREE)]


def _not_seeds(name: str, runs: Sequence[ComparedRun], explicit: bool) -> list[str]:
    """Why runs are not seeds of the same algorithm. Runs that the user grouped by a name may differ in settings."""
    problems = []
    for first, second in combinations(runs, 2):
        folders = f"{first.folder} and {second.folder}"
        if os.path.realpath(first.folder) == os.path.realpath(second.folder):
            problems.append(f"--runs: {first.folder} is given twice")
        elif not explicit and (changed := _changed(first, second)):
            listed = ", ".join(f"--{key}" for key in changed)
            problems.append(f"--runs: {folders} are both --algo {name}, but differ in {listed}; name them NAME=FOLDER")
        elif first.seed == second.seed:
            problems.append(f"--runs: {folders} of {name} have the same --train.seed {first.seed}")
    return problems


def _not_comparable(runs: Sequence[ComparedRun]) -> list[str]:
    """Which runs have another initial model or initial reference than the first run."""
    return [
        f"--runs: {what} of {run.folder} is {getattr(run, name)}, of {runs[0].folder} {getattr(runs[0], name)}; compare runs "
        "of one model"
        for name, what in (("initial", "the initial model"), ("reference", "the initial reference"))
        for run in runs[1:]
        if getattr(run, name) != getattr(runs[0], name)
    ]


def _trial_problems(trials: Sequence[str], groups: Collection[str]) -> list[str]:
    names = [text.partition("=")[0] for text in trials]
    return [
        f"--trials {text}: give NAME=K with a name of --runs ({', '.join(groups)}) and K of at least 1, each once"
        for index, (text, name) in enumerate(zip(trials, names, strict=True))
        if name not in groups or not re.fullmatch("[^=]*=0*[1-9][0-9]*", text) or name in names[:index]
    ]


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
