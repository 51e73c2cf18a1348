"""Settings of a run: dataclasses whose fields are the command-line flags and the YAML keys.

Names follow OpenRLHF's dotted flags (``--train.batch_size``, ``--adam.lr``, ``--ds.zero_stage``). A nested dataclass is a
group; ``flags.py`` turns the tree into a parser. This module imports neither torch nor OpenRLHF, so that a dry run and
the documentation cost nothing.
"""

from __future__ import annotations

import os.path
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Literal

from openrlhf_sgpo import algorithms, flags, trl_names
from openrlhf_sgpo.data.limits import DataLimits
from openrlhf_sgpo.flags import setting


@dataclass
class ModelSettings:
    model_name_or_path: str = setting("", "policy to start from: a Hugging Face folder or hub name")
    beta: float = setting(
        0.1,
        "strength of the KL regularisation; the implicit reward is beta * log(policy / reference)",
        above=0,
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
    max_samples: int = setting(0, "read at most so many human pairs (0: all)", low=0)
    max_len: int = setting(512, "longest prompt plus response, in tokens; longer responses are cut at the end", low=1)
    chat_template_kwargs: list[str] = setting(
        [], "variables for the chat template, each as NAME=VALUE, such as enable_thinking=false"
    )
    limits: DataLimits = field(default_factory=DataLimits)


@dataclass
class SeedSettings:
    size: int = setting(0, "how many human pairs form the seed (0: all)", low=0)
    selection: Literal["random", "fps"] = setting(
        "random", "random, or fps: farthest-point selection over the initial model's prompt embeddings"
    )
    flip_rate: float = setting(0.0, "swap the labels of this share of the seed, to study label noise", low=0, high=1)
    max_epochs: int = setting(1, "epochs of DPO on the seed", low=1)
    lr: float = setting(0.0, "learning rate of the seed stage (0: --adam.lr)", low=0)


@dataclass
class RoundsSettings:
    count: int = setting(
        3,
        "rounds, after the seed stage of algorithms that have one (0: training on the human pairs alone)",
        low=0,
    )
    steps: int = setting(100, "optimiser steps of a round, for algorithms that sample in every step", low=1)
    prompts: list[int] = setting([], "prompts of each round, in order (default: all prompts, split evenly)", low=1)
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
    model_name_or_path: str = setting(
        "", "model of --oracle reward_model or preference_model; with an on-policy algorithm also of implicit"
    )
    heads: list[str] = setting([], "reward models of --oracle reward_heads, each with a vote")
    max_len: int = setting(0, "longest prompt plus response for such a model, in its tokens (0: --data.max_len)", low=0)


@dataclass
class ServerSettings:
    """An OpenAI-compatible server."""

    base_url: str = setting("", "address of the server, such as http://localhost:8000/v1")
    model: str = setting("", "the model's name there")
    api_key: str = setting(
        "",
        "where the server's key is: env (the variable OPENAI_API_KEY), env:NAME or file:PATH; a local server needs none",
        secret=True,
    )
    concurrency: int = setting(16, "requests at a time", low=1)
    max_retries: int = setting(6, "how often a request that failed is sent again, each time later", low=0)
    timeout: float = setting(
        60.0, "seconds that a request may take from beginning to end; after that it has failed", above=0
    )


@dataclass
class JudgeSettings(ServerSettings):
    swap: Literal["both", "random"] = setting(
        "both", "show two answers in both orders, or in one that the seed decides, which costs half"
    )
    logprobs: bool = setting(True, "read probabilities of the letters A and B; off: the letter that was written")
    temperature: float = setting(1.0, "temperature of the softmax over the letters' log-probabilities", above=0)


@dataclass
class TrainSettings:
    batch_size: int = setting(32, "pairs or prompts per optimiser step, over all ranks", low=1)
    micro_batch_size: int = setting(1, "pairs or prompts per forward pass and rank", low=1)
    max_epochs: int = setting(1, "epochs over a round's pairs", low=1)
    max_steps: int = setting(
        0,
        "end every stage of training on pairs after exactly so many optimiser steps, whatever its epochs (0: by epochs)",
        low=0,
    )
    seed: int = setting(42, "seed of every random choice", low=0, high=2**32 - 1)
    full_determinism_enable: bool = setting(False, "ask torch for deterministic kernels")
    layout: Literal["padded", "shared_prefix"] = setting(
        "padded",
        "padded: OpenRLHF's forward, a row per response; shared_prefix: both responses behind one copy of the prompt, "
        "logits on response tokens only (needs sdpa or eager attention)",
    )


@dataclass
class AdamSettings:
    lr: float = setting(5e-7, "peak learning rate", above=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's moment decay rates", low=0, below=1)
    eps: float = setting(1e-8, "Adam's epsilon", above=0)
    weight_decay: float = setting(0.0, "decoupled weight decay", low=0)


@dataclass
class LoraSettings:
    rank: int = setting(0, "rank of LoRA adapters (0: full fine-tuning)", low=0)
    alpha: int = setting(16, "LoRA scale", low=1)
    dropout: float = setting(0.0, "LoRA dropout", low=0, below=1)
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
    save_steps: int = setting(
        -1, "save a DeepSpeed checkpoint every so many steps of a stage, for --resume (-1: none)", low=1, also=-1
    )
    max_num: int = setting(1, "how many checkpoints to keep", low=1)
    fork_from: str = setting(
        "", "run folder whose seed stage and first samples are taken over where they would be identical"
    )


@dataclass
class EvalSettings:
    dataset: str = setting("", "held-out preference pairs; evaluated at the start and after each round")
    split: str = setting("", "split of --eval.dataset when it is a hub name (default: test, or test_prefs)")
    max_samples: int = setting(0, "use at most so many held-out pairs (0: all)", low=0)
    max_prompts: int = setting(
        0,
        "sample an answer to at most so many held-out prompts, for length, divergence and win rate (0: all in a run with "
        "rounds, none in one without)",
        low=0,
    )


@dataclass
class RolloutSettings:
    engine: Literal["vllm", "hf"] = setting("vllm", "vllm: OpenRLHF's Ray actors; hf: transformers, without vLLM")
    n_samples_per_prompt: int = setting(2, "responses sampled per prompt", low=1)
    temperature: float = setting(0.7, "sampling temperature; at 0 all samples of a prompt would be identical", above=0)
    top_p: float = setting(1.0, "nucleus sampling mass", above=0, high=1)
    max_new_tokens: int = setting(300, "longest sampled response, in tokens", low=1)
    batch_size: int = setting(16, "prompts per generate call of --rollout.engine hf", low=1)


@dataclass
class VllmSettings:
    num_engines: int = setting(1, "vLLM engines, each a Ray actor", low=1)
    tensor_parallel_size: int = setting(1, "GPUs per engine", low=1)
    gpu_memory_utilization: float = setting(0.5, "share of a GPU's memory that an engine may take", above=0, high=1)
    enable_sleep: bool = setting(True, "free the engines' GPU memory while the policy trains (no effect without a GPU)")
    enable_prefix_caching: bool = setting(True, "share the key-value cache of equal prompt prefixes")
    enforce_eager: bool = setting(False, "no CUDA graphs")


@dataclass
class WandbSettings:
    key: str = setting(
        "",
        "log to W&B, with the key in env (the variable WANDB_API_KEY, or where `wandb login` put it), env:NAME or file:PATH",
        secret=True,
    )
    org: str = setting("", "W&B entity")
    group: str = setting("", "W&B group")
    project: str = setting("openrlhf_sgpo", "W&B project")
    run_name: str = setting("", "W&B run name (default: the name of the run folder)")


@dataclass
class LoggerSettings:
    logging_steps: int = setting(1, "log metrics every so many optimiser steps", low=1)
    tensorboard_dir: str = setting("", "TensorBoard folder (default: none)")
    wandb: WandbSettings = field(default_factory=WandbSettings)


@dataclass
class Config:
    """Everything a run needs except the algorithm's own group, which the algorithm's file defines."""

    algo: str = setting("sgpo", "algorithm: a registered name, or module:Class, whose code then runs")
    model: ModelSettings = field(default_factory=ModelSettings)
    ref: RefSettings = field(default_factory=RefSettings)
    data: DataSettings = field(default_factory=DataSettings)
    seed: SeedSettings = field(default_factory=SeedSettings)
    rounds: RoundsSettings = field(default_factory=RoundsSettings)
    oracle: str = setting(
        "implicit",
        "who judges sampled answers: implicit, reward_model, reward_heads, preference_model, judge, or module:Class, whose "
        "code then runs",
    )
    reward: RewardSettings = field(default_factory=RewardSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
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
    lr_warmup_ratio: float = setting(0.1, "share of the steps that warm up", low=0, high=1)
    min_lr_ratio: float = setting(0.1, "final learning rate over peak (cosine_with_min_lr only)", low=0, high=1)
    max_norm: float = setting(1.0, "gradient norm at which gradients are clipped", low=0)
    resume: bool = setting(False, "continue the run in --ckpt.output_dir at its first unfinished stage")
    dry_run: bool = setting(False, "print the resolved configuration and stop before a model is loaded")


# Values of --ds.param_dtype by the names that torch, transformers and vLLM share.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def load(argv: Sequence[str]) -> tuple[Config, Any]:
    """The configuration and the algorithm's options from command-line arguments (without the program's name).

    Defaults that depend on other settings are filled in, so that a dump of the result says what the run did and loads
    to the same result. What a file says to other algorithms is ignored, and named on stderr: one file serves all of them.
    Raises flags.SettingsError with every problem at once; only a file that cannot be read and an algorithm that cannot be
    loaded come alone, because they decide which flags exist.
    """
    from openrlhf_sgpo.config_check import check  # it needs this module

    algorithm, (instances, given, others) = read(argv)
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
    # The absolute path, so that a run folder "." has a name too.
    folder = os.path.basename(os.path.abspath(config.ckpt.output_dir))
    config.logger.wandb.run_name = config.logger.wandb.run_name or folder
    return config, options


def read(argv: Sequence[str]) -> tuple[type[algorithms.Algorithm], flags.Parsed]:
    """The algorithm, and the settings of a run of it, unchecked. Raises flags.SettingsError as ``load`` does."""
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
    return algorithm, flags.parse(argv, sections(algorithm), elsewhere, trl_names.ANSWERS)


def _note(origins: Mapping[str, str], reasons: Mapping[str, str]) -> None:
    """Says once what of a file is ignored and why. origins: ``file:line`` by name."""
    if os.environ.get("RANK", "0") != "0":
        return
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault((origins[name].rpartition(":")[0], reason), []).append(name)
    for (file, reason), names in groups.items():
        print(
            f"note: {file}: {', '.join(names)} {'are' if len(names) > 1 else 'is'} ignored, {reason}", file=sys.stderr
        )


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


def samples(config: Config, algorithm: type[algorithms.Algorithm]) -> bool:
    """Whether the run samples answers: in its rounds, or without rounds for its evaluation."""
    evaluated = config.eval.max_prompts > 0 and config.eval.dataset != "" and algorithm.needs.reference
    return config.rounds.count > 0 or evaluated
