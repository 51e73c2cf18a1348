"""Settings of a run: dataclasses whose fields are command-line flags and YAML keys.

Names follow OpenRLHF's dotted flags (``--train.batch_size``, ``--adam.lr``, ``--ds.zero_stage``). A nested dataclass is a
group; ``flags.py`` makes a parser of the tree, and ``run_settings.py`` reads, completes and checks it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from openrlhf_sgpo.flags import setting


@dataclass
class ModelSettings:
    model_name_or_path: str = setting("", "policy to start from: a Hugging Face folder or hub name")
    beta: float = setting(
        0.1, "strength of the KL regularisation; the implicit reward is beta * log(policy / reference)", above=0
    )
    gradient_checkpointing_enable: bool = setting(False, "recompute activations in the backward pass to save memory")
    trust_remote_code: bool = setting(
        False, "run code from the model's repository; turn it on only if you have read the code"
    )


@dataclass
class RefSettings:
    model_name_or_path: str = setting("", "initial reference (default: the policy to start from)")


def _limit(share: float, finding: str) -> Any:
    return setting(share, finding, low=0, high=1)


@dataclass
class DataLimits:
    """The largest accepted share of rows with each finding. ``docs/data.md`` defines the findings."""

    malformed: float = _limit(0.05, "rows of a hub dataset that cannot be read, at most (in a file there may be none)")
    refused: float = _limit(0.01, "conversations on which the chat template fails, at most")
    empty: float = _limit(0.05, "pairs with an empty prompt or response, at most")
    identical: float = _limit(0.05, "pairs whose responses are the same, at most")
    too_long: float = _limit(0.5, "prompts that leave no room for a response within --data.max_len, at most")
    truncated: float = _limit(0.6, "pairs with a response that is cut by --data.max_len or marked as cut, at most")
    missing_eos: float = _limit(0.05, "pairs with an uncut response that does not end in an end of turn, at most")
    double_bos: float = _limit(0.01, "conversations with a doubled begin-of-sequence token, at most")
    double_eos: float = _limit(0.01, "conversations whose texts contain the end-of-turn token, at most")
    open_thought: float = _limit(
        0.01, "pairs with an uncut response that does not close the thought that the chat template opens, at most"
    )
    near_identical: float = _limit(0.2, "pairs with nearly identical responses, at most")
    repeats_prompt: float = _limit(0.05, "pairs with a response that begins with the prompt, at most")
    duplicate: float = _limit(0.1, "rows that repeat an earlier one, at most")
    contradictory: float = _limit(0.02, "pairs that prefer the opposite of an earlier pair, at most")
    benchmark: float = _limit(0.01, "conversations that begin with a prompt of AlpacaEval or MT-Bench, at most")
    held_out: float = _limit(0.01, "prompts of --eval.dataset that also occur in --data.dataset, at most")


@dataclass
class DataSettings:
    dataset: str = setting("", "human preference pairs: prompt, chosen, rejected (JSON, JSONL, Parquet, or a hub name)")
    dataset_split: str = setting("", "split of --data.dataset if it is a hub name (default: train, or train_prefs)")
    prompt_dataset: str = setting("", "unlabelled prompts for the self-annotated rounds")
    prompt_split: str = setting("", "split of --data.prompt_dataset if it is a hub name (default: the same)")
    max_samples: int = setting(0, "read at most this many human pairs (0: all)", low=0)
    max_len: int = setting(512, "longest prompt plus response, in tokens; longer responses are cut at the end", low=1)
    chat_template_kwargs: list[str] = setting(
        [], "variables for the chat template, each as NAME=VALUE, such as enable_thinking=false"
    )
    limits: DataLimits = field(default_factory=DataLimits)


@dataclass
class SeedSettings:
    size: int = setting(0, "number of human pairs in the seed (0: all)", low=0)
    selection: Literal["random", "fps"] = setting(
        "random", "random, or fps: farthest-point selection over the initial model's prompt embeddings"
    )
    flip_rate: float = setting(0.0, "swap the labels of this share of the seed, to study label noise", low=0, high=1)
    max_epochs: int = setting(1, "epochs of DPO on the seed", low=1)
    lr: float = setting(0.0, "learning rate of the seed stage (0: --adam.lr)", low=0)


@dataclass
class RoundsSettings:
    count: int = setting(
        3, "rounds, after the seed stage of algorithms that have one (0: train only on the human pairs)", low=0
    )
    steps: int = setting(100, "optimiser steps per round, for algorithms that sample in every step", low=1)
    prompts: list[int] = setting(
        [], "number of prompts in each round, in order (default: all prompts, split evenly)", low=1
    )
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
        "", "model of --oracle reward_model or preference_model; in runs that sample in every step also of implicit"
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
    max_retries: int = setting(6, "how often a failed request is sent again, each time after a longer wait", low=0)
    timeout: float = setting(
        60.0, "seconds that a request may take from beginning to end; after that it has failed", above=0
    )


@dataclass
class JudgeSettings(ServerSettings):
    swap: Literal["both", "random"] = setting(
        "both", "show two answers in both orders, or in one that the seed decides, which costs half"
    )
    logprobs: bool = setting(True, "read probabilities of the letters A and B; false: the letter that was written")
    temperature: float = setting(1.0, "temperature of the softmax over the letters' log-probabilities", above=0)


@dataclass
class TrainSettings:
    batch_size: int = setting(32, "pairs or prompts per optimiser step, over all ranks", low=1)
    micro_batch_size: int = setting(
        1, "pairs or prompts per padded forward pass and rank; see --train.max_tokens", low=1
    )
    max_epochs: int = setting(1, "epochs over a round's pairs", low=1)
    max_steps: int = setting(
        0,
        "end every training stage on pairs after exactly this many optimiser steps, whatever its epochs (0: by epochs)",
        low=0,
    )
    nll_coef: float = setting(
        0.0,
        "add this multiple of the chosen response's negative log-likelihood per token to the loss of each pair (RPO)",
        low=0,
    )
    seed: int = setting(42, "seed of every random choice", low=0, high=2**32 - 1)
    full_determinism_enable: bool = setting(False, "ask torch for deterministic kernels")
    layout: Literal["auto", "padded"] = setting(
        "auto",
        "auto: each prompt once, followed by its responses, without padding, where the model's attention allows it; padded: "
        "OpenRLHF's forward, a row per response",
    )
    max_tokens: int = setting(
        0,
        "tokens per forward pass and rank with --train.layout auto, as many pairs or prompts as fit (0: twice --data.max_len "
        "for each of --train.micro_batch_size)",
        low=0,
    )
    score_tokens: int = setting(
        0,
        "tokens per forward pass and rank where responses are only scored and nothing is kept for a backward pass (0: twice "
        "those of training)",
        low=0,
    )

    def uneven(self, world_size: int) -> str:
        """Why a step cannot be split into equal micro-batches over so many ranks; empty if it can."""
        if self.batch_size % (self.micro_batch_size * world_size) == 0:
            return ""
        return (
            f"--train.batch_size {self.batch_size} must be a multiple of --train.micro_batch_size {self.micro_batch_size} "
            f"times the number of ranks, {world_size}"
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

    def of_peft(self) -> dict[str, Any]:
        """The arguments of PEFT's ``LoraConfig``."""
        targets = self.target_modules
        return {
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": targets[0] if targets == ["all-linear"] else targets,
        }


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
        -1, "save a DeepSpeed checkpoint every this many steps of a stage, for --resume (-1: never)", low=1, also=-1
    )
    max_num: int = setting(1, "number of checkpoints to keep", low=1)
    fork_from: str = setting("", "run folder whose seed stage and first samples are reused if they would be identical")


