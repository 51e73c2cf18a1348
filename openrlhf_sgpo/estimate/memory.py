"""Memory of a rank in each stage of a run, in bytes.

    P parameters, of which A are trained; w bytes of a weight (2 in half precision, 4 in fp32); D ranks; ZeRO stage z;
    T tokens of a micro-batch; L layers of width h; a bytes that a layer keeps of a token, b that the rest of the model does.

    weights      w P, with z = 3 w P / D
    optimiser    Adam's two moments and the fp32 weights that it changes, 12 A; in fp32 with z = 0 the weights are these,
                 8 A; with z >= 1 divided by D (Rajbhandari et al., arXiv 1910.02054, section 3.1)
    gradients    w A, with z >= 2 divided by D; while the optimiser steps also what ``Memory.step`` says
    activations  T (L a + b); with gradient checkpointing T (L w h + a + b): the input of each layer, and one layer
                 anew (Chen et al., arXiv 1604.06174, with a checkpoint per layer)

a and b are not written down here but counted (``shape.py``). For a layer of Llama with q query and k key channels, and f in
its MLP, in half precision a = 4 h + 4 (q + k) + 4 f and a few numbers per head: what goes into two norms, attention's queries,
keys, values and output, and what is multiplied in the MLP. Padded, a = 16 h + 4 (q + k) + 8 f: two norms in fp32 with their
outputs, and four tensors of the MLP. The latter bounds a layer that is computed anew.

DeepSpeed's buffers are those of version 0.19.6: a bucket of 5e8 gradients with z >= 1, up to 1e9 gathered weights with
z = 3, and with z = 0 a copy of up to 5e8 gradients while ranks exchange them. Torch's fused Adam needs nothing beside its
states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openrlhf_sgpo.algorithms.plays import PlayAlgorithm
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.estimate.devices import GIB, Device
from openrlhf_sgpo.estimate.shape import ModelShape
from openrlhf_sgpo.packed.head import ELEMENTS
from openrlhf_sgpo.run_settings import samples
from openrlhf_sgpo.training.packing import token_budget

BUCKET = 5 * 10**8  # gradients
GATHERED = 10**9  # weights, with ZeRO-3
CONTEXT = 1.2 * GIB  # CUDA's context and NCCL's buffers of a rank
ASLEEP = 1.0 * GIB  # what an engine keeps of a GPU while it sleeps: context and CUDA graphs
WORKSPACE = 2.0 * GIB  # of an engine, for activations and CUDA graphs
FRAGMENTED = 0.05  # of activations, gradients and buffers, lost between the blocks of torch's allocator
CPU_CACHE = 1.0 * GIB  # of an engine without a GPU, see rollout/vllm_on_cpu.py


@dataclass(frozen=True)
class Work:
    """What a rank computes at a time.

    tokens: of a micro-batch in training, padding included. predicted: of these, before a token of a response.
    micro_batches: that a rank adds up before an optimiser step. frozen: models in memory beside the policy in training.
    mixed: models that an engine holds beside the policy, to sample from their mixture.
    """

    tokens: int
    predicted: int
    micro_batches: int
    frozen: int = 0
    mixed: int = 0


def work_of(config: Config, algorithm: Any, options: Any, ranks: int) -> Work:
    """The largest micro-batch that the settings allow, of which every token may belong to a response."""
    train = config.train
    share = max(1, train.batch_size // ranks)
    budget = token_budget(config)
    # A single sample may have more tokens than --train.max_tokens.
    tokens = max(budget, 2 * config.data.max_len) if train.layout == "auto" else budget
    micro_batches = -(-share * 2 * config.data.max_len // tokens)
    instance = algorithm(options, config.model.beta)
    frozen = 0
    if isinstance(instance, PlayAlgorithm):
        frozen = len(instance.models)
    elif any(getattr(options, "extrapolation", ())):
        frozen = 1
    return Work(tokens, tokens, micro_batches, frozen, 1 if instance.shares else 0)


class Memory:
    """The stages of a run on a device. Every method returns bytes by part; a stage takes their sum."""

    def __init__(self, config: Config, algorithm: Any, shape: ModelShape, work: Work, device: Device, ranks: int):
        self.config = config
        self.algorithm = algorithm
        self.shape = shape
        self.work = work
        self.device = device
        self.ranks = ranks
        self.stage: int = config.ds.zero_stage
        self.packed = config.train.layout == "auto"
        self.kept = shape.packed if self.packed else shape.padded
        self.optimiser_ranks = ranks if self.stage else 1
        self.engines = samples(config, algorithm) and config.rollout.engine == "vllm"

    def stages(self) -> dict[str, dict[str, float]]:
        """backward and step: the two moments of training at which memory is highest. scoring, and sampling if the run does."""
        stages = {"backward": self.backward(), "step": self.step(), "scoring": self.scoring()}
        if samples(self.config, self.algorithm):
            stages["sampling"] = self.sampling()
        return {name: {part: size for part, size in parts.items() if size} for name, parts in stages.items()}

    def peak(self) -> float:
        """Bytes that the largest of these takes."""
        return max(map(total, self.stages().values()))

    def backward(self) -> dict[str, float]:
        """When the backward pass of a step's last micro-batch begins: all activations are there, and the gradients of the
        others."""
        element = self.shape.element
        kept_gradients = element * self.shape.trained / self._gradient_ranks if self.work.micro_batches > 1 else 0.0
        if self.config.ds.adam_offload:
            kept_gradients = 0.0
        if self.stage == 3:  # DeepSpeed holds a buffer for them throughout
            kept_gradients = element * self.shape.trained / self.ranks
        held = self._held() | {"gradients": kept_gradients, "ZeRO buffers": self._buffers()}
        of_weight, work = self._head()
        # First the head computes its gradients, and when that is done, layer by layer.
        in_head = {"activations": self._activations(), "head": of_weight + work}
        in_layers = {"activations": self._activations() + self._layer_work(), "head": of_weight}
        return self._with_overhead(held | max(in_head, in_layers, key=total))

    def step(self) -> dict[str, float]:
        """While the optimiser steps, or ranks exchange their gradients, when no activations are left.

        Beside the gradients: with z = 0 a flat copy of up to 5e8 of them, or, in half precision, 4 A for all of them in
        float32; with z of 1 or 2 in all 8 A / D, for gradients, their flat copy and the one in float32; with z = 3 the latter
        in parts of at most 1e9 parameters.
        """
        trained, element = self.shape.trained, self.shape.element
        gradients: float
        if self.config.ds.adam_offload:
            gradients = 0.0
        elif self.stage == 0:
            in_float32 = 4 * trained if element < 4 else 0
            gradients = element * trained + max(element * min(trained, BUCKET), in_float32)
        elif self.stage == 3:
            share = trained / self.ranks
            gradients = element * share + 4 * min(share, GATHERED)
        else:
            gradients = 8 * trained / self.ranks
            if self.stage == 1:
                gradients = max(gradients, element * trained * (1 + 1 / self.ranks))
        buffers = element * BUCKET if self.stage == 3 else 0.0
        return self._with_overhead(self._held() | {"gradients": gradients, "ZeRO buffers": buffers})

    def scoring(self) -> dict[str, float]:
        """Log-probabilities of a micro-batch of --train.score_tokens, or, where answers are evaluated, the divergence of two
        models in float32 over the whole vocabulary: 20 bytes per logit, in chunks of 2^30 logits on a GPU. With ZeRO-3 a model
        is whole where it takes at most half of what is free."""
        shape, train = self.shape, self.config.train
        two = self.config.eval.dataset != "" and samples(self.config, self.algorithm)
        tokens = train.score_tokens or (2 if self.packed else 1) * self.work.tokens
        device = "cuda" if self.device.on_gpu else "cpu"
        chunk = min(16 * ELEMENTS[device], tokens * shape.vocabulary)
        logits = 20.0 * chunk if two else (4.0 + shape.element) * min(ELEMENTS[device], chunk)
        if not self.packed:
            logits = max(logits, (4.0 + shape.element) * tokens * shape.vocabulary)
        engine = self._engine_beside()
        whole = float(shape.element * shape.parameters)
        shares = self.stage == 3 and whole > (self.device.memory - engine) / 2
        parts = {
            "weights": (self._weights() if shares else whole) * (1 + two),
            "activations": tokens * (3 * self.kept.largest + 4 * shape.element * shape.hidden),
            "head": logits,
            "engine": engine,
        }
        if shares:
            parts["ZeRO buffers"] = shape.element * min(shape.parameters, GATHERED)
        return self._with_overhead(parts)

    def sampling(self) -> dict[str, float]:
        """An engine takes its share of the GPU: its weights, a workspace, and keys and values in what is left. Where answers
        are sampled in every step, the policy in training and the frozen models are in memory too."""
        parts: dict[str, float] = {}
        if self.algorithm.fresh_answers:
            parts = {name: size for name, size in self._held().items() if name != "engine"}
            if self.stage == 3:
                parts["ZeRO buffers"] = self.shape.element * BUCKET
                parts["gradients"] = self.shape.element * self.shape.trained / self.ranks
        if self.engines:
            parts |= {"engine's weights": self._engine_weights(), "engine's workspace": self._workspace()}
            parts["engine's keys and values"] = max(0.0, self.cache_bytes())
        else:
            rows = self.config.rollout.batch_size * self.config.rollout.n_samples_per_prompt
            cache = self._per_token() * self.config.data.max_len * rows
            parts |= {"engine's weights": self._engine_weights(), "engine's keys and values": float(cache)}
        return self._with_overhead(parts)

    def cache_bytes(self) -> float:
        """Bytes that an engine has for keys and values on a GPU; negative where even its weights do not fit."""
        if not self.device.on_gpu:
            return CPU_CACHE
        share = self.config.vllm.gpu_memory_utilization * self.device.memory
        return share - self._engine_weights() - self._workspace()

    def cached_tokens(self) -> int:
        """Tokens whose keys and values an engine holds at a time."""
        return int(max(0.0, self.cache_bytes()) * self.config.vllm.tensor_parallel_size // self._per_token())

    def host(self) -> float:
        """Bytes of the machine's memory beside its GPUs: an offloaded optimiser, and the weights of sleeping engines."""
        if not self.device.on_gpu:
            return 0.0
        offloaded = 16.0 * self.shape.trained if self.config.ds.adam_offload else 0.0
        asleep = self.shape.element * self.shape.parameters * self.config.vllm.num_engines * (1 + self.work.mixed)
        return offloaded + (asleep if self.engines and self.config.vllm.enable_sleep else 0.0)

    @property
    def _gradient_ranks(self) -> int:
        return self.ranks if self.stage >= 2 else 1

    def _weights(self) -> float:
        return self.shape.element * self.shape.parameters / (self.ranks if self.stage == 3 else 1)

    def _held(self) -> dict[str, float]:
        """What is in memory throughout training."""
        per_parameter = 8 if self.shape.element == 4 and self.stage == 0 else 12
        optimiser = per_parameter * self.shape.trained / self.optimiser_ranks
        if self.algorithm.extragradient:  # where a pair of steps began
            optimiser += 4 * self.shape.trained / self.optimiser_ranks
        copies = self._weights() * self.work.frozen
        return {
            "weights": self._weights(),
            "optimiser": 0.0 if self.config.ds.adam_offload else optimiser,
            "other models": copies,
            "engine": self._engine_beside(),
        }

    def _engine_beside(self) -> float:
        """What an engine holds while others compute."""
        if not self.engines:  # transformers' models stay where they are
            return self._engine_weights() if samples(self.config, self.algorithm) else 0.0
        if not self.device.on_gpu:
            return (self._engine_weights() + self._workspace() + CPU_CACHE) * self.config.vllm.num_engines / self.ranks
        if self.config.vllm.enable_sleep:
            return ASLEEP
        return self.config.vllm.gpu_memory_utilization * self.device.memory

    def _engine_weights(self) -> float:
        workers = self.config.vllm.tensor_parallel_size if self.engines else 1
        return self.shape.element * self.shape.parameters * (1 + self.work.mixed) / workers

    def _workspace(self) -> float:
        return WORKSPACE if self.device.on_gpu else GIB

    def _per_token(self) -> int:
        return self.shape.kv_elements * self.shape.element * (1 + self.work.mixed)

    def _activations(self) -> float:
        """Kept of a micro-batch until its backward pass begins."""
        shape = self.shape
        checkpointing = self.config.model.gradient_checkpointing_enable
        layer = shape.element * shape.hidden if checkpointing else self.kept.layer
        return self.work.tokens * (shape.layers * layer + self.kept.other)

    def _layer_work(self) -> float:
        """While the gradient passes through a layer: up to three tensors of its largest size, and, with gradient checkpointing,
        what the layer keeps, computed again."""
        anew = self.shape.padded.layer if self.config.model.gradient_checkpointing_enable else 0.0
        return self.work.tokens * (anew + 3 * self.kept.largest)

    def _head(self) -> tuple[float, float]:
        """The gradient of the head's weights, which waits for that of the embedding where both are one; and what the head works
        with. Packed: the states that predict, their gradient in float32, and a tile of logits with its gradient. Padded:
        float32 logits at every position, with two gradients of the same size, from the token's logit and from the
        normaliser."""
        shape, rows = self.shape, self.work.predicted
        of_weight = shape.element * shape.hidden * shape.vocabulary if shape.trained >= shape.parameters else 0
        half = shape.element if shape.element < 4 else 0
        if not self.packed:
            return of_weight, rows * shape.vocabulary * (12.0 + half)
        tile = min(ELEMENTS["cuda" if self.device.on_gpu else "cpu"], rows * shape.vocabulary)
        return of_weight, rows * shape.hidden * (4.0 + 2 * shape.element) + tile * (4 + half)

    def _buffers(self) -> float:
        if not self.stage:
            return 0.0
        gathered = min(self.shape.parameters, GATHERED) if self.stage == 3 else 0
        return float(self.shape.element * (BUCKET + gathered))

    def _with_overhead(self, parts: dict[str, float]) -> dict[str, float]:
        if not self.device.on_gpu:
            return parts | {"process": GIB}
        loose = sum(parts.get(name, 0.0) for name in ("gradients", "activations", "head", "ZeRO buffers"))
        return parts | {"CUDA, fragmentation": CONTEXT + FRAGMENTED * loose}


def total(parts: dict[str, float]) -> float:
    return sum(parts.values())
