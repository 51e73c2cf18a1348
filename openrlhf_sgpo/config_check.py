"""What may be wrong with the settings of a run, found before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

from openrlhf_sgpo import extras, flags, keys, oracle
from openrlhf_sgpo.algorithms import Algorithm
from openrlhf_sgpo.algorithms.on_policy import OnPolicyAlgorithm
from openrlhf_sgpo.config import Config, samples, sections
from openrlhf_sgpo.data.files import is_file
from openrlhf_sgpo.data.limits import DataLimits
from openrlhf_sgpo.data.template import template_arguments

# Only a run with self-annotated rounds reads these.
_ROUNDS_ONLY = (
    *("rounds.", "rollout.n_samples_per_prompt", "data.prompt_dataset", "data.prompt_split", "ckpt.fork_from"),
    *("seed.max_epochs", "seed.lr"),  # without rounds there is one stage, which --train and --adam describe
)
# Only a run that samples reads these.
_SAMPLES_ONLY = ("oracle", "reward.", "judge.", "rollout.", "vllm.", "eval.max_prompts")

# Only algorithms that train on pairs read these, and only those that sample in training read the others.
_PAIRS_ONLY = (
    *(
        "data.dataset",
        "data.max_samples",
        "seed.",
        "train.max_epochs",
        "train.max_steps",
        "rollout.n_samples_per_prompt",
        "ckpt.fork_from",
    ),
    *("rounds.prompts", "rounds.data", "rounds.loss_reference"),
)
_PLAYS_ONLY = ("rounds.steps",)

# Only oracles read these, and each says which.
_ORACLES_ONLY = ("reward.", "judge.", "rounds.judge_reference")

_REQUIRED = {
    "model.model_name_or_path": "the policy to start from",
    "data.dataset": "the human preference pairs",
    "ckpt.output_dir": "the run folder",
}

_AT_LEAST_ONE = (
    *("data.max_len", "seed.max_epochs", "train.max_epochs", "train.batch_size", "train.micro_batch_size"),
    *("rounds.steps", "rollout.n_samples_per_prompt", "rollout.max_new_tokens", "rollout.batch_size"),
    *("vllm.num_engines", "vllm.tensor_parallel_size", "ckpt.max_num", "logger.logging_steps", "ds.lora.alpha"),
    "judge.concurrency",
)
_AT_LEAST_ZERO = (
    *(
        "data.max_samples",
        "eval.max_samples",
        "eval.max_prompts",
        "seed.size",
        "seed.lr",
        "rounds.count",
        "reward.max_len",
        "train.max_steps",
    ),
    *("adam.weight_decay", "ds.lora.rank", "max_norm", "judge.max_retries"),
)
_POSITIVE = ("model.beta", "adam.lr", "adam.eps", "judge.timeout", "judge.temperature")
_POSITIVE_SHARES = ("rollout.top_p", "vllm.gpu_memory_utilization")
_SHARES = (
    *("seed.flip_rate", "lr_warmup_ratio", "min_lr_ratio"),
    *(f"data.limits.{item.name}" for item in fields(DataLimits)),
)
_SPLITS = {
    "data.dataset_split": "data.dataset",
    "data.prompt_split": "data.prompt_dataset",
    "eval.split": "eval.dataset",
}


def check(
    config: Config, options: Any, algorithm: type[Algorithm], given: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Raises flags.SettingsError with everything that is wrong with the values or their combination.

    given: origin of the settings that were given explicitly, as ``flags.parse`` returns it; without it, a setting that
    the run would not read goes unnoticed. Such a setting is a problem on the command line; in a file, which may serve
    several algorithms, it gets back its default. Returns why, by the names of those that were not at their defaults.
    """
    unread, default = _unread(config, algorithm, given or {}), sections(algorithm)[""]()
    ignored = {}
    for name, reason in unread.items():
        read, standard = attrgetter(name), attrgetter(name)(default)
        if given and given[name] != flags.COMMAND_LINE and read(config) != standard:
            ignored[name] = reason
            group, _, leaf = name.rpartition(".")
            setattr(attrgetter(group)(config) if group else config, leaf, standard)
    problems = _check_ranges(config, algorithm) + [
        f"--{name}: {reason} and would not read it ({flags.COMMAND_LINE}); leave it out"
        for name, reason in unread.items()
        if given and given[name] == flags.COMMAND_LINE
    ]
    train, ds, rounds, rollout = config.train, config.ds, config.rounds, config.rollout
    if train.micro_batch_size > 0 and train.batch_size % train.micro_batch_size:
        problems.append(
            f"--train.batch_size: {train.batch_size} is not a multiple of --train.micro_batch_size "
            f"{train.micro_batch_size}; change one of them"
        )
    if train.layout == "shared_prefix" and ds.attn_implementation not in ("sdpa", "eager"):
        problems.append(
            f"--train.layout: shared_prefix does not work with --ds.attn_implementation {ds.attn_implementation}; "
            "use sdpa or eager, or the layout padded"
        )
    if ds.packing_samples and "flash_attention" not in ds.attn_implementation:
        problems.append(
            f"--ds.packing_samples: does not work with --ds.attn_implementation {ds.attn_implementation}; "
            "use flash_attention_2, or leave packing off"
        )
    elif ds.packing_samples and (problem := extras.missing("flash_attn")):
        problems.append(f"--ds.packing_samples: {problem}")
    if "flash_attention" in ds.attn_implementation and ds.param_dtype == "fp32":
        problems.append(
            f"--ds.param_dtype: {ds.attn_implementation} does not work in fp32; use bf16, or --ds.attn_implementation sdpa"
        )
    if ds.packing_samples and train.layout == "shared_prefix":
        problems.append("--ds.packing_samples: does not work with --train.layout shared_prefix; use one of the two")
    if algorithm.needs.rounds and rounds.count == 0:
        problems.append(
            f"--rounds.count: 0, but --algo {algorithm.name} learns in rounds only; use --algo dpo for the human pairs alone"
        )
    if rounds.count > 0 and not algorithm.needs.reference:
        problems.append(
            f"--rounds.count: {rounds.count}, but --algo {algorithm.name} learns from the human pairs alone"
        )
    if samples(config, algorithm):
        problems += _check_oracle(config, algorithm)
        if rollout.max_new_tokens >= config.data.max_len:
            problems.append(
                f"--rollout.max_new_tokens: {rollout.max_new_tokens} leaves no room for a prompt within --data.max_len "
                f"{config.data.max_len}; lower the one or raise the other"
            )
    if rounds.count > 0:
        if not config.data.prompt_dataset:
            problems.append("--data.prompt_dataset: missing, the rounds need prompts; give it, or --algo dpo")
        if rounds.prompts and len(rounds.prompts) != rounds.count:
            problems.append(
                f"--rounds.prompts: {len(rounds.prompts)} numbers for --rounds.count {rounds.count}; give one per round"
            )
        if any(count < 1 for count in rounds.prompts):
            problems.append("--rounds.prompts: a round needs at least 1 prompt; lower --rounds.count instead")
        if rollout.n_samples_per_prompt < algorithm.needs.samples_per_prompt:
            problems.append(
                f"--rollout.n_samples_per_prompt: {rollout.n_samples_per_prompt} is too few for --algo "
                f"{algorithm.name}, use at least {algorithm.needs.samples_per_prompt}"
            )
    if config.logger.wandb.key not in ("", "env"):
        problems += keys.problems("logger.wandb.key", config.logger.wandb.key, "WANDB_API_KEY")
    problems += algorithm.check(options) or _check_on_policy(config, options, algorithm)
    if problems:
        raise flags.SettingsError(*problems)
    return ignored


