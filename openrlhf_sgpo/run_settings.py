"""Reads the settings of a run from flags and files, completes defaults that depend on others, and checks them.

Imports neither torch nor OpenRLHF.
"""

from __future__ import annotations

import os.path
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

from openrlhf_sgpo import algorithms, extras, flags, keys, oracle, trl_names
from openrlhf_sgpo.algorithms import Algorithm
from openrlhf_sgpo.config import Config, room_problems
from openrlhf_sgpo.data.files import is_file
from openrlhf_sgpo.data.template import argument_problems

# Read only by runs with self-annotated rounds.
_ROUNDS_ONLY = (
    *("rounds.", "rollout.n_samples_per_prompt", "data.prompt_dataset", "data.prompt_split", "ckpt.fork_from"),
    "rollout.reuse_log_probs",
    *("seed.max_epochs", "seed.lr"),  # without rounds, --train and --adam describe the only stage
)
# Read only by runs that sample.
_SAMPLES_ONLY = ("oracle", "reward.", "judge.", "rollout.", "vllm.", "eval.max_prompts")

# Read only by algorithms that train on pairs, and only by those that sample in training.
_PAIRS_ONLY = (
    *(
        "data.dataset",
        "data.max_samples",
        "seed.",
        "train.max_epochs",
        "train.max_steps",
        "train.nll_coef",
        "ckpt.fork_from",
    ),
    *("rollout.n_samples_per_prompt", "rounds.prompts", "rounds.data", "rounds.loss_reference"),
    "rollout.reuse_log_probs",
)
_BEHIND = ("rollout.steps_behind", "rollout.importance_cap")
_PLAYS_ONLY = ("rounds.steps", *_BEHIND)

# Read only by oracles, each of which says which.
_ORACLES_ONLY = ("reward.", "judge.", "rounds.judge_reference")

_REQUIRED = {
    "model.model_name_or_path": "the policy to start from",
    "data.dataset": "the human preference pairs",
    "ckpt.output_dir": "the run folder",
}

_SPLITS = {
    "data.dataset_split": "data.dataset",
    "data.prompt_split": "data.prompt_dataset",
    "eval.split": "eval.dataset",
}


def load(argv: Sequence[str]) -> tuple[Config, Any]:
    """The configuration and the algorithm's options from command-line arguments (without the program's name).

    Defaults that depend on other settings are filled in, so a dump of the result says what the run did and loads to the same
    result. A file's settings for other algorithms are ignored, with a note on stderr: one file can serve several algorithms.
    Raises flags.SettingsError with all problems at once; only an unreadable file or algorithm is reported alone, because
    these decide which flags exist.
    """
    return complete(*read(argv))


def complete(algorithm: type[Algorithm], parsed: flags.Parsed) -> tuple[Config, Any]:
    """Checks the result of ``read``, and fills in defaults that depend on other settings. See ``load``."""
    instances, given, others = parsed
    config, options = instances[""], instances[algorithm.name]
    unread = check(config, options, algorithm, given)
    _note(
        others | {name: given[name] for name in unread},
        dict.fromkeys(others, f"this run has --algo {config.algo}") | unread,
    )
    if algorithm.needs.reference:
        config.ref.model_name_or_path = config.ref.model_name_or_path or config.model.model_name_or_path
    if config.rounds.count > 0:
        config.seed.lr = config.seed.lr or config.adam.lr
    # The absolute path, so a run folder "." has a name too.
    folder = os.path.basename(os.path.abspath(config.ckpt.output_dir))
    config.logger.wandb.run_name = config.logger.wandb.run_name or folder
    return config, options


def read(
    argv: Sequence[str], more: Mapping[str, Callable[[], Any]] | None = None
) -> tuple[algorithms.AlgorithmType, flags.Parsed]:
    """The algorithm and the unchecked settings of its run. more: sections of a command beside them, by prefix. Raises
    flags.SettingsError as ``load`` does."""
    name = flags.peek(argv, "algo")
    try:
        algorithm = algorithms.get(Config().algo if name is None else name)
    except ValueError as error:
        raise flags.SettingsError(f"--algo: {error}") from error
    shared_groups = {item.name for item in fields(Config)}
    if algorithm.name in shared_groups:
        raise flags.SettingsError(
            f"--algo: {algorithm.name} cannot be an algorithm's name, --{algorithm.name} is taken"
        )
    elsewhere = {
        registered: f"belongs to --algo {registered}, this run has --algo {algorithm.name}"
        for registered in algorithms.names()
        if registered != algorithm.name and registered not in shared_groups
    }
    return algorithm, flags.parse(argv, sections(algorithm) | dict(more or {}), elsewhere, trl_names.ANSWERS)


