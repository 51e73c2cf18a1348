"""Time and disk that a run takes.

A token that passes through a model forward takes 2 M operations, M the parameters that it is multiplied with, and the
backward pass 4 M more; 2 M with LoRA, whose frozen weights get no gradient, and 2 M more with gradient checkpointing, which
computes the forward pass again (Kaplan et al., arXiv 2001.08361, section 2.1; attention's own products, a few percent at
these lengths, are left out). A rank does a share of its GPU's operations. An engine that samples reads its weights and the
cache of keys and values for every token of its batch: it is bound by the bandwidth of the memory, or by its operations where
the batch is large.

With the ledger of a run, the operations per second of its stages take the place of the assumed ones.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from openrlhf_sgpo.algorithms.plays import PlayAlgorithm
from openrlhf_sgpo.config import Config, LoraSettings, ModelSettings
from openrlhf_sgpo.estimate.devices import Device
from openrlhf_sgpo.estimate.memory import Memory
from openrlhf_sgpo.estimate.settings import PREFIX, PROMPT, RESPONSE, EstimateSettings
from openrlhf_sgpo.estimate.shape import ModelShape, model_shape
from openrlhf_sgpo.ledger import read_ledger
from openrlhf_sgpo.run_folder import STORED, RunFolder, read_configuration

SEQUENCES = 256  # that vLLM computes at a time
TRAIN, SCORE, SAMPLE = "train", "score", "sample"
# Stages of the ledger, or parts of the steps of rounds of plays, by what they do.
_BOOKED = {TRAIN: ("train",), SCORE: ("score", "annotate", "log_probs"), SAMPLE: ("generate",)}
_TOKENS = {TRAIN: "tokens_trained", SCORE: "tokens_scored", SAMPLE: "tokens_generated"}


class Load(NamedTuple):
    """Tokens of a stage. kind: TRAIN, SCORE or SAMPLE. models: that each token passes through."""

    stage: str
    kind: str
    tokens: float
    models: int = 1


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a response."""

    prompt: int
    response: int