def _check_ranges(config: Config, algorithm: type[Algorithm] = Algorithm) -> list[str]:
    """Problems with single values."""

    def outside(names: Sequence[str], allowed: str, inside: Any) -> list[str]:
        values = {name: attrgetter(name)(config) for name in names}
        return [
            f"--{name}: {value} is out of range, use {allowed}" for name, value in values.items() if not inside(value)
        ]

    without_pairs = issubclass(algorithm, OnPolicyAlgorithm)
    required = {name: what for name, what in _REQUIRED.items() if not (without_pairs and name == "data.dataset")}
    problems = [f"--{name}: missing, give {what}" for name, what in required.items() if not attrgetter(name)(config)]
    problems += outside(_AT_LEAST_ONE, "at least 1", lambda value: value >= 1)
    problems += outside(_AT_LEAST_ZERO, "at least 0", lambda value: value >= 0)
    problems += outside(_POSITIVE, "more than 0", lambda value: value > 0)
    problems += outside(_SHARES, "0 to 1", lambda value: 0 <= value <= 1)
    problems += outside(_POSITIVE_SHARES, "more than 0, at most 1", lambda value: 0 < value <= 1)
    problems += outside(("train.seed",), "0 to 4294967295", lambda value: 0 <= value < 2**32)  # NumPy takes no other
    problems += outside(("ds.lora.dropout",), "0 or more, less than 1", lambda value: 0 <= value < 1)
    problems += outside(
        ("adam.betas",), "two of 0 or more, less than 1", lambda value: all(0 <= item < 1 for item in value)
    )
    problems += outside(("ckpt.save_steps",), "at least 1, or -1 for none", lambda value: value == -1 or value >= 1)
    if config.rollout.temperature <= 0:
        problems.append(
            f"--rollout.temperature: {config.rollout.temperature} makes all samples of a prompt identical, use more than 0"
        )
    try:
        template_arguments(config.data.chat_template_kwargs)
    except ValueError as error:
        problems.append(str(error))
    for split, dataset in _SPLITS.items():
        source = attrgetter(dataset)(config)
        if attrgetter(split)(config) and is_file(source):
            problems.append(f"--{split}: --{dataset} {source} is a file, which has no splits; leave it out")
    return problems


