"""Matrix products in float32 by oneDNN, where it is faster than MKL, which torch multiplies with."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@cache
def _suits_processor() -> bool:
    """MKL has no AVX-512 for processors of AMD, oneDNN has."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return built and bool(capabilities.get("avx512_f")) and "AMD" in capabilities["cpu_name"]


def by_onednn(*tensors: Tensor) -> bool:
    """Not within ``torch.backends.mkldnn.flags(enabled=False)``."""
    enabled = bool(torch.backends.mkldnn.enabled) and _suits_processor()
    # It has no products of nothing.
    return enabled and all(tensor.is_cpu and tensor.dtype == torch.float32 and tensor.numel() for tensor in tensors)


def product(left: Tensor, right: Tensor, add: Tensor | None = None) -> Tensor:
    """left right' + add, (m, n), of (m, k), (n, k) and (m, n)."""
    if not by_onednn(left, right):
        return left @ right.T if add is None else torch.addmm(add, left, right.T)
    if add is None:
        return torch.ops.mkldnn._linear_pointwise.default(left, right, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(left, add, right, None, "add")


class _Linear(torch.autograd.Function):
    """y = x W' + b, with dx = dy W, dW = dy' x, db = the sum of dy."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states if ctx.needs_input_grad[1] else None, weight)
        result = product(states.flatten(0, -2), weight)
        if bias is not None:
            result += bias
        return result.view(*states.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        shape = *gradient.shape[:-1], weight.shape[1]
        gradient = gradient.flatten(0, -2)
        of_states, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.T).view(shape) if of_states else None,
            product(gradient.T, states.flatten(0, -2).T) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def _linear(module: nn.Linear, states: Tensor) -> Tensor:
    if not by_onednn(states, module.weight):
        return nn.functional.linear(states, module.weight, module.bias)
    if torch.is_grad_enabled():
        return _Linear.apply(states, module.weight, module.bias)
    # Answers are sampled a token at a time: the function above would take as long as the product.
    return torch.ops.mkldnn._linear_pointwise.default(states, module.weight, module.bias, "none", [], "")


def use_products(model: nn.Module) -> None:
    """Lets the linear layers within a model multiply so."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
