"""Settings of ``openrlhf-sgpo compare``, and what may be wrong with them. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openrlhf_sgpo import flags, oracle
from openrlhf_sgpo.comparison.compared_runs import RunGroup, named_folders, read_groups
from openrlhf_sgpo.config import Config, JudgeSettings, RewardSettings
from openrlhf_sgpo.data.files import is_file
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.inference import (
    Data,
    Deepspeed,
    Rollout,
    Train,
    Vllm,
    config_of,
    no_room,
    other_engine,
    other_oracle,
    set_fields,
    stored_settings,
    unread,
)
from openrlhf_sgpo.run_settings import sampling_problems

_INHERITED = ("data", "rollout", "vllm", "ds", "train")  # judges are chosen anew
_GROUPS = (*_INHERITED, "reward", "judge")


@dataclass
class CompareSettings:
    runs: list[str] = setting(
        [],
        "finished runs, FOLDER or NAME=FOLDER,FOLDER,...: those of one name are seeds of one algorithm (default name: --algo "
        "of the run); the flag may be left out where they come first",
    )
    suite: str = setting(
        "", "YAML file of algorithms and seeds that are trained first and then compared, in place of --runs"
    )
    trials: list[str] = setting([], "NAME=K: tuning trials that went before the runs of this name (default: 1 each)")
    out: str = setting("", "folder for answers, preferences and results")
    prompts: str = setting("", "prompts to answer: a file, or a hub name (default: the runs' held-out prompts)")
    split: str = setting("", "split of --prompts when it is a hub name (default: train, or train_prefs)")
    max_prompts: int = setting(0, "answer at most so many prompts (0: all)", low=0)
    oracle: str = setting("", "who compares answers: as in training, but implicit is always frozen")
    trust_remote_code: bool = setting(False, "run code that a model repository ships; off unless you have read it")
    beta: float = setting(0.1, "strength of the KL regularisation in the rewards of --oracle implicit", above=0)
    data: Any = field(default_factory=Data)
    rollout: Any = field(default_factory=Rollout)
    vllm: Any = field(default_factory=Vllm)
    ds: Any = field(default_factory=Deepspeed)
    train: Any = field(default_factory=Train)
    reward: RewardSettings = field(default_factory=RewardSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    resume: bool = setting(False, "continue in --out at the first unfinished stage")


def load(argv: Sequence[str]) -> tuple[CompareSettings, list[RunGroup]]:
    """The settings from command-line arguments, complete, and the runs that they name. How answers are drawn is by default as
    in the first run. Raises flags.SettingsError with every problem of settings, then of folders. Imports no torch."""
    runs = flags.parse(argv, {"": CompareSettings}).instances[""].runs
    first = named_folders(runs[0])[1][0] if runs else ""
    settings = read_settings(argv, stored_settings(first) or {})
    return settings, read_groups(settings.runs, settings.trials)


def read_settings(argv: Sequence[str], run: Mapping[str, Any]) -> CompareSettings:
    """The settings without a look at folders. run: resolved settings of one, from which defaults come.

    Raises flags.SettingsError with every problem at once."""

    def defaults() -> CompareSettings:
        settings = CompareSettings()
        for group in _INHERITED:
            set_fields(getattr(settings, group), run.get(group, {}))
        settings.trust_remote_code = run.get("model", {}).get("trust_remote_code", False)
        return settings

    instances, given, _ = flags.parse(argv, {"": defaults})
    settings: CompareSettings = instances[""]
    others, reads = other_oracle(settings)
    problems = _problems(settings) + unread(settings, defaults(), given, other_engine(settings) | others, reads)
    if problems:
        raise flags.SettingsError(*problems)
    return settings


def run_config(settings: CompareSettings, model: str, reference: str) -> Config:
    """The settings as a run has them, which engines and oracles read."""
    config = config_of(settings, _GROUPS, model)
    config.ref.model_name_or_path, config.model.beta, config.oracle = reference, settings.beta, settings.oracle
    return config


def _problems(settings: CompareSettings) -> list[str]:
    missing = {"runs": "finished runs", "out": "a folder for the results", "oracle": "who compares the answers"}
    problems = [f"--{name}: missing, give {what}" for name, what in missing.items() if not getattr(settings, name)]
    if settings.split and (not settings.prompts or is_file(settings.prompts)):
        problems.append(f"--split: --prompts {settings.prompts or 'is not given'} has no splits; leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("compare is one process: start it without a launcher, engines share GPUs by --vllm.num_engines")
    config = run_config(settings, "", "")
    problems += (
        no_room(settings) + flags.out_of_range({"": settings}, ("max_prompts", "beta")) + sampling_problems(config)
    )
    try:
        return problems + (oracle.get(settings.oracle).problems(config) if settings.oracle else [])
    except ValueError as error:
        return [*problems, f"--oracle: {error}"]
