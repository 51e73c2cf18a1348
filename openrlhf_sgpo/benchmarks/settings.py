"""Settings of ``openrlhf-sgpo evaluate``. Imports neither torch nor the benchmarks' packages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from openrlhf_sgpo import extras, flags
from openrlhf_sgpo.benchmarks import tasks
from openrlhf_sgpo.benchmarks.judge import EvaluationJudgeSettings, judge_problems, with_preset
from openrlhf_sgpo.config import DataSettings, RolloutSettings, TrainSettings
from openrlhf_sgpo.data.files import is_data_file
from openrlhf_sgpo.flags import part, setting
from openrlhf_sgpo.inference import DECODING, AnswerSettings, policy_of, unread
from openrlhf_sgpo.intervals import LEAST_RANKED

_TAKEN = ("items", "judgements", "evalscope")  # folders beside the models' folders


@dataclass
class _Rollout(RolloutSettings):
    # 0 means greedy decoding, which is valid here because each item has one answer.
    temperature: float = setting(0.7, "sampling temperature", low=0)


@dataclass
class EvaluateSettings(AnswerSettings):
    models: list[str] = setting(
        [],
        "models to evaluate, each as PATH or NAME=PATH: a run folder (its last finished round), a Hugging Face folder or hub "
        "name, or a file of answers in the benchmark's own format",
    )
    tasks: list[str] = setting(["alpaca_eval", "mt_bench"], f"benchmarks: {', '.join(tasks.names())}")
    anchors: int = setting(
        0,
        "models of the benchmark's published leaderboard to judge as well, at equal distances in its order: the rank "
        "correlation with it says how far the judge can be trusted (0: none, else at least 5)",
        low=0,
    )
    anchors_from: str = setting(
        "",
        "where the published answers of --anchors are: a folder with MODEL/model_outputs.json, such as the folder results of "
        "the repository tatsu-lab/alpaca_eval, or an address (default: that repository on GitHub)",
    )
    out: str = setting("", "folder for answers, judgements and the leaderboard; models may be added to it later")
    partial: bool = setting(False, "accept items without an answer, and judgements that are refused or cannot be read")
    trust_remote_code: bool = setting(False, "run code that a model repository ships; off unless you have read it")
    judge: EvaluationJudgeSettings = field(default_factory=EvaluationJudgeSettings)
    # max_new_tokens is FastChat's limit for an answer; max_len leaves room for two answers and their questions.
    data: DataSettings = part(lambda: DataSettings(max_len=4096), "max_len", "chat_template_kwargs")
    rollout: RolloutSettings = part(lambda: _Rollout(max_new_tokens=1024), *DECODING)
    train: TrainSettings = part(TrainSettings, "seed")


class Contestant(NamedTuple):
    """A policy's folder (or hub name), or a file of answers, to evaluate. published: an anchor's published figures."""

    name: str
    folder: str = ""
    file: str = ""
    published: Mapping[str, float] = MappingProxyType({})


class Loaded(NamedTuple):
    """The settings, each task's options, the contestants, and whether --data.max_len was set."""

    settings: EvaluateSettings
    options: dict[str, Any]
    contestants: list[Contestant]
    max_len_given: bool = True


def sections() -> dict[str, Any]:
    return {"": EvaluateSettings, **{name: tasks.get(name).Settings for name in tasks.names()}}


def load(argv: Sequence[str]) -> Loaded:
    """Parse command-line arguments. Raises flags.SettingsError with all problems at once, ValueError for a bad model."""
    instances, origins, _ = flags.parse(argv, sections())
    settings: EvaluateSettings = instances[""]
    flags.refuse(_problems(settings, instances, origins))
    if any(tasks.get(name).judged for name in settings.tasks):
        settings.judge = with_preset(settings.judge, origins)
        problems = judge_problems(settings.judge)
        room, longest = settings.judge.max_len, instances["arena_hard"].max_tokens
        if "arena_hard" in settings.tasks and 0 < room <= longest + settings.judge.thinking_tokens:
            problems.append(f"--judge.max_len: {room} has no room for judgements of --arena_hard.max_tokens {longest}")
        flags.refuse(problems)
    options = {name: instances[name] for name in settings.tasks}
    return Loaded(settings, options, contestants(settings), "data.max_len" in origins)


