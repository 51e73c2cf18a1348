"""Settings of ``openrlhf-sgpo compare`` and their checks. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openrlhf_sgpo import flags, oracle
from openrlhf_sgpo.comparison.compared_runs import RunGroup, named_folders, read_groups
from openrlhf_sgpo.config import Inference, ModelSettings, RefSettings
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.inference import JudgedSettings, no_splits, other_oracle, stored_settings, unread


@dataclass
class CompareSettings(JudgedSettings):
    runs: list[str] = setting(
        [],
        "finished runs, FOLDER or NAME=FOLDER,FOLDER,...: runs of the same name are seeds of the same algorithm (default name: "
        "--algo of the run); the flag itself may be omitted if the runs come first",
    )
    suite: str = setting("", "YAML file of algorithms and seeds to train first and then compare, in place of --runs")
    trials: list[str] = setting([], "NAME=K: tuning trials before the runs of this name (default: 1 each)")
    out: str = setting("", "folder for answers, preferences and results")
    prompts: str = setting("", "prompts to answer: a file, or a hub name (default: the runs' held-out prompts)")
    split: str = setting("", "split of --prompts if it is a hub name (default: train, or train_prefs)")
    max_prompts: int = setting(0, "largest number of prompts to answer (0: all)", low=0)
    oracle: str = setting("", "the oracle that compares answers: as in training, but implicit is always frozen")
    trust_remote_code: bool = setting(False, "run code that a model repository ships; off unless you have read it")
    beta: float = setting(0.1, "strength of the KL regularisation in the rewards of --oracle implicit", above=0)
    resume: bool = setting(False, "continue in --out at the first unfinished stage")


def load(argv: Sequence[str]) -> tuple[CompareSettings, list[RunGroup]]:
    """The complete settings from command-line arguments, and the runs that they name. By default answers are sampled as in the
    first run. Raises flags.SettingsError with every problem of settings, then of folders. Imports no torch."""
    runs = flags.parse(argv, {"": CompareSettings}).instances[""].runs
    first = named_folders(runs[0])[1][0] if runs else ""
    settings = read_settings(argv, stored_settings(first) or {})
    return settings, read_groups(settings.runs, settings.trials)


def read_settings(argv: Sequence[str], run: Mapping[str, Any]) -> CompareSettings:
    """The settings, without reading folders. run: resolved settings of a run, for the defaults.

    Raises flags.SettingsError with every problem at once."""

    def defaults() -> CompareSettings:
        settings = CompareSettings()
        settings.inherit(run)
        settings.trust_remote_code = run.get("model", {}).get("trust_remote_code", False)
        return settings

    instances, origins, _ = flags.parse(argv, {"": defaults})
    settings: CompareSettings = instances[""]
    reasons, reads = other_oracle(settings.oracle)
    reasons = settings.other_engine() | reasons
    flags.refuse(_problems(settings) + unread(settings, defaults(), origins, reasons, reads))
    return settings


def inference(settings: CompareSettings, policy: str, reference: str) -> Inference:
    """The settings as engines and oracles read them. policy, reference: initial policy and initial reference of the runs."""
    model = ModelSettings(policy, settings.beta, trust_remote_code=settings.trust_remote_code)
    return replace(settings.inference(model), ref=RefSettings(reference))


def _problems(settings: CompareSettings) -> list[str]:
    problems = settings.problems(
        "compare", runs="finished runs", out="a folder for the results", oracle="the oracle that compares answers"
    )
    problems += no_splits(settings.prompts, settings.split)
    return problems + (oracle.problems(settings.oracle, inference(settings, "", "")) if settings.oracle else [])
