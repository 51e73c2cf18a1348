"""LoRA adapters over one base, of which every forward pass uses one: which it is, and which of them an optimiser step moves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from openrlhf.models import Actor
from peft.tuners.tuners_utils import BaseTunerLayer

DEFAULT_ADAPTER = "default"  # PEFT's name for the only one


@contextmanager
def use_adapter(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Forward passes inside run with this adapter, if there are any, and later ones with the one before it.

    PEFT's own ``set_adapter`` would freeze the others, which are trained too.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def recompute_contexts(model: torch.nn.Module) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """The ``context_fn`` of torch's gradient checkpointing: the backward pass recomputes with the adapter that the forward
    pass had, not with the one that happens to be active by then."""
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return lambda: (nullcontext(), use_adapter(model, layer.active_adapters[0]))


def groups_by_adapter(
    model: torch.nn.Module, groups: list[dict[str, Any]], learning_rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """An optimiser's groups of parameters, each split by adapter: with the adapter's name and its own learning rate, of which
    a schedule is a multiple."""
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
    """Optimiser steps inside leave these adapters, and Adam's moments of them, as they are. Without that a gradient of 0 would
    move them by their momentum."""
    hidden: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def hide(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = [group for group in optimizer.param_groups if group.get("adapter") in adapters]
        for parameter in (parameter for group in groups for parameter in group["params"]):
            hidden.append((parameter, parameter.grad))
            parameter.grad = None  # which Adam passes over

    def restore(*_: Any) -> None:
        for parameter, gradient in hidden:
            parameter.grad = gradient  # an offloaded optimiser's gradients have their place there
        hidden.clear()

    # DeepSpeed steps the optimiser under its own one, perhaps several times, a part of the parameters each.
    optimizer = actor.model.basic_optimizer
    handles = [optimizer.register_step_pre_hook(hide), optimizer.register_step_post_hook(restore)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