def contestants(settings: EvaluateSettings) -> list[Contestant]:
    """The entries of --models. Raises ValueError for a folder without a policy, and for an invalid or duplicate name."""
    entries = []
    for text in settings.models:
        name, equals, path = text.partition("=")
        name, path = (name, path) if equals and "/" not in name else ("", text)
        if is_data_file(path):
            if not Path(path).is_file():
                raise ValueError(f"--models {path}: no such file")
            if len(settings.tasks) > 1:
                raise ValueError(
                    f"--models {path} is a file of answers to one benchmark: give that benchmark alone in --tasks, and the "
                    "others in another call with the same --out"
                )
            entries.append(Contestant(name or Path(path).name.partition(".")[0], file=path))
        else:
            policy = policy_of(path, None, "models")
            entries.append(Contestant(name or policy.name, folder=policy.folder))
    for contestant in entries:
        if not re.fullmatch(r"\w[\w.+-]*", contestant.name) or contestant.name in _TAKEN:
            raise ValueError(
                f"--models: {contestant.name!r} cannot be a name, use letters, digits and . + - _, as in "
                f"NAME={contestant.folder or contestant.file}"
            )
    names = [contestant.name for contestant in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--models: duplicate names: {', '.join(twice)}; give others as NAME=PATH NAME=PATH")
    return entries


def _anchor_problems(settings: EvaluateSettings, selected: Sequence[str]) -> list[str]:
    if not settings.anchors:
        return ["--anchors_from: needs --anchors, the number of models"] if settings.anchors_from else []
    problems = []
    if settings.anchors < LEAST_RANKED:
        problems.append(
            f"--anchors: {settings.anchors} are too few for the interval of a rank correlation, give at least {LEAST_RANKED}"
        )
    anchored = [name for name in tasks.names() if tasks.get(name).answers_address]
    if len(settings.tasks) > 1 or not set(selected) <= set(anchored):
        problems.append(f"--anchors: give --tasks {' or '.join(anchored)} alone, and other benchmarks in another call")
    return problems


def _problems(settings: EvaluateSettings, options: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    required = {"out": "a folder for the results", "tasks": "benchmarks"}
    if not settings.anchors:  # a judge can be tried on anchors alone
        required = {"models": "the models to evaluate", **required}
    problems = settings.problems("evaluate", **required)
    for name in settings.tasks:
        if name not in tasks.names():
            problems.append(f"--tasks: {name} is unknown, choose from {', '.join(tasks.names())}")
    if len(set(settings.tasks)) < len(settings.tasks):
        problems.append("--tasks: a benchmark is listed twice")
    for name in tasks.names():
        if name not in settings.tasks:
            problems += [
                f"--{flag}: belongs to {name}, which is not in --tasks ({origin})"
                for flag, origin in origins.items()
                if flag.startswith(f"{name}.") and origin == flags.COMMAND_LINE
            ]
    selected = [name for name in settings.tasks if name in tasks.names()]
    for name in selected:
        if problem := extras.missing(*tasks.get(name).packages, otherwise=extras.BENCHMARKS):
            problems.append(f"--tasks {name}: {problem}")
    problems += _anchor_problems(settings, selected)
    reasons = settings.other_engine()
    if selected and not any(tasks.get(name).judged for name in selected):
        reasons["judge."] = f"--tasks {' '.join(selected)} needs no judge"
    if (settings.models or settings.anchors) and all(
        map(is_data_file, (text.rpartition("=")[2] for text in settings.models))
    ):
        reasons |= dict.fromkeys(("rollout.", "vllm.", "ds.", "data.", "train."), "all --models are files of answers")
    problems += unread(settings, EvaluateSettings(), origins, reasons)
    return problems + flags.out_of_range({name: options[name] for name in selected})