def _note(origins: Mapping[str, str], reasons: Mapping[str, str]) -> None:
    """Prints once which settings of a file are ignored, and why. origins: ``file:line`` by name."""
    if os.environ.get("RANK", "0") != "0":
        return
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault((origins[name].rpartition(":")[0], reason), []).append(name)
    for (file, reason), names in groups.items():
        print(
            f"note: {file}: {', '.join(names)} {'are' if len(names) > 1 else 'is'} ignored, {reason}", file=sys.stderr
        )


def sections(algorithm: type[Algorithm]) -> dict[str, Callable[[], Any]]:
    """Callables that return the default settings of this algorithm's runs: its own, and the shared ones with its defaults."""

    def shared() -> Config:
        config = Config()
        defaults = {"rounds.count": config.rounds.count if algorithm.needs.rounds else 0} | algorithm.defaults
        for name, value in defaults.items():
            group, _, leaf = name.rpartition(".")
            setattr(attrgetter(group)(config) if group else config, leaf, value)
        return config

    return {"": shared, algorithm.name: algorithm.settings}


def samples(config: Config, algorithm: type[Algorithm]) -> bool:
    """Whether the run samples answers, in its rounds or for its evaluation."""
    evaluated = config.eval.max_prompts > 0 and config.eval.dataset != "" and algorithm.needs.reference
    return config.rounds.count > 0 or evaluated


def check(config: Config, options: Any, algorithm: type[Algorithm], given: Mapping[str, str]) -> dict[str, str]:
    """Raises flags.SettingsError with all problems of the values and their combination.

    given: origins of the settings that were set, as ``flags.parse`` returns them. A setting that the run does not read is a
    problem on the command line; in a file, which may serve several algorithms, it is reset to its default. Returns the reasons,
    by name, for those that were reset.
    """
    unread, default = _unread(config, algorithm, given), sections(algorithm)[""]()
    ignored = {}
    for name, reason in unread.items():
        read, standard = attrgetter(name), attrgetter(name)(default)
        if given[name] != flags.COMMAND_LINE and read(config) != standard:
            ignored[name] = reason
            group, _, leaf = name.rpartition(".")
            setattr(attrgetter(group)(config) if group else config, leaf, standard)
    problems = _missing(config, algorithm, *_REQUIRED) + flags.out_of_range({"": config}) + _check_reading(config)
    problems += [
        f"--{name}: {reason} and would not read it ({flags.COMMAND_LINE}); leave it out"
        for name, reason in unread.items()
        if given[name] == flags.COMMAND_LINE
    ]
    train, ds, rounds, rollout = config.train, config.ds, config.rounds, config.rollout
    if train.micro_batch_size > 0 and train.batch_size % train.micro_batch_size:
        problems.append(
            f"--train.batch_size: {train.batch_size} is not a multiple of --train.micro_batch_size "
            f"{train.micro_batch_size}; change one of them"
        )
    if train.layout == "padded" and train.max_tokens:
        problems.append("--train.max_tokens: is not read with --train.layout padded; leave it out, or use layout auto")
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
    if config.ckpt.output_dir.startswith("~"):
        problems.append(
            f"--ckpt.output_dir: {config.ckpt.output_dir} would be in a folder called ~, which only a shell replaces, and not "
            "after =; write the whole path"
        )
    if ds.adam_offload and not ds.zero_stage:
        problems.append("--ds.adam_offload: DeepSpeed offloads nothing at --ds.zero_stage 0; use stage 1, 2 or 3")
    if algorithm.needs.rounds and rounds.count == 0:
        problems.append(
            f"--rounds.count: 0, but --algo {algorithm.name} learns in rounds only; use --algo dpo for the human pairs alone"
        )
    if rounds.count > 0 and not algorithm.needs.reference:
        problems.append(
            f"--rounds.count: {rounds.count}, but --algo {algorithm.name} learns from the human pairs alone"
        )
    if samples(config, algorithm):
        if not oracle.judges_itself(config, algorithm):
            problems += oracle.problems(config.oracle, config)
        problems += room_problems(rollout, config.data)
    if rounds.count > 0:
        if not config.data.prompt_dataset:
            problems.append("--data.prompt_dataset: missing, the rounds need prompts; give it, or --algo dpo")
        if rounds.prompts and len(rounds.prompts) != rounds.count:
            problems.append(
                f"--rounds.prompts: {len(rounds.prompts)} numbers for --rounds.count {rounds.count}; give one per round"
            )
        if rollout.n_samples_per_prompt < algorithm.needs.samples_per_prompt:
            problems.append(
                f"--rollout.n_samples_per_prompt: {rollout.n_samples_per_prompt} is too few for --algo "
                f"{algorithm.name}, use at least {algorithm.needs.samples_per_prompt}"
            )
    if rollout.reuse_log_probs and rounds.loss_reference == "previous":
        problems.append(
            "--rollout.reuse_log_probs: with --rounds.loss_reference previous the policy is the loss's reference too, and the "
            "engine's noise would be all of its margins; use --rounds.loss_reference initial, or leave it out"
        )
    if config.logger.wandb.key not in ("", "env"):
        problems += keys.key_problems("logger.wandb.key", config.logger.wandb.key, "WANDB_API_KEY")
    problems += (
        flags.out_of_range({algorithm.name: options})
        or algorithm.option_problems(options)
        or _check_together(config, options, algorithm)
    )
    flags.refuse(problems)
    return ignored


