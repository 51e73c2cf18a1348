"""What commands that only ask policies for answers share: parts of a run's settings, and the policy that a folder holds.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

from openrlhf_sgpo import flags, oracle
from openrlhf_sgpo.config import (
    Config,
    DataLimits,
    DataSettings,
    DeepspeedSettings,
    RolloutSettings,
    TrainSettings,
    VllmSettings,
)
from openrlhf_sgpo.run_check import check_ended, check_round
from openrlhf_sgpo.run_folder import STORED, RunFolder, read_configuration


def part(group: type, *names: str, **others: type) -> type:
    """A dataclass of these settings of a group of ``Config``, with their defaults and help texts; others: groups in it."""
    hints, known = get_type_hints(group), {item.name: item for item in fields(group)}
    own = [
        (
            name,
            hints[name],
            field(
                default=known[name].default,
                default_factory=known[name].default_factory,
                metadata=known[name].metadata,
            ),
        )
        for name in names
    ]
    return make_dataclass(
        group.__name__, own + [(name, Any, field(default_factory=kind)) for name, kind in others.items()]
    )


_LIMITS = part(DataLimits, "malformed", "refused", "empty", "too_long", "double_bos", "double_eos", "duplicate")
Data = part(DataSettings, "max_len", "chat_template_kwargs", limits=_LIMITS)
Rollout = part(RolloutSettings, "engine", "temperature", "top_p", "max_new_tokens", "batch_size")
Vllm = part(  # nothing is trained meanwhile, so that engines need not sleep
    VllmSettings,
    *("num_engines", "tensor_parallel_size", "gpu_memory_utilization", "enable_prefix_caching", "enforce_eager"),
)
Deepspeed = part(DeepspeedSettings, "param_dtype", "attn_implementation")
Train = part(TrainSettings, "seed", "micro_batch_size")


@dataclass(frozen=True)
class Policy:
    """Who answers, and who revises: the same, or a follower with weights of its own. name: of both in records. round: of the
    run that it comes from; None if it comes from no run."""

    folder: str
    follower: str
    name: str
    round: int | None = None


def policy_of(model: str, number: int | None, flag: str) -> Policy:
    """The policy of a run folder after round ``number`` (None: its last finished one), or of a Hugging Face folder or hub name.

    flag: that names ``model``, for messages. Raises ValueError if the folder holds no such policy, or one that is no
    longer what was written.
    """
    if stored_settings(model) is None:
        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            raise ValueError(f"--{flag} {model} is neither a run folder ({STORED}) nor a model (config.json)")
        return Policy(model, model, os.path.basename(os.path.abspath(model)))
    folder = RunFolder(model)
    check_ended(folder)
    finished = [one for one in folder.rounds() if {"play", "train"} & folder.manifest(one)["stages"].keys()]
    if not finished:
        raise ValueError(
            f"--{flag} {model} is a run that has finished no round yet, so that it has no policy to answer"
        )
    number = finished[-1] if number is None else number
    if number not in finished:
        numbers = ", ".join(map(str, finished))
        raise ValueError(f"--round: {number} is not finished in the run {model}; finished: {numbers}")
    check_round(folder, number, ("play", "train"))
    policy, follower = folder.policy(number), folder.round(number) / "follower"
    name = f"{folder.path.name}-round-{number}"
    return Policy(str(policy), str(follower if follower.is_dir() else policy), name, number)


def stored_settings(model: str) -> dict[str, Any] | None:
    """The settings of the run in a folder; None if that is no run."""
    path = Path(model, STORED)
    found = read_configuration(path) if model and path.is_file() else {}
    return found if isinstance(found.get("model"), dict) else None


def config_of(settings: Any, groups: Iterable[str], policy: str) -> Config:
    """``groups`` of the settings as a run has them, which engines and oracles read: one process, and nothing is trained."""
    config = Config()
    for group in groups:
        set_fields(getattr(config, group), vars(getattr(settings, group)))
    if hasattr(settings.data, "limits"):
        # Answers to a benchmark's prompts are what this is for.
        config.data.limits = DataLimits(**vars(settings.data.limits), benchmark=1.0)
    config.model.model_name_or_path, config.model.trust_remote_code = policy, settings.trust_remote_code
    config.train.batch_size = config.train.micro_batch_size
    config.ds.zero_stage, config.vllm.enable_sleep = 0, False
    return config


def no_room(settings: Any) -> list[str]:
    """The problem that answers leave no room for prompts, if there is one."""
    new, longest = settings.rollout.max_new_tokens, settings.data.max_len
    if new < longest:
        return []
    return [
        f"--rollout.max_new_tokens: {new} leaves no room for a prompt within --data.max_len {longest}; lower the one or raise "
        "the other"
    ]


def unread(
    settings: Any, default: Any, given: Mapping[str, str], reasons: Mapping[str, str], reads: tuple[str, ...] = ()
) -> list[str]:
    """Settings that were given although nothing reads them. A file may state a default.

    default: the same settings where nothing was given; given: origins by flag; reasons: why not, by the beginning of a flag's
    name; reads: beginnings of those that are read all the same."""
    return [
        f"--{flag}: {reason} and would not read it ({origin}); leave it out"
        for start, reason in reasons.items()
        for flag, origin in given.items()
        if flag.startswith(start)
        and not flag.startswith(reads)
        and (origin == flags.COMMAND_LINE or attrgetter(flag)(settings) != attrgetter(flag)(default))
    ]


def other_engine(settings: Any) -> dict[str, str]:
    """Reasons, for ``unread``, that have to do with the engine."""
    engine = settings.rollout.engine
    return {"vllm." if engine == "hf" else "rollout.batch_size": f"--rollout.engine {engine} is not the one"}


def other_oracle(settings: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """Reasons, for ``unread``, that have to do with the oracle; and what it reads."""
    name = settings.oracle
    who = f"--oracle {name} is not the one" if name else "there is no --oracle"
    groups = ("reward.", "judge.") if name == "implicit" else ("reward.", "judge.", "ref.", "beta")
    try:
        reads = oracle.get(name).reads if name else ()
    except ValueError:  # an unknown oracle is a problem of its own
        reads = groups
    return dict.fromkeys(groups, who), reads


def set_fields(group: Any, values: Mapping[str, Any]) -> None:
    """Set the fields that are neither groups nor missing in ``values``."""
    for item in fields(group):
        if item.name in values and not is_dataclass(getattr(group, item.name)):
            setattr(group, item.name, values[item.name])
