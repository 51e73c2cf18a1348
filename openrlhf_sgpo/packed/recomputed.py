"""What the backward pass of a packed row computes again, so that the forward pass need not keep it.

Of a norm and of a gated activation torch keeps the result, for the products behind it, and what it is made of on the way. Here
only what goes into them is kept. Parts that attention puts together are not kept a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class _Recipe:
    """Makes a result again from what it was made of, once for all operators that read it in the backward pass. It is known by
    the result's memory, which is the same behind views of it, such as operators and DeepSpeed make."""

    def __init__(self, result: Tensor, function: Callable[..., Tensor], *inputs: Tensor):
        self.version = result._version
        self._function = function
        self._inputs = [tensor.detach() for tensor in inputs]
        self._again: Tensor | None = None
        result.untyped_storage().recipe = self  # type: ignore[attr-defined]

    @torch.no_grad()
    def view(self, *place: Any) -> Tensor:
        if self._again is None:
            self._again = self._function(*self._inputs)
        return self._again.as_strided(*place)


def recipe_of(tensor: Tensor) -> _Recipe | None:
    """None if there is none, or if the tensor was changed since."""
    recipe = getattr(tensor.untyped_storage(), "recipe", None)
    return recipe if recipe is not None and recipe.version == tensor._version else None


def _keep(tensor: Tensor) -> Any:
    if recipe := recipe_of(tensor):
        return partial(recipe.view, tensor.shape, tensor.stride(), tensor.storage_offset())
    # An operator that keeps its own result would keep itself by it.
    return tensor if tensor.is_leaf else tensor.detach()


def _kept(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()


def recomputing() -> AbstractContextManager[Any]:
    """Within it, what has a recipe is not kept. A checkpointed layer keeps nothing either way, and has hooks of its own."""
    return saved_tensors_hooks(_keep, _kept) if torch.is_grad_enabled() else nullcontext()


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y = w x s and s = 1 / sqrt(mean(x^2) + epsilon), in float32 as in transformers."""
    wide = states.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (wide * scale).to(states.dtype), scale


def rms_norm_gradient(
    gradient: Tensor, states: Tensor, weight: Tensor, scale: Tensor, of_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """dx = s (w dy - n mean(w n dy)) and dw = the sum of n dy, with n = x s of size H, and means over it."""
    normal = states * scale
    product = gradient * normal
    mean = (product @ weight)[..., None] / len(weight)
    of_states = (gradient * weight).addcmul_(normal, mean, value=-1).mul_(scale)
    return of_states, product.flatten(0, -2).sum(0) if of_weight else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        result, scale = rms_norm(states, weight, epsilon)
        ctx.save_for_backward(states, weight, scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, scale = ctx.saved_tensors
        gradient, wide, factor = (tensor.to(torch.float32) for tensor in (gradient, states, weight))
        of_states, of_weight = rms_norm_gradient(gradient, wide, factor, scale, ctx.needs_input_grad[1])
        return of_states.to(states.dtype), None if of_weight is None else of_weight.to(weight.dtype), None


class _Gated(torch.autograd.Function):
    """y = f(a) b, with da = f'(a) b dy and db = f(a) dy."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: nn.Module) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.activation(gate)
        (of_gate,) = torch.autograd.grad(active, gate, gradient * up)
        return of_gate, active.detach().mul(gradient), None


def _norm(module: Any, plain: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return plain(states)
    epsilon = module.variance_epsilon
    result = _RMSNorm.apply(states, module.weight, epsilon)
    # A copy of the weight, because ZeRO-3 takes weights away after the forward pass.
    _Recipe(result, lambda states, weight: rms_norm(states, weight, epsilon)[0], states, module.weight.clone())
    return result


def _mlp(module: Any, plain: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return plain(states)
    gate, up = module.gate_proj(states), module.up_proj(states)
    product = _Gated.apply(gate, up, module.act_fn)
    _Recipe(product, lambda gate, up: module.act_fn(gate) * up, gate, up)
    return module.down_proj(product)


def joined(parts: list[Tensor], dimension: int) -> Tensor:
    """Of parts that are kept anyway."""
    result = torch.cat(parts, dimension)
    if torch.is_grad_enabled():
        _Recipe(result, lambda *parts: torch.cat(parts, dimension), *parts)
    return result


def _instructions(kind: Any) -> Any:
    code = getattr(kind.forward, "__code__", None)
    return code and (code.co_code, code.co_names, [value for value in code.co_consts if not isinstance(value, str)])


def use_recomputed(model: nn.Module) -> None:
    """Lets the norms and gated activations within a model be computed again if their forward is, instruction by instruction,
    that of Llama's: transformers copies it from family to family."""
    module: Any
    for module in model.modules():
        instructions = _instructions(type(module))
        if instructions == _instructions(LlamaRMSNorm):
            module.forward = partial(_norm, module, module.forward)
        elif instructions == _instructions(LlamaMLP) and not list(module.act_fn.parameters()):
            module.forward = partial(_mlp, module, module.forward)
