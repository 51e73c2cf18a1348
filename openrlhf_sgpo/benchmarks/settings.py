"""Settings of ``openrlhf-sgpo evaluate``. Imports neither torch nor the benchmarks' packages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from openrlhf_sgpo import extras, flags
from openrlhf_sgpo.benchmarks import tasks
from openrlhf_sgpo.benchmarks.judge import EvaluationJudgeSettings, judge_problems, with_preset
from openrlhf_sgpo.config import DataSettings, RolloutSettings, TrainSettings
from openrlhf_sgpo.data.files import is_data_file
from openrlhf_sgpo.flags import part, setting
from openrlhf_sgpo.inference import DECODING, AnswerSettings, policy_of, unread

_TAKEN = ("items", "judgements")  # folders beside those of models


@dataclass
class _Rollout(RolloutSettings):
    # At 0 an answer is the likeliest one, which is all right where there is one per item.
    temperature: float = setting(0.7, "sampling temperature", low=0)


@dataclass
class EvaluateSettings(AnswerSettings):
    models: list[str] = setting(
        [],
        "who is evaluated, each as PATH or NAME=PATH: a run folder (its last finished round), a Hugging Face folder or hub "
        "name, or a file of answers in the benchmark's own format",
    )
    tasks: list[str] = setting(["alpaca_eval", "mt_bench"], f"benchmarks: {', '.join(tasks.names())}")
    out: str = setting("", "folder for answers, judgements and the leaderboard; models may be added to it later")
    partial: bool = setting(False, "accept items without an answer, and judgements that are refused or cannot be read")
    trust_remote_code: bool = setting(False, "run code that a model repository ships; off unless you have read it")
    judge: EvaluationJudgeSettings = field(default_factory=EvaluationJudgeSettings)
    # FastChat's limit for an answer; two answers and a question fit beside it.
    data: DataSettings = part(lambda: DataSettings(max_len=4096), "max_len", "chat_template_kwargs")
    rollout: RolloutSettings = part(lambda: _Rollout(max_new_tokens=1024), *DECODING)
    train: TrainSettings = part(TrainSettings, "seed")


class Contestant(NamedTuple):
    """Who is evaluated: a policy's folder (or hub name), or a file of answers."""

    name: str
    folder: str = ""
    file: str = ""


class Loaded(NamedTuple):
    """The settings, the options of each task that was asked for, who is evaluated, and whether --data.max_len was given."""

    settings: EvaluateSettings
    options: dict[str, Any]
    contestants: list[Contestant]
    max_len_given: bool = True


def sections() -> dict[str, Any]:
    return {"": EvaluateSettings, **{name: tasks.get(name).Settings for name in tasks.names()}}


def load(argv: Sequence[str]) -> Loaded:
    """From command-line arguments. Raises flags.SettingsError with every problem at once, ValueError for what is no model."""
    instances, given, _ = flags.parse(argv, sections())
    settings: EvaluateSettings = instances[""]
    problems = _problems(settings, instances, given)
    if problems:
        raise flags.SettingsError(*problems)
    judged = any(tasks.get(name).judged for name in settings.tasks)
    if judged:
        settings.judge = with_preset(settings.judge, given)
        problems = judge_problems(settings.judge)
        room, longest = settings.judge.max_len, instances["arena_hard"].max_tokens
        if "arena_hard" in settings.tasks and 0 < room <= longest:
            problems.append(f"--judge.max_len: {room} has no room for judgements of --arena_hard.max_tokens {longest}")
        if problems:
            raise flags.SettingsError(*problems)
    options = {name: instances[name] for name in settings.tasks}
    return Loaded(settings, options, contestants(settings), "data.max_len" in given)


def contestants(settings: EvaluateSettings) -> list[Contestant]:
    """Raises ValueError for a folder that holds no policy, a name that cannot be a folder's, and one that is given twice."""
    found = []
    for text in settings.models:
        name, equals, path = text.partition("=")
        name, path = (name, path) if equals and "/" not in name else ("", text)
        if is_data_file(path):
            if not Path(path).is_file():
                raise ValueError(f"--models {path}: no such file")
            if len(settings.tasks) > 1:
                raise ValueError(
                    f"--models {path} is a file of answers to one benchmark: give that one as --tasks, and the others in "
                    "another call with the same --out"
                )
            found.append(Contestant(name or Path(path).name.partition(".")[0], file=path))
        else:
            policy = policy_of(path, None, "models")
            found.append(Contestant(name or policy.name, folder=policy.folder))
    for one in found:
        if not re.fullmatch(r"\w[\w.+-]*", one.name) or one.name in _TAKEN:
            raise ValueError(
                f"--models: {one.name!r} cannot be a name, use letters, digits and . + - _, as in NAME={one.folder or one.file}"
            )
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--models: {', '.join(twice)} is the name of two of them; give others as NAME=PATH NAME=PATH")
    return found


def _problems(settings: EvaluateSettings, options: Mapping[str, Any], given: Mapping[str, str]) -> list[str]:
    problems = settings.problems(
        "evaluate", models="who is evaluated", out="a folder for the results", tasks="benchmarks"
    )
    for name in settings.tasks:
        if name not in tasks.names():
            problems.append(f"--tasks: {name} is unknown, choose from {', '.join(tasks.names())}")
    if len(set(settings.tasks)) < len(settings.tasks):
        problems.append("--tasks: one of them is given twice")
    for name in tasks.names():
        if name not in settings.tasks:
            problems += [
                f"--{flag}: belongs to --tasks {name}, which is not asked for ({origin})"
                for flag, origin in given.items()
                if flag.startswith(f"{name}.") and origin == flags.COMMAND_LINE
            ]
    known = [name for name in settings.tasks if name in tasks.names()]
    for name in known:
        if problem := extras.missing(*tasks.get(name).packages, otherwise=extras.BENCHMARKS):
            problems.append(f"--tasks {name}: {problem}")
    reasons = settings.other_engine()
    if known and not any(tasks.get(name).judged for name in known):
        reasons["judge."] = f"--tasks {' '.join(known)} needs no judge"
    if settings.models and all(map(is_data_file, (text.rpartition("=")[2] for text in settings.models))):
        reasons |= dict.fromkeys(("rollout.", "vllm.", "ds.", "data.", "train."), "all --models are files of answers")
    problems += unread(settings, EvaluateSettings(), given, reasons)
    return problems + flags.out_of_range({name: options[name] for name in known})
