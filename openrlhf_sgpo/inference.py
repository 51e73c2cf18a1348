"""Shared by commands that only sample from policies: parts of a run's settings, and the policy in a folder.

Does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from openrlhf_sgpo import flags, oracle
from openrlhf_sgpo.config import (
    DataLimits,
    DataSettings,
    DeepspeedSettings,
    Inference,
    JudgeSettings,
    ModelSettings,
    RewardSettings,
    RolloutSettings,
    TrainSettings,
    VllmSettings,
    room_problems,
)
from openrlhf_sgpo.data.files import is_file
from openrlhf_sgpo.data.template import argument_problems
from openrlhf_sgpo.flags import part
from openrlhf_sgpo.run_check import check_ended, check_round
from openrlhf_sgpo.run_folder import STORED, RunFolder, read_configuration

DECODING = ("engine", "temperature", "top_p", "max_new_tokens", "batch_size")
_LIMITS = ("malformed", "refused", "empty", "too_long", "double_bos", "double_eos", "duplicate")
_INHERITED = ("ref", "data", "rollout", "vllm", "ds", "train")  # but not the judge


def one_process() -> DeepspeedSettings:
    return DeepspeedSettings(zero_stage=0)


@dataclass
class AnswerSettings:
    """How policies answer: settings that evaluate, compare and refine share."""

    data: DataSettings = part(
        lambda: DataSettings(limits=DataLimits(benchmark=1.0)),  # these commands may well answer benchmark prompts
        *("max_len", "chat_template_kwargs", *(f"limits.{name}" for name in _LIMITS)),
    )
    rollout: RolloutSettings = part(RolloutSettings, *DECODING)
    vllm: VllmSettings = part(
        lambda: VllmSettings(enable_sleep=False),  # no training that needs the memory
        *("num_engines", "tensor_parallel_size", "gpu_memory_utilization", "enable_prefix_caching", "enforce_eager"),
    )
    ds: DeepspeedSettings = part(one_process, "param_dtype", "attn_implementation")
    train: TrainSettings = part(TrainSettings, "seed", "micro_batch_size")

    def inference(self, model: ModelSettings) -> Inference:
        """The settings for engines and oracles. model: the policy, and how models are loaded."""
        train = replace(self.train, batch_size=self.train.micro_batch_size)
        return Inference(model=model, data=self.data, rollout=self.rollout, vllm=self.vllm, ds=self.ds, train=train)

    def problems(self, command: str, **required: str) -> list[str]:
        """Problems with the settings of any such command. required: descriptions of the required flags."""
        problems = [f"--{name}: missing, give {what}" for name, what in required.items() if not getattr(self, name)]
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            problems.append(
                f"{command} is one process: start it without a launcher, engines share GPUs by --vllm.num_engines"
            )
        problems += room_problems(self.rollout, self.data) + argument_problems(self.data.chat_template_kwargs)
        return problems + flags.out_of_range({"": self})

    def inherit(self, run: Mapping[str, Any]) -> None:
        """Takes over the values of the same flags from the resolved settings of a run."""
        for group, values in flags.to_dict({"": self}).items():
            for name in values if group in _INHERITED else ():
                if name in run.get(group, {}) and name != "limits":
                    setattr(getattr(self, group), name, run[group][name])

    def other_engine(self) -> dict[str, str]:
        """Reasons for ``unread`` that depend on the engine."""
        engine = self.rollout.engine
        return {"vllm." if engine == "hf" else "rollout.batch_size": f"--rollout.engine {engine} is selected"}


@dataclass
class JudgedSettings(AnswerSettings):
    """Answer settings with an oracle that compares the answers."""

    reward: RewardSettings = field(default_factory=RewardSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)

    def inference(self, model: ModelSettings) -> Inference:
        return replace(super().inference(model), reward=self.reward, judge=self.judge)


@dataclass(frozen=True)
class Policy:
    """The folders of a policy and its follower, which are the same unless the follower has its own weights.

    name: of both in records. round: of the run that the policy comes from; None if it does not come from a run.
    """

    folder: str
    follower: str
    name: str
    round: int | None = None


def policy_of(model: str, number: int | None, flag: str) -> Policy:
    """The policy of a run folder after round ``number`` (None: its last finished one), or of a Hugging Face folder or hub name.

    flag: the one that names ``model``, for messages. Raises ValueError if the folder holds no such policy, or one that was
    changed.
    """
    if stored_settings(model) is None:
        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            raise ValueError(f"--{flag} {model} is neither a run folder ({STORED}) nor a model (config.json)")
        return Policy(model, model, os.path.basename(os.path.abspath(model)))
    folder = RunFolder(model)
    check_ended(folder)
    finished = [index for index in folder.rounds() if {"play", "train"} & folder.manifest(index)["stages"].keys()]
    if not finished:
        raise ValueError(f"--{flag} {model} is a run that has not finished any round, so it has no policy to answer")
    number = finished[-1] if number is None else number
    if number not in finished:
        numbers = ", ".join(map(str, finished))
        raise ValueError(f"--round: {number} is not finished in the run {model}; finished: {numbers}")
    check_round(folder, number, ("play", "train"))
    policy, follower = folder.policy(number), folder.round(number) / "follower"
    name = f"{folder.path.name}-round-{number}"
    return Policy(str(policy), str(follower if follower.is_dir() else policy), name, number)


def stored_settings(model: str) -> dict[str, Any] | None:
    """The settings of the run in a folder; None if the folder holds no run."""
    path = Path(model, STORED)
    settings = read_configuration(path) if model and path.is_file() else {}
    return settings if isinstance(settings.get("model"), dict) else None


def no_splits(source: str, split: str) -> list[str]:
    """The problem of a split for prompts that have none."""
    if split and (not source or is_file(source)):
        return [f"--split: --prompts {source or 'is not given'} has no splits; leave it out"]
    return []


def unread(
    settings: object, default: object, given: Mapping[str, str], reasons: Mapping[str, str], reads: tuple[str, ...] = ()
) -> list[str]:
    """Problems with settings that were set although nothing reads them. A file may state a default.

    default: the same settings at their defaults; given: origins of set flags; reasons: why they are not read, by prefix of the
    flag; reads: prefixes of flags that are read nevertheless."""
    return [
        f"--{flag}: {reason} and would not read it ({origin}); leave it out"
        for start, reason in reasons.items()
        for flag, origin in given.items()
        if flag.startswith(start)
        and not flag.startswith(reads)
        and (origin == flags.COMMAND_LINE or attrgetter(flag)(settings) != attrgetter(flag)(default))
    ]


def other_oracle(name: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """(reasons for ``unread`` that depend on the oracle of this name, prefixes of the flags that it reads)"""
    reason = f"--oracle {name} is selected" if name else "there is no --oracle"
    groups = ("reward.", "judge.") if name == "implicit" else ("reward.", "judge.", "ref.", "beta")
    try:
        reads = oracle.get(name).reads if name else ()
    except ValueError:  # an unknown oracle is reported elsewhere
        reads = groups
    return dict.fromkeys(groups, reason), reads
