"""Settings of a run: dataclasses whose fields are the command-line flags and the YAML keys.

Names follow OpenRLHF's dotted flags (``--train.batch_size``, ``--adam.lr``, ``--ds.zero_stage``). A nested dataclass is a
group; ``flags.py`` turns the tree into a parser. This module imports neither torch nor OpenRLHF, so that a dry run and
the documentation cost nothing.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, Literal

from openrlhf_sgpo import algorithms, flags
from openrlhf_sgpo.data.files import is_file
from openrlhf_sgpo.data.limits import DataLimits
from openrlhf_sgpo.flags import setting


@dataclass
class ModelSettings:
    model_name_or_path: str = setting("", "policy to start from: a Hugging Face folder or hub name")
    beta: float = setting(
        0.1, "strength of the KL regularisation; the implicit reward is beta * log(policy / reference)"
    )
    gradient_checkpointing_enable: bool = setting(False, "recompute activations in the backward pass to save memory")
    trust_remote_code: bool = setting(False, "run code that a model repository ships; off unless you have read it")


@dataclass
class RefSettings:
    model_name_or_path: str = setting("", "initial reference (default: the policy to start from)")


@dataclass
class DataSettings:
    dataset: str = setting("", "human preference pairs: prompt, chosen, rejected (JSON, JSONL, Parquet, or a hub name)")
    dataset_split: str = setting("", "split of --data.dataset when it is a hub name (default: train, or train_prefs)")
    prompt_dataset: str = setting("", "unlabelled prompts for the self-annotated rounds")
    prompt_split: str = setting("", "split of --data.prompt_dataset when it is a hub name (default: the same)")
    max_samples: int = setting(0, "read at most so many human pairs (0: all)")
    max_len: int = setting(512, "longest prompt plus response, in tokens; longer responses are cut at the end")
    limits: DataLimits = field(default_factory=DataLimits)


@dataclass
class SeedSettings:
    size: int = setting(0, "how many human pairs form the seed (0: all)")
    selection: Literal["random", "fps"] = setting(
        "random", "random, or fps: farthest-point selection over the initial model's prompt embeddings"
    )
    flip_rate: float = setting(0.0, "swap the labels of this share of the seed, to study label noise (0 to 1)")
    max_epochs: int = setting(1, "epochs of DPO on the seed")
    lr: float = setting(0.0, "learning rate of the seed stage (0: --adam.lr)")


@dataclass
class RoundsSettings:
    count: int = setting(3, "self-annotated rounds after the seed stage (0: training on the human pairs alone)")
    prompts: list[int] = setting([], "prompts of each round, in order (default: all prompts, split evenly)")
    data: Literal["new", "all"] = setting(
        "new", "train a round on its own pairs, or on all pairs so far, seed included"
    )
    judge_reference: Literal["initial", "previous"] = setting(
        "initial",
        "reference of the implicit reward that ranks answers: the initial model, or the policy one round back",
    )
    loss_reference: Literal["initial", "previous"] = setting(
        "initial", "reference of the loss and the follower: the initial model, or the policy that enters the round"
    )


@dataclass
class RewardSettings:
    model_name_or_path: str = setting("", "reward model of --oracle reward_model, as OpenRLHF trains them")
    max_len: int = setting(0, "longest prompt plus response for the reward model, in its tokens (0: --data.max_len)")


@dataclass
class TrainSettings:
    batch_size: int = setting(32, "pairs per optimiser step, over all ranks")
    micro_batch_size: int = setting(1, "pairs per forward pass and rank")
    max_epochs: int = setting(1, "epochs over a round's pairs")
    seed: int = setting(42, "seed of every random choice")
    full_determinism_enable: bool = setting(False, "ask torch for deterministic kernels")
    layout: Literal["padded", "shared_prefix"] = setting(
        "padded",
        "padded: OpenRLHF's forward, a row per response; shared_prefix: both responses behind one copy of the prompt, "
        "logits on response tokens only (needs sdpa or eager attention)",
    )


@dataclass
class AdamSettings:
    lr: float = setting(5e-7, "peak learning rate")
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's moment decay rates")
    eps: float = setting(1e-8, "Adam's epsilon")
    weight_decay: float = setting(0.0, "decoupled weight decay")


@dataclass
class LoraSettings:
    rank: int = setting(0, "rank of LoRA adapters (0: full fine-tuning)")
    alpha: int = setting(16, "LoRA scale")
    dropout: float = setting(0.0, "LoRA dropout")
    target_modules: list[str] = setting(["all-linear"], "modules that get an adapter")


@dataclass
class DeepspeedSettings:
    zero_stage: Literal[0, 1, 2, 3] = setting(2, "DeepSpeed ZeRO stage")
    param_dtype: Literal["bf16", "fp16", "fp32"] = setting("bf16", "dtype of the parameters; optimiser states are fp32")
    attn_implementation: str = setting("sdpa", "sdpa, eager, flash_attention_2, ...")
    adam_offload: bool = setting(False, "keep optimiser states on the CPU")
    packing_samples: bool = setting(False, "OpenRLHF's packing without padding (needs flash_attention_2)")
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass
class CkptSettings:
    output_dir: str = setting("", "run folder")
    save_steps: int = setting(-1, "save a DeepSpeed checkpoint every so many steps of a stage, for --resume (-1: none)")
    max_num: int = setting(1, "how many checkpoints to keep")
    fork_from: str = setting(
        "", "run folder whose seed stage and first samples are taken over where they would be made again just so"
    )


@dataclass
class EvalSettings:
    dataset: str = setting("", "held-out preference pairs; evaluated at the start and after each round")
    split: str = setting("", "split of --eval.dataset when it is a hub name (default: test, or test_prefs)")
    max_samples: int = setting(0, "use at most so many held-out pairs (0: all)")
    max_prompts: int = setting(
        0, "sample an answer to at most so many held-out prompts (0: all), for length and divergence"
    )


@dataclass
class RolloutSettings:
    engine: Literal["vllm", "hf"] = setting("vllm", "vllm: OpenRLHF's Ray actors; hf: transformers, without vLLM")
    n_samples_per_prompt: int = setting(2, "responses sampled per prompt")
    temperature: float = setting(0.7, "sampling temperature")
    top_p: float = setting(1.0, "nucleus sampling mass")
    max_new_tokens: int = setting(300, "longest sampled response, in tokens")
    batch_size: int = setting(16, "prompts per generate call of --rollout.engine hf")


@dataclass
class VllmSettings:
    num_engines: int = setting(1, "vLLM engines, each a Ray actor")
    tensor_parallel_size: int = setting(1, "GPUs per engine")
    gpu_memory_utilization: float = setting(0.5, "share of a GPU's memory that an engine may take")
    enable_sleep: bool = setting(True, "free the engines' GPU memory while the policy trains (no effect without a GPU)")
    enable_prefix_caching: bool = setting(True, "share the key-value cache of equal prompt prefixes")
    enforce_eager: bool = setting(False, "no CUDA graphs")


@dataclass
class WandbSettings:
    key: str = setting(
        "", "W&B API key (never stored; prefer the environment variable WANDB_API_KEY with `env` here)", secret=True
    )
    org: str = setting("", "W&B entity")
    group: str = setting("", "W&B group")
    project: str = setting("openrlhf_sgpo", "W&B project")
    run_name: str = setting("", "W&B run name (default: the name of the run folder)")


@dataclass
class LoggerSettings:
    logging_steps: int = setting(1, "log metrics every so many optimiser steps")
    tensorboard_dir: str = setting("", "TensorBoard folder (default: none)")
    wandb: WandbSettings = field(default_factory=WandbSettings)


@dataclass
class Config:
    """Everything a run needs except the algorithm's own group, which the algorithm's file defines."""

    algo: str = setting("sgpo", "algorithm: a registered name, or module:Class")
    model: ModelSettings = field(default_factory=ModelSettings)
    ref: RefSettings = field(default_factory=RefSettings)
    data: DataSettings = field(default_factory=DataSettings)
    seed: SeedSettings = field(default_factory=SeedSettings)
    rounds: RoundsSettings = field(default_factory=RoundsSettings)
    oracle: Literal["implicit", "reward_model"] = setting(
        "implicit",
        "who ranks sampled answers: the policy's implicit reward, or the model of --reward.model_name_or_path",
    )
    reward: RewardSettings = field(default_factory=RewardSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    adam: AdamSettings = field(default_factory=AdamSettings)
    ds: DeepspeedSettings = field(default_factory=DeepspeedSettings)
    ckpt: CkptSettings = field(default_factory=CkptSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    vllm: VllmSettings = field(default_factory=VllmSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    lr_scheduler: Literal[
        "cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = setting("cosine_with_min_lr", "learning-rate schedule, by its transformers name")
    lr_warmup_ratio: float = setting(0.1, "share of the steps that warm up")
    min_lr_ratio: float = setting(0.1, "final learning rate over peak (cosine_with_min_lr only)")
    max_norm: float = setting(1.0, "gradient norm at which gradients are clipped")
    resume: bool = setting(False, "continue the run in --ckpt.output_dir at its first unfinished stage")
    dry_run: bool = setting(False, "print the resolved configuration and stop before a model is loaded")


# Values of --ds.param_dtype by the names that torch, transformers and vLLM share.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# Only a run with self-annotated rounds reads these.
_ROUNDS_ONLY = (
    *(
        "rounds.",
        "oracle",
        "reward.",
        "rollout.",
        "vllm.",
        "data.prompt_dataset",
        "data.prompt_split",
        "ckpt.fork_from",
    ),
    "eval.max_prompts",
    *("seed.max_epochs", "seed.lr"),  # without rounds there is one stage, which --train and --adam describe
)

_REQUIRED = {
    "model.model_name_or_path": "the policy to start from",
    "data.dataset": "the human preference pairs",
    "ckpt.output_dir": "the run folder",
}

_AT_LEAST_ONE = (
    *("data.max_len", "seed.max_epochs", "train.max_epochs", "train.batch_size", "train.micro_batch_size"),
    *("rollout.n_samples_per_prompt", "rollout.max_new_tokens", "rollout.batch_size"),
    *("vllm.num_engines", "vllm.tensor_parallel_size", "ckpt.max_num", "logger.logging_steps", "ds.lora.alpha"),
)
_AT_LEAST_ZERO = (
    *(
        "data.max_samples",
        "eval.max_samples",
        "eval.max_prompts",
        "reward.max_len",
        "seed.size",
        "seed.lr",
        "rounds.count",
        "train.seed",
    ),
    *("adam.weight_decay", "ds.lora.rank", "max_norm"),
)
_POSITIVE = ("model.beta", "adam.lr", "adam.eps")
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


def load(argv: Sequence[str]) -> tuple[Config, Any]:
    """The configuration and the algorithm's options from command-line arguments (without the program's name).

    Defaults that depend on other settings are filled in, so that a dump of the result says what the run did and loads
    to the same result. Raises flags.SettingsError with every problem at once; only a file that cannot be read and an
    algorithm that cannot be loaded come alone, because they decide which flags exist.
    """
    name = flags.peek(argv, "algo")
    try:
        algorithm = algorithms.get(Config().algo if name is None else name)
    except ValueError as error:
        raise flags.SettingsError(f"--algo: {error}") from error
    own = {item.name for item in fields(Config)}
    if algorithm.name in own:
        raise flags.SettingsError(
            f"--algo: {algorithm.name} cannot be an algorithm's name, --{algorithm.name} is taken"
        )
    elsewhere = {
        other: f"belongs to --algo {other}, this run has --algo {algorithm.name}"
        for other in algorithms.names()
        if other != algorithm.name and other not in own
    }
    instances, given = flags.parse(argv, sections(algorithm), elsewhere)
    config, options = instances[""], instances[algorithm.name]
    check(config, options, algorithm, given)
    config.ref.model_name_or_path = config.ref.model_name_or_path or config.model.model_name_or_path
    if has_rounds(config, algorithm):
        config.seed.lr = config.seed.lr or config.adam.lr
    # The absolute path, so that a run folder "." has a name too.
    folder = os.path.basename(os.path.abspath(config.ckpt.output_dir))
    config.logger.wandb.run_name = config.logger.wandb.run_name or folder
    return config, options


def sections(algorithm: type[algorithms.Algorithm]) -> dict[str, Callable[[], Any]]:
    """What makes the default settings of a run of this algorithm, by group: its own, and the shared ones as it wants them."""

    def shared() -> Config:
        config = Config()
        defaults = {"rounds.count": config.rounds.count if algorithm.needs.rounds else 0} | algorithm.defaults
        for name, value in defaults.items():
            group, _, leaf = name.rpartition(".")
            setattr(attrgetter(group)(config) if group else config, leaf, value)
        return config

    return {"": shared, algorithm.name: algorithm.settings}


def has_rounds(config: Config, algorithm: type[algorithms.Algorithm]) -> bool:
    """Whether a seed stage comes first, with the settings of its own (``--seed.lr``, ``--seed.max_epochs``)."""
    return algorithm.needs.rounds or config.rounds.count > 0


def check(
    config: Config, options: Any, algorithm: type[algorithms.Algorithm], given: Mapping[str, str] | None = None
) -> None:
    """Raises flags.SettingsError with everything that is wrong with the values or their combination.

    given: origin of the settings that were given explicitly, as ``flags.parse`` returns it; without it, a setting that
    the algorithm would not read goes unnoticed.
    """
    problems = _check_ranges(config) + _check_unread(config, algorithm, given or {})
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
    elif ds.packing_samples and find_spec("flash_attn") is None:
        problems.append("--ds.packing_samples: needs the package flash_attn, which is not installed")
    if "flash_attention" in ds.attn_implementation and ds.param_dtype == "fp32":
        problems.append(
            f"--ds.param_dtype: {ds.attn_implementation} does not work in fp32; use bf16, or --ds.attn_implementation sdpa"
        )
    if ds.packing_samples and train.layout == "shared_prefix":
        problems.append("--ds.packing_samples: does not work with --train.layout shared_prefix; use one of the two")
    if has_rounds(config, algorithm):
        if config.oracle == "reward_model" and not config.reward.model_name_or_path:
            problems.append("--reward.model_name_or_path: missing, --oracle reward_model needs it")
        if rounds.count > 0 and not config.data.prompt_dataset:
            problems.append("--data.prompt_dataset: missing, the rounds need prompts; give it, or --rounds.count 0")
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
        if rollout.max_new_tokens >= config.data.max_len:
            problems.append(
                f"--rollout.max_new_tokens: {rollout.max_new_tokens} leaves no room for a prompt within --data.max_len "
                f"{config.data.max_len}; lower the one or raise the other"
            )
    problems += algorithm.check(options)
    if problems:
        raise flags.SettingsError(*problems)


def _check_ranges(config: Config) -> list[str]:
    """Problems with single values."""

    def outside(names: Sequence[str], allowed: str, inside: Any) -> list[str]:
        values = {name: attrgetter(name)(config) for name in names}
        return [
            f"--{name}: {value} is out of range, use {allowed}" for name, value in values.items() if not inside(value)
        ]

    problems = [f"--{name}: missing, give {what}" for name, what in _REQUIRED.items() if not attrgetter(name)(config)]
    problems += outside(_AT_LEAST_ONE, "at least 1", lambda value: value >= 1)
    problems += outside(_AT_LEAST_ZERO, "at least 0", lambda value: value >= 0)
    problems += outside(_POSITIVE, "more than 0", lambda value: value > 0)
    problems += outside(_SHARES, "0 to 1", lambda value: 0 <= value <= 1)
    problems += outside(_POSITIVE_SHARES, "more than 0, at most 1", lambda value: 0 < value <= 1)
    problems += outside(("ds.lora.dropout",), "0 or more, less than 1", lambda value: 0 <= value < 1)
    problems += outside(
        ("adam.betas",), "two of 0 or more, less than 1", lambda value: all(0 <= item < 1 for item in value)
    )
    problems += outside(("ckpt.save_steps",), "at least 1, or -1 for none", lambda value: value == -1 or value >= 1)
    if config.rollout.temperature <= 0:
        problems.append(
            f"--rollout.temperature: {config.rollout.temperature} makes all samples of a prompt identical, use more than 0"
        )
    for split, dataset in _SPLITS.items():
        source = attrgetter(dataset)(config)
        if attrgetter(split)(config) and is_file(source):
            problems.append(f"--{split}: --{dataset} {source} is a file, which has no splits; leave it out")
    return problems


def check_data(config: Config) -> None:
    """Raises flags.SettingsError with what is wrong for reading and inspecting data; nothing else is looked at."""
    wanted = ("--data.", "--eval.", "--model.model_name_or_path", "--rollout.max_new_tokens")
    problems = [problem for problem in _check_ranges(config) if problem.startswith(wanted)]
    if problems:
        raise flags.SettingsError(*problems)


def _check_unread(config: Config, algorithm: type[algorithms.Algorithm], given: Mapping[str, str]) -> list[str]:
    """Settings that were given although the algorithm does not read them.

    A file may state a default, for a dumped configuration states all of them.
    """
    default = sections(algorithm)[""]()

    def unread(prefixes: tuple[str, ...], reason: str, even_in_a_file: bool) -> list[str]:
        return [
            f"--{name}: {reason} and would not read it ({origin}); leave it out"
            for name, origin in given.items()
            if name.startswith(prefixes)
            and name != "rounds.count"
            and (
                origin == flags.COMMAND_LINE
                or (even_in_a_file and attrgetter(name)(config) != attrgetter(name)(default))
            )
        ]

    if not has_rounds(config, algorithm):
        return unread(_ROUNDS_ONLY, f"--algo {algorithm.name} with --rounds.count 0 has no rounds", True)
    engine = {"hf": ("vllm.",), "vllm": ("rollout.batch_size",)}[config.rollout.engine]
    judge = {"implicit": ("reward.",), "reward_model": ("rounds.judge_reference",)}[config.oracle]
    return [
        *unread(engine, f"--rollout.engine {config.rollout.engine} is not the one", False),
        *unread(judge, f"--oracle {config.oracle} is not the one", False),
    ]
