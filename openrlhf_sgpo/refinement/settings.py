"""Settings of ``openrlhf-sgpo refine``: some settings of a run, with the run's values as defaults, and a few more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from openrlhf_sgpo import flags, oracle
from openrlhf_sgpo.algorithms.slhf import IMPROVE
from openrlhf_sgpo.config import Inference, ModelSettings, RefSettings
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.inference import JudgedSettings, Policy, no_splits, other_oracle, policy_of, stored_settings, unread

Control = Literal["iid", "best_of_n"]

# Defaults for a model that is not a run of this package: those of SLHF's published follower (arXiv 2512.16626).
PLAIN = {"rollout.temperature": 0.9, "rollout.max_new_tokens": 512, "data.max_len": 2048}


@dataclass
class _Reference(RefSettings):
    model_name_or_path: str = setting("", "initial reference of the rewards of --oracle implicit")


@dataclass
class RefineSettings(JudgedSettings):
    model: str = setting("", "the model that answers and revises: a run folder, or a Hugging Face folder or hub name")
    round: int | None = setting(
        None, "round of the run folder that the policy comes from (default: the last finished one)"
    )
    prompts: str = setting("", "prompts to answer: a file, or a hub name (default: those of --drafts)")
    split: str = setting("", "split of --prompts if it is a hub name (default: train, or train_prefs)")
    drafts: str = setting("", "file of another model's answers to revise (default: answers of the model itself)")
    depth: int = setting(
        5, "number of answers in a chain: a first answer, and revisions, each of the previous answer", low=1
    )
    controls: list[Control] | None = setting(
        None,
        "what a chain is compared with at the same number of tokens: iid, independent answers; best_of_n, the best of them "
        "(default: iid, and with an oracle both)",
    )
    control_samples: int = setting(64, "largest number of independent answers to a prompt", low=1)
    follower_prompt: str = setting(IMPROVE, "instruction to the model after the prompt and the draft")
    out: str = setting("", "folder for records and results")
    oracle: str = setting(
        "", "the oracle that compares answers: as in training, but implicit is always frozen (default: none)"
    )
    trust_remote_code: bool = setting(False, "run code that a model repository ships; off unless you have read it")
    beta: float = setting(0.1, "strength of the KL regularisation in the rewards of --oracle implicit", above=0)
    ref: RefSettings = field(default_factory=_Reference)
    resume: bool = setting(False, "continue in --out at the first unfinished stage")


def load(argv: Sequence[str]) -> tuple[RefineSettings, Policy]:
    """The complete settings from command-line arguments, and the policy that they name.

    Raises flags.SettingsError with every problem at once, ValueError if the policy does not exist. Imports no torch.
    """
    run = stored_settings(flags.peek(argv, "model") or "")
    default = defaults(argv)
    instances, origins, _ = flags.parse(argv, {"": lambda: defaults(argv)})
    settings: RefineSettings = instances[""]
    if settings.controls is None:
        settings.controls = ["iid", "best_of_n"] if settings.oracle else ["iid"]
    flags.refuse(_problems(settings, run is not None) + _unread(settings, default, origins))
    policy = policy_of(settings.model, settings.round, "model")
    settings.round = policy.round
    return settings, policy


def inference(settings: RefineSettings, policy: str) -> Inference:
    """The settings as engines and oracles read them."""
    model = ModelSettings(policy, settings.beta, trust_remote_code=settings.trust_remote_code)
    return replace(settings.inference(model), ref=settings.ref)


def defaults(argv: Sequence[str]) -> RefineSettings:
    """The default settings for the model in ``argv``: those of the run, if the model is a run."""
    settings, run = RefineSettings(), stored_settings(flags.peek(argv, "model") or "")
    if run is None:
        for name, value in PLAIN.items():
            group, _, leaf = name.partition(".")
            setattr(getattr(settings, group), leaf, value)
        return settings
    settings.inherit(run)
    model, algorithm = run.get("model", {}), run.get(run.get("algo", ""), {})
    settings.trust_remote_code = model.get("trust_remote_code", settings.trust_remote_code)
    settings.beta = model.get("beta", settings.beta)
    settings.follower_prompt = algorithm.get("follower_prompt", settings.follower_prompt)
    return settings


def _problems(settings: RefineSettings, is_run: bool) -> list[str]:
    problems = settings.problems("refine", model="the model that answers", out="a folder for the results")
    if not settings.prompts and not settings.drafts:
        problems.append("--prompts: missing, give prompts to answer, or --drafts")
    problems += no_splits(settings.prompts, settings.split)
    if settings.round is not None and settings.model and not is_run:
        problems.append(f"--round: --model {settings.model} is not a run folder; leave it out")
    if settings.drafts and settings.depth == 1:
        problems.append("--depth: 1 revises nothing of --drafts; use at least 2")
    if not settings.follower_prompt.strip():
        problems.append("--follower_prompt: empty; give an instruction to revise a draft")
    controls = settings.controls or []
    if len(set(controls)) < len(controls):
        problems.append("--controls: a control is given twice")
    if "best_of_n" in controls and not settings.oracle:
        problems.append("--controls: best_of_n needs an oracle to choose the best answer; give --oracle")
    if settings.oracle:
        problems += oracle.problems(settings.oracle, inference(settings, settings.model))
    if settings.oracle == "implicit" and not settings.ref.model_name_or_path:
        problems.append("--ref.model_name_or_path: missing, --oracle implicit needs the initial reference")
    return problems


def _unread(settings: RefineSettings, default: RefineSettings, origins: Mapping[str, str]) -> list[str]:
    """Problems of settings that are given but never read."""
    reasons, reads = other_oracle(settings.oracle)
    reasons = settings.other_engine() | reasons
    if not settings.oracle:
        reasons["train.micro_batch_size"] = "there is no --oracle"
    if not settings.controls:
        reasons["control_samples"] = "there are no --controls"
    if settings.depth == 1:
        reasons["follower_prompt"] = "--depth 1 revises nothing"
    return unread(settings, default, origins, reasons, reads)
