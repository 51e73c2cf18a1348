"""Log-probabilities from hidden states without logits in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from openrlhf_sgpo import ranks
from openrlhf_sgpo.packed.products import product

# Logits in memory at a time. On a CPU they should stay in its caches.
ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


class Scaling(NamedTuple):
    """What a model does to its logits behind the head: cap * tanh(scale * logit / cap), scale * logit without a cap."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> Scaling:
        """As transformers' Cohere, Granite and Gemma have it."""
        scale, cap = 1.0, getattr(config, "final_logit_softcapping", None)
        if config.model_type.startswith("cohere"):
            scale = config.logit_scale
        elif config.model_type.startswith("granite"):
            scale = 1 / config.logits_scaling
        return cls(scale, cap)

    def apply(self, logits: Tensor) -> Tensor:
        """In place but for the last product, because tanh's gradient is made of its result."""
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_() * self.cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative, from the result."""
        return self.scale if self.cap is None else (1 - (logits / self.cap).square()).mul_(self.scale)


class _LogProbs(torch.autograd.Function):
    """log softmax(z / temperature)[target] with z = scaling(states W' + bias), (T,), over tiles of the vocabulary.

    With p the softmax, d log p_y / d z_v = (1[v = y] - p_v) / temperature. The backward pass computes the logits of each tile
    again, so that only one tile of them is ever in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scaling: Scaling,
        temperature: float,
    ) -> Tensor:
        ctx.scaling, ctx.temperature = scaling, temperature
        dtype = _accurate(states.dtype)
        picked = states.new_empty(len(states), dtype=dtype)
        highest = torch.full_like(picked, -torch.inf)
        total = torch.zeros_like(picked)
        for start, tile in _tiles(states, weight):
            logits = _LogProbs._logits(ctx, states, tile, _part(bias, start, tile))
            place, inside = _places(targets, start, tile)
            picked = torch.where(inside, logits.gather(1, place)[:, 0], picked)
            before, highest = highest, torch.maximum(highest, logits.amax(1))
            total.mul_((before - highest).exp_()).add_(logits.sub_(highest[:, None]).exp_().sum(1))
        normaliser = highest + total.log_()
        ctx.save_for_backward(states, weight, bias, targets, normaliser)
        return picked - normaliser

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, normaliser = ctx.saved_tensors
        of_states, of_weight, of_bias = (
            torch.zeros_like(states, dtype=normaliser.dtype),
            torch.empty_like(weight) if ctx.needs_input_grad[1] else None,
            torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None,
        )
        gradient = gradient[:, None] / ctx.temperature
        for start, tile in _tiles(states, weight):
            logits = _LogProbs._logits(ctx, states, tile, _part(bias, start, tile))
            slope = ctx.scaling.slope(logits.mul(ctx.temperature) if ctx.scaling.cap else logits)
            change = logits.sub_(normaliser[:, None]).exp_().mul_(-gradient)
            place, inside = _places(targets, start, tile)
            change.scatter_add_(1, place, gradient * inside[:, None])
            if not isinstance(slope, float) or slope != 1:
                change.mul_(slope)
            if of_bias is not None:
                of_bias[start : start + len(tile)] = change.sum(0)
            change = change.to(states.dtype)
            if of_states.dtype == states.dtype:
                of_states = product(change, tile.T, of_states)
            else:
                of_states += change @ tile
            if of_weight is not None:
                of_weight[start : start + len(tile)] = product(change.T, states.T)
        return of_states.to(states.dtype), of_weight, of_bias, None, None, None

    @staticmethod
    def _logits(ctx: Any, states: Tensor, tile: Tensor, bias: Tensor | None) -> Tensor:
        logits = product(states, tile)
        if bias is not None:
            logits += bias
        logits = ctx.scaling.apply(logits.to(_accurate(states.dtype)))
        return logits if ctx.temperature == 1 else logits.div_(ctx.temperature)


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tiles(states: Tensor, weight: Tensor) -> list[tuple[int, Tensor]]:
    size = max(64, ELEMENTS[states.device.type] // max(1, len(states)))
    return [(start, weight[start : start + size]) for start in range(0, len(weight), size)]


def _part(bias: Tensor | None, start: int, tile: Tensor) -> Tensor | None:
    return None if bias is None else bias[start : start + len(tile)]


def _places(targets: Tensor, start: int, tile: Tensor) -> tuple[Tensor, Tensor]:
    """Of the targets within a tile, (T, 1), and whether they are there, (T,)."""
    place = targets - start
    return place.clamp(0, len(tile) - 1)[:, None], (place >= 0) & (place < len(tile))


def _linear_log_probs(head: nn.Linear, states: Tensor, targets: Tensor, scaling: Scaling, temperature: float) -> Tensor:
    return _LogProbs.apply(states, head.weight, head.bias, targets, scaling, temperature)


class Head:
    """The head of a causal language model: hidden states to logits, with what the model does to these."""

    def __init__(self, model: Any):
        self._model = model
        self.checked = False  # against logits of the model itself
        config = model.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self.scaling = Scaling.of(config)

    @property
    def is_shared(self) -> bool:
        """Whether each rank has a part of the weight, as at ZeRO 3."""
        return any(hasattr(weight, "ds_id") for weight in self._model.get_output_embeddings().parameters())

    def __call__(self, states: Tensor) -> Tensor:
        """Logits (T, vocabulary) of states (T, hidden), in float32, or float64 for such states."""
        logits = self._model.get_output_embeddings()(states)
        return self.scaling.apply(logits.to(_accurate(states.dtype), copy=True))

    def log_probs(self, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities (T,) of target tokens (T,) given hidden states (T, hidden), in float32, at a temperature."""
        module = self._model.get_output_embeddings()
        if type(module) is not nn.Linear:  # an adapter's, say
            return in_chunks(partial(log_probs_from, self, temperature), (self,), states, targets)
        # Through the module's own call, because DeepSpeed gathers its weight, and scatters the gradient, in hooks of that.
        module.forward = partial(_linear_log_probs, module)  # type: ignore[method-assign]
        try:
            return module(states, targets, self.scaling, temperature)
        finally:
            del module.forward


def log_softmax_at(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target], shape of ``targets``, of logits (..., vocabulary)."""
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


def log_probs_from(head: Callable[[Tensor], Tensor], temperature: float, states: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (T,) by way of the logits (T, vocabulary)."""
    logits = head(states)
    return log_softmax_at(logits if temperature == 1 else logits / temperature, targets)


def in_chunks(function: Callable[..., Tensor], heads: Sequence[Any], *tensors: Tensor) -> Tensor:
    """A function of tensors (T, ...), with a result per row, in chunks of rows, computed again in the backward pass: for what
    needs logits of the whole vocabulary. heads: which it calls. Collective if ranks share the weights of one."""
    rows = max(1, 16 * ELEMENTS[tensors[0].device.type] // heads[0].vocabulary)
    count = max(1, -(-len(tensors[0]) // rows))
    if any(head.is_shared for head in heads):
        count = max(ranks.gather(count))  # each call of such a head gathers its weight on all ranks
    results = [
        checkpoint(function, *chunk, use_reentrant=False) if torch.is_grad_enabled() else function(*chunk)
        for chunk in zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True)
    ]
    return torch.cat(results)