def lengths_of(config: Config, settings: EstimateSettings) -> Lengths:
    response = settings.response_tokens or min(RESPONSE, config.rollout.max_new_tokens, config.data.max_len // 2)
    return Lengths(settings.prompt_tokens or min(PROMPT, config.data.max_len - response), response)


def loads(config: Config, algorithm: Any, options: Any, settings: EstimateSettings, lengths: Lengths) -> list[Load]:
    """Training, scoring and sampling of each round. Evaluations, engines that start and models that load are left out."""
    rounds, train = config.rounds, config.train
    prompt, response = lengths.prompt, lengths.response
    instance = algorithm(options, config.model.beta)
    if isinstance(instance, PlayAlgorithm):
        plays, count = rounds.steps * train.batch_size, len(instance.roles)
        mixed = sum(role in instance.shares for role in instance.roles)  # pass through the reference too
        contexts = prompt + (prompt + response) * ("follower" in instance.roles)
        listed = []
        for number in range(1, 1 + rounds.count):
            tokens = plays * (contexts + count * response)
            listed += [
                Load(f"round {number}", SAMPLE, plays * (count + mixed) * response),
                Load(f"round {number}", SCORE, tokens, len(instance.models)),
                Load(f"round {number}", TRAIN, tokens),
            ]
        return listed
    of_pair = prompt + 2 * response if train.layout == "auto" else 2 * (prompt + response)
    pairs = config.seed.size or settings.pairs
    fresh = rounds.prompts or [settings.prompts // max(1, rounds.count)] * rounds.count
    epochs = config.seed.max_epochs if rounds.count else train.max_epochs

    def trained(number: int, count: int, times: int) -> Load:
        passes = train.max_steps * train.batch_size if train.max_steps else count * times
        return Load("seed" if number == 0 else f"round {number}", TRAIN, passes * of_pair)

    has_reference = algorithm.needs.reference
    listed = [Load("seed", SCORE, pairs * of_pair)] if has_reference else []
    listed.append(trained(0, pairs, epochs))
    so_far = pairs
    answers = config.rollout.n_samples_per_prompt
    scored = 1 if config.rollout.reuse_log_probs else 2
    for number, count in enumerate(fresh, start=1):
        so_far += count
        # The implicit reward needs policy and reference, and so do margins under any other oracle; the engine may have given
        # the policy's.
        listed += [
            Load(f"round {number}", SAMPLE, count * answers * response),
            Load(f"round {number}", SCORE, count * (prompt + answers * response), scored),
            trained(number, so_far if rounds.data == "all" else count, train.max_epochs),
        ]
    return listed


def passes(kind: str, shape: ModelShape, checkpointing: bool) -> int:
    """Operations of a token by parameter that it is multiplied with."""
    if kind != TRAIN:
        return 2
    return 2 + (4 if shape.trained >= shape.parameters else 2) + (2 if checkpointing else 0)


@dataclass(frozen=True)
class Speeds:
    """Operations per second of a rank (``train``, ``score``) and of an engine (``sample``); None where unknown. origin: in
    words."""

    train: float | None
    score: float | None
    sample: float | None
    origin: str

    def seconds(self, load: Load, shape: ModelShape, config: Config, ranks: int) -> float | None:
        speed: float | None = getattr(self, load.kind)
        if not speed:
            return None
        workers = config.vllm.num_engines if load.kind == SAMPLE and config.rollout.engine == "vllm" else ranks
        operations = passes(load.kind, shape, config.model.gradient_checkpointing_enable) * shape.multiplied
        return operations * load.tokens * load.models / (speed * workers)


def assumed(memory: Memory, device: Device, settings: EstimateSettings, lengths: Lengths) -> Speeds:
    """From the device's data sheet; unknown without one. A batch of an engine is as large as its cache, up to ``SEQUENCES``."""
    if not (device.tflops and device.bandwidth):
        return Speeds(None, None, None, "unknown for this machine, give --estimate.from_run RUN")
    shape, parallel = memory.shape, memory.config.vllm.tensor_parallel_size
    operations = device.tflops * 1e12 * settings.utilisation
    batch = min(SEQUENCES, memory.cached_tokens() // (lengths.prompt + lengths.response))
    weights = shape.element * shape.multiplied
    read = weights + batch * shape.kv_elements * shape.element * (lengths.prompt + lengths.response / 2)
    bound_by_memory = read / (device.bandwidth * 1e9 * settings.bandwidth_share * parallel)
    bound_by_operations = 2 * shape.multiplied * batch / (operations * parallel)
    # An engine without room for a single answer does not start.
    sample = 2 * shape.multiplied * batch / max(bound_by_memory, bound_by_operations) or None
    speed = f"{device.tflops:.0f} TFLOP/s x {settings.utilisation:g}"
    origin = f"{speed}, {device.bandwidth:,.0f} GB/s x {settings.bandwidth_share:g}"
    return Speeds(operations, operations, sample, origin)


def measured(folder: str) -> Speeds:
    """Those of a run, from its ledger. Raises ValueError if the folder is not that of a run, or nothing was trained in it."""
    path = Path(folder)
    if not (path / STORED).exists():
        raise ValueError(f"--{PREFIX}.from_run {folder}: not a run folder, it has no {STORED}")
    stored = read_configuration(path / STORED)
    model, layout = stored["model"], stored["ds"]
    shape = model_shape(
        ModelSettings(model["model_name_or_path"], trust_remote_code=model["trust_remote_code"]),
        layout["param_dtype"],
        replace(LoraSettings(), **layout["lora"]),
    )
    run = RunFolder(folder)
    ranks = max([run.manifest(number)["stages"].get("train", {}).get("ranks", 1) for number in run.rounds()], default=1)
    seconds, tokens = dict.fromkeys(_BOOKED, 0.0), dict.fromkeys(_BOOKED, 0.0)
    for name, entry in read_ledger(path / "ledger.json")["stages"].items():
        for kind, parts in _BOOKED.items():
            stage = name.partition("/")[2]
            if stage == "play":
                booked = sum(entry.get(f"seconds_{part}", 0.0) for part in parts)
                # Of engines that sample while the policy trains, ``seconds_generate`` is what training waits for.
                seconds[kind] += entry.get("engine_seconds", booked) if kind == SAMPLE else booked
            elif stage in parts:
                seconds[kind] += entry.get(f"seconds_{stage}", entry["seconds"])
            if stage in ("play", *parts):
                tokens[kind] += entry.get(_TOKENS[kind], 0.0)
    workers = {TRAIN: ranks, SCORE: ranks, SAMPLE: ranks}
    if stored["rollout"]["engine"] == "vllm":
        workers[SAMPLE] = stored["vllm"]["num_engines"] or ranks
    checkpointing = model["gradient_checkpointing_enable"]
    rates = {
        kind: passes(kind, shape, checkpointing) * shape.multiplied * tokens[kind] / seconds[kind] / workers[kind]
        if seconds[kind]
        else None
        for kind in _BOOKED
    }
    if not rates[TRAIN]:
        raise ValueError(f"--{PREFIX}.from_run {folder}: its ledger has no finished training stage; let it finish one")
    return Speeds(**rates, origin=f"the ledger of {folder}")


def disk(config: Config, algorithm: Any, options: Any, shape: ModelShape) -> dict[str, float]:
    """Bytes of the run folder by part: the policy of each round, and two checkpoints of weights and optimiser where there are
    any (the older one goes when the newer one is whole)."""
    instance = algorithm(options, config.model.beta)
    policies = max(1, len(getattr(instance, "adapters", {})))
    whole = float(shape.element * shape.parameters)
    count = config.rounds.count + (0 if algorithm.fresh_answers else 1)
    parts = {"policies": count * policies * whole}
    if algorithm.fresh_answers or config.ckpt.save_steps > 0:
        parts["checkpoints"] = (config.ckpt.max_num + 1) * (whole + 12 * shape.trained)
    return parts


def whole(rows: Sequence[tuple[str, str, float, float | None]], overlap: bool) -> float | None:
    """Seconds of all loads; None if one is not known. rows: stage, kind, tokens and seconds of each. overlap: engines sample
    while the policy trains, so a stage takes as long as the slower of the two."""
    sampling: dict[str, float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    for stage, kind, _, seconds in rows:
        if seconds is None:
            return None
        (sampling if kind == SAMPLE else others)[stage] += seconds
    longer = max if overlap else operator.add
    return sum(longer(sampling[stage], others[stage]) for stage in sampling | others)
