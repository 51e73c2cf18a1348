"""Settings of ``openrlhf-sgpo chat``: those of a run that say how its policy answers, and a few more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openrlhf_sgpo import algorithms, flags
from openrlhf_sgpo.config import DataSettings, DeepspeedSettings, RolloutSettings, TrainSettings, VllmSettings
from openrlhf_sgpo.flags import part, setting
from openrlhf_sgpo.inference import AnswerSettings, Policy, one_process, policy_of, stored_settings

UNLIMITED = 2**31  # tokens, until the model says how many it takes


@dataclass
class ChatSettings(AnswerSettings):
    model: str = setting("", "who answers: a run folder, or a Hugging Face folder or hub name")
    round: int | None = setting(
        None, "round of the run folder that the policy comes from (default: the last finished one)", low=0
    )
    start: bool = setting(True, "let the initial policy of the run answer too")
    prompt: str = setting(
        "", "ask this and end (default: read questions from the terminal, or a line each from a pipe)"
    )
    trust_remote_code: bool = setting(False, "run code that a model repository ships; off unless you have read it")
    data: DataSettings = part(DataSettings, "max_len", "chat_template_kwargs")
    rollout: RolloutSettings = part(lambda: RolloutSettings(engine="hf"), *("temperature", "top_p", "max_new_tokens"))
    vllm: VllmSettings = part(VllmSettings)
    ds: DeepspeedSettings = part(one_process, "param_dtype", "attn_implementation")
    train: TrainSettings = part(TrainSettings)


@dataclass(frozen=True)
class Speakers:
    """Who answers. policy: with the folder of its follower. start: the initial policy; empty if it does not answer.
    instruction: to a follower after its draft; empty without one. whole_context: a conversation may fill the model's
    context."""

    policy: Policy
    start: str = ""
    instruction: str = ""
    whole_context: bool = False


def load(argv: Sequence[str]) -> tuple[ChatSettings, Speakers]:
    """The settings from command-line arguments, and who answers. Raises flags.SettingsError with every problem at once, and
    ValueError if the policy does not exist. Imports no torch."""
    run = stored_settings(flags.peek(argv, "model") or "")
    instances, given, _ = flags.parse(argv, {"": lambda: _defaults(run)})
    settings: ChatSettings = instances[""]
    whole_context = "data.max_len" not in given
    if whole_context:
        settings.data.max_len = UNLIMITED
    problems = settings.problems("chat", model="who answers")
    if settings.round is not None and settings.model and run is None:
        problems.append(f"--round: --model {settings.model} is not a run folder; leave it out")
    if run and not algorithms.get(run["algo"]).needs.reference:
        problems.append(f"--model: {settings.model} is a run of --algo {run['algo']}, which judges and does not answer")
    flags.refuse(problems)
    policy = policy_of(settings.model, settings.round, "model")
    instruction = run.get(run["algo"], {}).get("follower_prompt", "") if run else ""
    start = run["model"]["model_name_or_path"] if run and settings.start else ""
    return settings, Speakers(policy, start, instruction, whole_context)


def _defaults(run: Mapping[str, Any] | None) -> ChatSettings:
    settings = ChatSettings()
    if run is not None:
        settings.inherit(run)
        settings.trust_remote_code = run["model"].get("trust_remote_code", False)
    return settings
