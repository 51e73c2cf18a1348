"""The weights of a policy that is trained, on their way to engines; and its memory while they answer."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from openrlhf.models import Actor
from openrlhf.utils.deepspeed.deepspeed_utils import offload_deepspeed_states, reload_deepspeed_states
from peft import PeftModel
from torch import Tensor

from openrlhf_sgpo.memory import release_memory
from openrlhf_sgpo.openrlhf.adapters import DEFAULT_ADAPTER
from openrlhf_sgpo.openrlhf.checksums import Shape


def with_adapter(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """W + scaling * B A of a LoRA adapter, computed in float32. weight: (out, in); down: A (rank, in); up: B (out, rank)."""
    return (weight.float() + scaling * up.float() @ down.float()).to(weight.dtype)


class PolicyWeights:
    """The weights of an actor as they are when they are iterated: (name in Hugging Face's folders, whole tensor) pairs, in the
    same order every time. An adapter is merged layer by layer, and tied weights come once.

    Iterating is collective with ZeRO 3: one layer at a time is gathered, and every rank gets it. The actor is not kept in
    memory by this object.
    """

    def __init__(self, actor: Actor, adapter: str = DEFAULT_ADAPTER):
        self._engine = weakref.ref(actor.model)
        self.adapter = adapter

    def metadata(self) -> list[Shape]:
        """Of all tensors in order, without gathering any."""
        return [
            Shape(name, weight.dtype, tuple(getattr(weight, "ds_shape", weight.shape)))
            for group in self._layers()
            for name, weight, _ in group
        ]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for group in self._layers():
            parameters = [parameter for _, weight, adapter in group for parameter in (weight, *adapter[:2])]
            # Does nothing with parameters that ZeRO 3 has not taken apart.
            with deepspeed.zero.GatheredParameters(parameters):
                tensors = [
                    (name, with_adapter(weight, *adapter) if adapter else weight.data)
                    for name, weight, adapter in group
                ]
            yield from tensors

    def _layers(self) -> Iterator[list[tuple[str, Any, tuple[Any, ...]]]]:
        """By module with weights: (name, parameter, (A, B, scaling) or nothing) of each."""
        engine = self._engine()
        if engine is None:
            raise RuntimeError("the policy whose weights are asked for is no longer in memory")
        prefix = "base_model.model." if isinstance(engine.module, PeftModel) else ""
        seen: set[int] = set()
        for path, module in engine.module.named_modules():
            stem, layer, _ = path.rpartition(".base_layer")
            adapter = self._adapter_of(engine.module.get_submodule(stem)) if layer else ()
            group = []
            for name, weight in module.named_parameters(recurse=False):
                if id(weight) not in seen and ".lora_" not in path:
                    seen.add(id(weight))
                    known = f"{stem if layer else path}.{name}".removeprefix(prefix)
                    group.append((known, weight, adapter if name == "weight" else ()))
            if group:
                yield group

    def _adapter_of(self, layer: Any) -> tuple[Any, ...]:
        if self.adapter not in layer.lora_A:
            return ()
        return layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight, layer.scaling[self.adapter]


@contextmanager
def aside(actor: Actor) -> Iterator[None]:
    """Within the block GPUs have room for engines: optimiser, gradients and what torch keeps for later are off them, and come
    back after it. Weights stay, because engines get them. Collective; does nothing without GPUs."""
    if not torch.cuda.is_available():
        yield
        return
    moves = hasattr(actor.model.optimizer, "offload_states")  # not at ZeRO 0
    if moves:
        offload_deepspeed_states(actor.model)
    release_memory()
    yield
    if moves:
        reload_deepspeed_states(actor.model)