@dataclass
class EvalSettings:
    dataset: str = setting("", "held-out preference pairs; evaluated at the start and after each round")
    split: str = setting("", "split of --eval.dataset if it is a hub name (default: test, or test_prefs)")
    max_samples: int = setting(0, "use at most this many held-out pairs (0: all)", low=0)
    max_prompts: int = setting(
        0,
        "sample an answer to at most this many held-out prompts, for length, divergence and win rate (0: all in a run with "
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
    steps_behind: Literal[0, 1] = setting(
        0,
        "1: engines sample the answers of the next step while the policy trains, with the weights of one step ago, for "
        "algorithms that sample in every step; 0: they take turns",
    )
    importance_cap: float = setting(
        0.0,
        "weigh the loss of each play by how much likelier its answers are under the policy than they were when they were "
        "sampled, at most by this, at least 1 (0: off)",
        low=0,
    )
    reuse_log_probs: bool = setting(
        False,
        "in rounds of algorithms that train on pairs: take the policy's log-probabilities of its answers from the engine that "
        "sampled them, if it agrees with the trainer, which computes them otherwise (vllm)",
    )


@dataclass
class VllmSettings:
    num_engines: int = setting(0, "vLLM engines, each a Ray actor (0: as many as the visible GPUs allow)", low=0)
    tensor_parallel_size: int = setting(1, "GPUs per engine", low=1)
    gpu_memory_utilization: float = setting(0.5, "share of a GPU's memory that an engine may take", above=0, high=1)
    enable_sleep: bool = setting(True, "free the engines' GPU memory while the policy trains (no effect without a GPU)")
    enable_prefix_caching: bool = setting(True, "share the key-value cache of equal prompt prefixes")
    enforce_eager: bool = setting(False, "no CUDA graphs")


@dataclass
class RaySettings:
    ranks: int = setting(
        0, "training ranks of --launcher ray (0: one per GPU of the cluster that is not an engine's alone)", low=0
    )
    colocate: bool = setting(
        True, "ranks and engines take turns on the same GPUs; false: engines have GPUs of their own"
    )


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
    run_name: str = setting("", "name of the run in W&B, TensorBoard and trackio (default: that of the run folder)")


@dataclass
class LoggerSettings:
    logging_steps: int = setting(1, "log metrics every this many optimiser steps", low=1)
    tensorboard_dir: str = setting("", "TensorBoard folder (default: none)")
    trackio_project: str = setting(
        "", "trackio project, kept on this machine; `trackio show` serves it (default: none)"
    )
    wandb: WandbSettings = field(default_factory=WandbSettings)


@dataclass
class Inference:
    """Settings that engines, scorers and oracles read, in a run and in commands that only sample from policies."""

    model: ModelSettings = field(default_factory=ModelSettings)
    ref: RefSettings = field(default_factory=RefSettings)
    data: DataSettings = field(default_factory=DataSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    ds: DeepspeedSettings = field(default_factory=DeepspeedSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    vllm: VllmSettings = field(default_factory=VllmSettings)


@dataclass
class Config(Inference):
    """All settings of a run except those of the algorithm, which its own file defines."""

    launcher: Literal["auto", "deepspeed", "ray"] = setting(
        "auto",
        "what starts the training ranks: deepspeed (or torchrun, or examples/train_ssapo.sh), which run this command once for "
        "each; or ray, on the cluster of RAY_ADDRESS or on this machine; auto: ray in a job of `ray job submit`",
    )
    ray: RaySettings = field(default_factory=RaySettings)
    algo: str = setting("sgpo", "algorithm: a registered name, or module:Class, which runs its code")
    seed: SeedSettings = field(default_factory=SeedSettings)
    rounds: RoundsSettings = field(default_factory=RoundsSettings)
    oracle: str = setting(
        "implicit",
        "judge of sampled answers: implicit, reward_model, reward_heads, preference_model, judge, or module:Class, which runs "
        "its code",
    )
    adam: AdamSettings = field(default_factory=AdamSettings)
    ckpt: CkptSettings = field(default_factory=CkptSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)
    lr_scheduler: Literal[
        "cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = setting("cosine_with_min_lr", "learning-rate schedule, by its transformers name")
    lr_warmup_ratio: float = setting(0.1, "share of the steps used for warm-up", low=0, high=1)
    min_lr_ratio: float = setting(
        0.1, "final learning rate relative to the peak (only cosine_with_min_lr)", low=0, high=1
    )
    max_norm: float = setting(1.0, "gradient norm at which gradients are clipped", low=0)
    resume: bool = setting(False, "continue the run in --ckpt.output_dir from its first unfinished stage")
    dry_run: bool = setting(False, "print the resolved configuration and stop before a model is loaded")


def room_problems(rollout: RolloutSettings, data: DataSettings) -> list[str]:
    """The problem of a length limit that leaves no room for a prompt before a sampled response."""
    if rollout.max_new_tokens < data.max_len:
        return []
    return [
        f"--rollout.max_new_tokens: {rollout.max_new_tokens} leaves no room for a prompt within --data.max_len {data.max_len}; "
        "lower the one or raise the other"
    ]


# The names that torch, transformers and vLLM use for values of --ds.param_dtype.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
