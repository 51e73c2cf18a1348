"""Settings of ``openrlhf-sgpo refine``: parts of a run's, with a run's own values as defaults, and a few more."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from openrlhf_sgpo import flags, oracle
from openrlhf_sgpo.algorithms.slhf import IMPROVE
from openrlhf_sgpo.config import (
    Config,
    DataSettings,
    DeepspeedSettings,
    JudgeSettings,
    RewardSettings,
    RolloutSettings,
    TrainSettings,
    VllmSettings,
)
from openrlhf_sgpo.config_check import sampling_problems
from openrlhf_sgpo.data.files import is_file
from openrlhf_sgpo.data.limits import DataLimits
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.run_folder import RunFolder

Control = Literal["iid", "best_of_n"]

# Of a model that is no run of this package: what SLHF's follower was trained and published with (arXiv 2512.16626).
PLAIN = {"rollout.temperature": 0.9, "rollout.max_new_tokens": 512, "data.max_len": 2048}
_GROUPS = ("ref", "data", "rollout", "vllm", "ds", "train", "reward", "judge")
_INHERITED = ("ref", "data", "rollout", "vllm", "ds", "train")  # judges are chosen anew
_STORED = "resolved_config.yaml"


def _part(group: type, *names: str, **others: type) -> type:
    """A dataclass of these settings of a group of ``Config``, with their defaults and help texts; others: groups in it."""
    hints, known = get_type_hints(group), {item.name: item for item in fields(group)}
    own = [(name, hints[name], field(default=known[name].default, metadata=known[name].metadata)) for name in names]
    return make_dataclass(
        group.__name__, own + [(name, Any, field(default_factory=kind)) for name, kind in others.items()]
    )


_LIMITS = _part(DataLimits, "malformed", "refused", "empty", "too_long", "double_bos", "double_eos", "duplicate")
_DATA = _part(DataSettings, "max_len", limits=_LIMITS)
_ROLLOUT = _part(RolloutSettings, "engine", "temperature", "top_p", "max_new_tokens", "batch_size")
_VLLM = _part(  # nothing is trained meanwhile, so that engines need not sleep
    VllmSettings,
    *("num_engines", "tensor_parallel_size", "gpu_memory_utilization", "enable_prefix_caching", "enforce_eager"),
)
_DS = _part(DeepspeedSettings, "param_dtype", "attn_implementation")
_TRAIN = _part(TrainSettings, "seed", "micro_batch_size")


@dataclass
class _Reference:
    model_name_or_path: str = setting("", "initial reference of the rewards of --oracle implicit")


@dataclass
class RefineSettings:
    model: str = setting("", "who answers and revises: a run folder, or a Hugging Face folder or hub name")
    round: int | None = setting(None, "round of the run folder whose policy it is (default: the last finished one)")
    prompts: str = setting("", "prompts to answer: a file, or a hub name (default: those of --drafts)")
    split: str = setting("", "split of --prompts when it is a hub name (default: train, or train_prefs)")
    drafts: str = setting("", "file of another model's answers to revise (default: the model's own)")
    depth: int = setting(5, "answers of a chain: the first one, and revisions, each of the answer before it")
    controls: list[Control] | None = setting(
        None,
        "what a chain is compared with at the same number of tokens: iid, independent answers; best_of_n, the best of them "
        "(default: iid, and with an oracle both)",
    )
    control_samples: int = setting(64, "at most so many independent answers to a prompt")
    follower_prompt: str = setting(IMPROVE, "what the model is told after it has seen prompt and draft")
    out: str = setting("", "folder for records and results")
    oracle: str = setting(
        "", "who compares answers: as in training, but implicit is always frozen (default: nobody, tokens are counted)"
    )
    trust_remote_code: bool = setting(False, "run code that a model repository ships; off unless you have read it")
    beta: float = setting(0.1, "strength of the KL regularisation in the rewards of --oracle implicit")
    ref: _Reference = field(default_factory=_Reference)
    data: Any = field(default_factory=_DATA)
    rollout: Any = field(default_factory=_ROLLOUT)
    vllm: Any = field(default_factory=_VLLM)
    ds: Any = field(default_factory=_DS)
    train: Any = field(default_factory=_TRAIN)
    reward: RewardSettings = field(default_factory=RewardSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    resume: bool = setting(False, "continue in --out at the first unfinished stage")


@dataclass(frozen=True)
class Policy:
    """Who answers, and who revises: the same, or a follower with weights of its own. name: of both in records."""

    folder: str
    follower: str
    name: str


def load(argv: Sequence[str]) -> tuple[RefineSettings, Policy]:
    """The settings from command-line arguments, complete, and the policy that they name.

    Raises flags.SettingsError with every problem at once, ValueError if there is no such policy. Imports no torch.
    """
    run = _stored_settings(argv)
    default = defaults(argv)
    instances, given = flags.parse(argv, {"": lambda: defaults(argv)})
    settings: RefineSettings = instances[""]
    if settings.controls is None:
        settings.controls = ["iid", "best_of_n"] if settings.oracle else ["iid"]
    problems = _problems(settings, run is not None) + _unread(settings, default, given)
    if problems:
        raise flags.SettingsError(*problems)
    return settings, _policy(settings, run is not None)


def run_config(settings: RefineSettings, policy: str) -> Config:
    """The settings as a run has them, which engines and oracles read."""
    config = Config()
    for group in _GROUPS:
        _set_fields(getattr(config, group), vars(getattr(settings, group)))
    # Answers to a benchmark's prompts are what this is for.
    config.data.limits = DataLimits(**vars(settings.data.limits), benchmark=1.0)
    config.model.model_name_or_path, config.model.trust_remote_code = policy, settings.trust_remote_code
    config.model.beta, config.oracle = settings.beta, settings.oracle
    config.train.batch_size = config.train.micro_batch_size
    config.ds.zero_stage, config.vllm.enable_sleep = 0, False  # one process, and nothing is trained
    return config


def defaults(argv: Sequence[str]) -> RefineSettings:
    """The settings where ``argv`` says nothing but which model it is: those of the run, if it is one."""
    settings, run = RefineSettings(), _stored_settings(argv)
    if run is None:
        for name, value in PLAIN.items():
            group, _, leaf = name.partition(".")
            setattr(getattr(settings, group), leaf, value)
        return settings
    for group in _INHERITED:
        _set_fields(getattr(settings, group), run.get(group, {}))
    model, algorithm = run.get("model", {}), run.get(run.get("algo", ""), {})
    settings.trust_remote_code = model.get("trust_remote_code", settings.trust_remote_code)
    settings.beta = model.get("beta", settings.beta)
    settings.follower_prompt = algorithm.get("follower_prompt", settings.follower_prompt)
    return settings


def _stored_settings(argv: Sequence[str]) -> dict[str, Any] | None:
    """The settings of the run in the folder of --model; None if that is no run."""
    model = flags.peek(argv, "model")
    path = Path(model or "", _STORED)
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if model and path.is_file() else None
    return found if isinstance(found, dict) and isinstance(found.get("model"), dict) else None


def _set_fields(group: Any, values: Mapping[str, Any]) -> None:
    """Set the fields that are neither groups nor missing in ``values``."""
    for item in fields(group):
        if item.name in values and not is_dataclass(getattr(group, item.name)):
            setattr(group, item.name, values[item.name])


def _problems(settings: RefineSettings, is_run: bool) -> list[str]:
    config = run_config(settings, settings.model)
    missing = {"model": "who answers", "out": "a folder for the results"}
    problems = [f"--{name}: missing, give {what}" for name, what in missing.items() if not getattr(settings, name)]
    if not settings.prompts and not settings.drafts:
        problems.append("--prompts: missing, give prompts to answer, or --drafts")
    if settings.split and (not settings.prompts or is_file(settings.prompts)):
        problems.append(f"--split: --prompts {settings.prompts or 'is not given'} has no splits; leave it out")
    if settings.round is not None and settings.model and not is_run:
        problems.append(f"--round: --model {settings.model} is not a run folder; leave it out")
    for name in ("depth", "control_samples"):
        if getattr(settings, name) < 1:
            problems.append(f"--{name}: {getattr(settings, name)} is out of range, use at least 1")
    if settings.drafts and settings.depth == 1:
        problems.append("--depth: 1 revises nothing of --drafts; use at least 2")
    if not settings.follower_prompt.strip():
        problems.append("--follower_prompt: empty, the model would not know what to do with a draft")
    if settings.beta <= 0:
        problems.append(f"--beta: {settings.beta} is out of range, use more than 0")
    controls = settings.controls or []
    if len(set(controls)) < len(controls):
        problems.append("--controls: one of them is given twice")
    if "best_of_n" in controls and not settings.oracle:
        problems.append("--controls: best_of_n needs an oracle that says which is best; give --oracle")
    if settings.rollout.max_new_tokens >= settings.data.max_len:
        problems.append(
            f"--rollout.max_new_tokens: {settings.rollout.max_new_tokens} leaves no room for a prompt within --data.max_len "
            f"{settings.data.max_len}; lower the one or raise the other"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("refine is one process: start it without a launcher, engines share GPUs by --vllm.num_engines")
    return problems + sampling_problems(config) + _oracle_problems(settings, config)


def _oracle_problems(settings: RefineSettings, config: Config) -> list[str]:
    if not settings.oracle:
        return []
    try:
        problems = oracle.get(settings.oracle).problems(config)
    except ValueError as error:
        return [f"--oracle: {error}"]
    if settings.oracle == "implicit" and not settings.ref.model_name_or_path:
        problems.append("--ref.model_name_or_path: missing, --oracle implicit needs the initial reference")
    return problems


def _unread(settings: RefineSettings, default: RefineSettings, given: Mapping[str, str]) -> list[str]:
    """Settings that were given although nothing reads them. A file may state a default."""
    engine = settings.rollout.engine
    reasons: dict[str, str] = {}  # by the beginning of a name
    reasons["vllm." if engine == "hf" else "rollout.batch_size"] = f"--rollout.engine {engine} is not the one"
    try:
        reads = oracle.get(settings.oracle).reads if settings.oracle else ()
    except ValueError:  # an unknown oracle is a problem of its own
        reads = ("reward.", "judge.")
    who = f"--oracle {settings.oracle} is not the one" if settings.oracle else "there is no --oracle"
    reasons |= dict.fromkeys(("reward.", "judge."), who)
    if settings.oracle != "implicit":
        reasons |= dict.fromkeys(("ref.", "beta"), who)
    if not settings.oracle:
        reasons["train.micro_batch_size"] = who
    if not settings.controls:
        reasons["control_samples"] = "there are no --controls"
    if settings.depth == 1:
        reasons["follower_prompt"] = "--depth 1 revises nothing"
    return [
        f"--{name}: {reason} and would not read it ({origin}); leave it out"
        for start, reason in reasons.items()
        for name, origin in given.items()
        if name.startswith(start)
        and not name.startswith(reads)
        and (origin == flags.COMMAND_LINE or attrgetter(name)(settings) != attrgetter(name)(default))
    ]


def _policy(settings: RefineSettings, is_run: bool) -> Policy:
    """Fills in ``settings.round``. Raises ValueError if the folder holds no policy."""
    model = settings.model
    if not is_run:
        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            raise ValueError(f"--model {model} is neither a run folder ({_STORED}) nor a model (config.json)")
        return Policy(model, model, os.path.basename(os.path.abspath(model)))
    folder = RunFolder(model)
    finished = sorted(
        number
        for number in (int(path.name[6:]) for path in folder.path.glob("round_*") if path.name[6:].isdecimal())
        if folder.policy(number).is_dir() and {"play", "train"} & folder.manifest(number)["stages"].keys()
    )
    if not finished:
        raise ValueError(f"--model {model} is a run that has finished no round yet, so that it has no policy to answer")
    if settings.round is None:
        settings.round = finished[-1]
    if settings.round not in finished:
        numbers = ", ".join(map(str, finished))
        raise ValueError(f"--round: {settings.round} is not finished in the run {model}; finished: {numbers}")
    policy, follower = folder.policy(settings.round), folder.round(settings.round) / "follower"
    name = f"{folder.path.name}-round-{settings.round}"
    return Policy(str(policy), str(follower if follower.is_dir() else policy), name)
