"""Several LoRA adapters on one base model: which one a forward pass uses, and which ones an optimiser step changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from openrlhf.models import Actor
from peft.tuners.tuners_utils import BaseTunerLayer

DEFAULT_ADAPTER = "default"  # PEFT's name for a single adapter


@contextmanager
def use_adapter(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Use this adapter for forward passes inside the context, if the model has adapters, and restore the previous one after.

    PEFT's ``set_adapter`` would freeze the other adapters, which are trained too.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    previous = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, active in zip(layers, previous, strict=True):
            layer._active_adapter = active


def recompute_contexts(model: torch.nn.Module) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """The ``context_fn`` for torch's gradient checkpointing: the backward pass recomputes with the adapter of the forward pass,
    not with the one that is active by then."""
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return lambda: (nullcontext(), use_adapter(model, layer.active_adapters[0]))


def groups_by_adapter(
    model: torch.nn.Module, groups: list[dict[str, Any]], learning_rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """An optimiser's parameter groups, each split by adapter, with the adapter's name and its learning rate, which a schedule
    scales."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        group
        | {
            "params": [parameter for parameter in group["params"] if f".{adapter}." in names[parameter]],
            "lr": learning_rate,
            "adapter": adapter,
        }
        for adapter, learning_rate in learning_rates.items()
        for group in groups
    ]


@contextmanager
def resting(actor: Actor, adapters: Collection[str]) -> Iterator[None]:
    """Optimiser steps inside the context leave these adapters and their Adam moments unchanged. With a gradient of 0 instead,
    their momentum would still move them."""
    if not adapters:
        yield
        return
    hidden: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def hide(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = [group for group in optimizer.param_groups if group.get("adapter") in adapters]
        for parameter in (parameter for group in groups for parameter in group["params"]):
            hidden.append((parameter, parameter.grad))
            parameter.grad = None  # Adam skips these

    def restore(*_: Any) -> None:
        for parameter, gradient in hidden:
            parameter.grad = gradient  # an offloaded optimiser reuses the buffer
        hidden.clear()

    # DeepSpeed's optimiser steps this one, possibly several times, each time for a part of the parameters.
    optimizer = actor.model.basic_optimizer
    handles = [optimizer.register_step_pre_hook(hide), optimizer.register_step_post_hook(restore)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