def _missing(config: Config, algorithm: type[Algorithm], *names: str) -> list[str]:
    needless = ("data.dataset",) if algorithm.fresh_answers else ()
    return [
        f"--{name}: missing, give {_REQUIRED[name]}"
        for name in names
        if name not in needless and not attrgetter(name)(config)
    ]


def _check_reading(config: Config) -> list[str]:
    """Problems with how data are read."""
    problems = argument_problems(config.data.chat_template_kwargs)
    for split, dataset in _SPLITS.items():
        source = attrgetter(dataset)(config)
        if attrgetter(split)(config) and is_file(source):
            problems.append(f"--{split}: --{dataset} {source} is a file, which has no splits; leave it out")
    return problems


def check_data(config: Config, algorithm: type[Algorithm]) -> None:
    """Raises flags.SettingsError with all problems of the settings for reading and inspecting data."""
    problems = _missing(config, algorithm, "model.model_name_or_path", "data.dataset")
    problems += flags.out_of_range({"": config}, ("data.", "eval.", "rollout.max_new_tokens"))
    flags.refuse(problems + _check_reading(config))


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
    kind = "samples in every step" if algorithm.fresh_answers else "trains on pairs"
    add(_PAIRS_ONLY if algorithm.fresh_answers else _PLAYS_ONLY, f"--algo {algorithm.name} {kind}")
    if not samples(config, algorithm) or "rounds.count" in unread:
        without = (
            "does not sample"
            if not algorithm.needs.reference
            else "samples only for --eval.dataset and --eval.max_prompts"
        )
        add(_SAMPLES_ONLY, f"--algo {algorithm.name} with --rounds.count 0 {without}")
        return unread
    engine = {"hf": ("vllm.", *_BEHIND, "rollout.reuse_log_probs"), "vllm": ("rollout.batch_size",)}
    add(engine[config.rollout.engine], f"--rollout.engine {config.rollout.engine} is selected")
    try:
        itself = oracle.judges_itself(config, algorithm)
        reads = ("rounds.judge_reference",) if itself else oracle.get(config.oracle).reads
    except ValueError:  # an unknown oracle is reported elsewhere
        return unread
    add(_ORACLES_ONLY, f"--oracle {config.oracle} is selected", reads)
    return unread


def _check_together(config: Config, options: Any, algorithm: type[Algorithm]) -> list[str]:
    """Problems of the algorithm's settings in combination with the shared ones."""
    try:
        return algorithm(options, config.model.beta).problems(config)
    except ValueError as error:
        return [str(error)]