def check_data(config: Config, algorithm: type[Algorithm]) -> None:
    """Raises flags.SettingsError with what is wrong for reading and inspecting data; nothing else is looked at."""
    wanted = ("--data.", "--eval.", "--model.model_name_or_path", "--rollout.max_new_tokens")
    problems = [problem for problem in _check_ranges(config, algorithm) if problem.startswith(wanted)]
    if problems:
        raise flags.SettingsError(*problems)


def sampling_problems(config: Config) -> list[str]:
    """What is wrong with single values that are read for answers and their comparison, where nothing is trained."""
    wanted = (
        *("--data.max_len", "--data.chat_template_kwargs", "--data.limits.", "--train.seed", "--train.micro"),
        *("--rollout.", "--vllm.", "--reward.", "--judge."),
    )
    return [problem for problem in _check_ranges(config) if problem.startswith(wanted)]


def _unread(config: Config, algorithm: type[Algorithm], given: Mapping[str, str]) -> dict[str, str]:
    """Settings that were given although the run would not read them, with the reason."""
    unread: dict[str, str] = {}

    def add(prefixes: tuple[str, ...], reason: str, reads: tuple[str, ...] = ()) -> None:
        for name in given:
            if name.startswith(prefixes) and not name.startswith(reads):
                unread.setdefault(name, reason)

    if not algorithm.needs.reference and given.get("rounds.count", flags.COMMAND_LINE) != flags.COMMAND_LINE:
        add(("rounds.count",), f"--algo {algorithm.name} learns from the human pairs alone")
    if config.rounds.count == 0 or "rounds.count" in unread:
        add(_ROUNDS_ONLY, f"--algo {algorithm.name} with --rounds.count 0 has no rounds", ("rounds.count",))
        if not algorithm.needs.reference:
            add(("model.beta", "ref."), f"--algo {algorithm.name} has no reference")
    on_policy = issubclass(algorithm, OnPolicyAlgorithm)
    kind = "samples in every step" if on_policy else "trains on pairs"
    add(_PAIRS_ONLY if on_policy else _PLAYS_ONLY, f"--algo {algorithm.name} {kind}")
    if not samples(config, algorithm) or "rounds.count" in unread:
        without = (
            "does not sample"
            if not algorithm.needs.reference
            else "samples only for --eval.dataset and --eval.max_prompts"
        )
        add(_SAMPLES_ONLY, f"--algo {algorithm.name} with --rounds.count 0 {without}")
        return unread
    # Transformers draws from a mixture whatever the engine.
    engine = {"hf": ("vllm.",), "vllm": () if hasattr(algorithm.settings, "mixture") else ("rollout.batch_size",)}
    add(engine[config.rollout.engine], f"--rollout.engine {config.rollout.engine} is not the one")
    try:
        itself = oracle.judges_itself(config, algorithm)
        reads = ("rounds.judge_reference",) if itself else oracle.get(config.oracle).reads
    except ValueError:  # an unknown oracle is a problem of its own
        return unread
    add(_ORACLES_ONLY, f"--oracle {config.oracle} is not the one", reads)
    return unread


def _check_on_policy(config: Config, options: Any, algorithm: type[Algorithm]) -> list[str]:
    """Problems of an algorithm that samples in every step with the shared settings."""
    if not issubclass(algorithm, OnPolicyAlgorithm):
        return []
    try:
        play = algorithm(options, config.model.beta)
    except ValueError as error:
        return [str(error)]
    problems = play.problems(config)
    if config.rollout.top_p < 1:
        problems.append(
            f"--rollout.top_p: {config.rollout.top_p} cuts the distribution whose log-probabilities --algo {play.name} needs "
            "whole; use 1"
        )
    if play.adapters and config.ds.lora.rank == 0:
        names = " and ".join(play.adapters.values())
        problems.append(f"--ds.lora.rank: 0, but --algo {play.name} is to train the adapters {names}; use at least 1")
    if "follower" in play.roles and 2 * config.rollout.max_new_tokens >= config.data.max_len:
        problems.append(
            f"--data.max_len: {config.data.max_len} leaves no room for a prompt, a draft and the follower's answer of "
            f"--rollout.max_new_tokens {config.rollout.max_new_tokens} each; raise the one or lower the other"
        )
    return problems


def _check_oracle(config: Config, algorithm: type[Algorithm]) -> list[str]:
    if oracle.judges_itself(config, algorithm):
        return []
    try:
        return oracle.get(config.oracle).problems(config)
    except ValueError as error:
        return [f"--oracle: {error}"]
