"""Checksums of weights, by which engines prove that they hold what was sent, whatever they fuse, split, repeat or pad.

The sender has one checksum per tensor. Where in an engine's parameters the elements of that tensor belong is asked of the
model's own ``load_weights``: given tensors without data, it copies views of them, whose offset and strides tell which elements
they are. The checksums of slices that make up a tensor add up to the tensor's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


Sums = tuple[int, int]
Place = tuple[int, tuple[int, ...], tuple[int, ...]]


class Shape(NamedTuple):
    """A tensor that is sent."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Slice(NamedTuple):
    """Elements of the tensor ``name`` that an engine holds. place: which ones, as (offset, shape, strides) in elements of the
    contiguous tensor. sums: their checksum."""

    name: str
    place: Place
    sums: Sums


def checksum(values: Tensor, offset: int = 0, strides: Sequence[int] | None = None) -> Tensor:
    """(sum of b_i, sum of i * b_i) modulo 2^64, shape (2,), int64, where b_i are the bits of an element, read as an integer,
    and i is its place in the whole tensor: ``offset`` plus its indices times ``strides`` (default: those of a contiguous one).

    The second sum tells elements that have changed places.
    """
    bits = values.detach().view(_BITS[values.element_size()])
    if strides is None:
        strides = [prod(bits.shape[axis + 1 :]) for axis in range(bits.dim())]
    totals = [_sums_along(bits, axis) for axis in range(bits.dim())]
    total = totals[0].sum() if totals else bits.long()
    places = offset * total
    for along, stride in zip(totals, strides, strict=True):
        places = places + stride * (along * torch.arange(len(along), device=along.device)).sum()
    return torch.stack([total, places])


def _sums_along(bits: Tensor, axis: int) -> Tensor:
    """Sums over all other axes, shape (size of the axis,), int64."""
    others = tuple(other for other in range(bits.dim()) if other != axis)
    if not others:
        return bits.long()
    if bits.device.type == "cpu":  # there torch adds integers ten times more slowly than numpy
        return torch.from_numpy(bits.numpy().sum(others, dtype="int64"))
    return bits.sum(others, dtype=torch.int64)


def as_integers(sums: Mapping[Any, Tensor]) -> dict[Any, Sums]:
    """Checksums as Python's integers, read from the device at once."""
    rows = torch.stack(list(sums.values())).tolist() if sums else []
    return dict(zip(sums, map(tuple, rows), strict=True))


class _Copies(TorchDispatchMode):
    """Records copies of tensors without data into tensors with data, and makes none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.copies.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


def second_names(model: torch.nn.Module) -> set[str]:
    """Names of parameters that are other ones too, like a head that is tied to the embedding. A folder may hold the tensor
    under both names; vLLM reads the first."""
    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in names if first.setdefault(id(parameter), name) != name}


@torch.no_grad()
def held_slices(model: Any, shapes: Iterable[Shape]) -> list[Slice]:
    """What a model of vLLM holds of tensors that were sent. A tensor that its loader does not copy as views is missing.

    Raises RuntimeError if a parameter of the model gets nothing, although all loads could be followed.
    """
    sums: dict[tuple[str, Place], Tensor] = {}
    filled: set[int] = set()
    followed = True
    for name, dtype, shape in shapes:
        whole = torch.empty(shape, dtype=dtype, device="meta")
        try:
            with _Copies() as record:
                model.load_weights([(name, whole)])
        except (NotImplementedError, RuntimeError):  # it reads values
            followed = False
            continue
        for there, part in record.copies:
            filled.add(there.untyped_storage().data_ptr())
            if part.untyped_storage()._cdata != whole.untyped_storage()._cdata:
                continue  # the loader has put the elements in another order first, in memory of its own
            place = (part.storage_offset(), tuple(part.shape), tuple(part.stride()))
            sums[name, place] = checksum(there.to(dtype), part.storage_offset(), part.stride())
    empty = [
        name
        for name, parameter in model.named_parameters()
        if parameter.untyped_storage().data_ptr() not in filled and parameter.numel()
    ]
    if followed and empty:
        raise RuntimeError(f"the engine has weights that were not sent: {empty[:5]}")
    return [Slice(name, place, pair) for (name, place), pair in as_integers(sums).items()]


def compared_share(shapes: Iterable[Shape], sent: Mapping[str, Sums], held: Iterable[Iterable[Slice]]) -> float:
    """The share of the sent elements that an engine, whose workers hold these slices, was proved to hold.

    Raises RuntimeError if a tensor differs, or two workers hold different values of the same elements.
    """
    parts: dict[str, dict[Place, Sums]] = {}
    wrong: set[str] = set()
    for name, (offset, part, strides), (total, places) in (piece for worker in held for piece in worker):
        place = (offset, tuple(part), tuple(strides))  # lists, where vLLM has carried them between processes
        if parts.setdefault(name, {}).setdefault(place, (total, places)) != (total, places):
            wrong.add(name)
    compared = everything = 0
    for name, _, shape in shapes:
        everything += prod(shape)
        pieces = parts.get(name, {})
        if sum(prod(part) for _, part, _ in pieces) == prod(shape):
            compared += prod(shape)
            if any(
                (sum(of_parts) - whole) % 2**64 for *of_parts, whole in zip(*pieces.values(), sent[name], strict=True)
            ):
                wrong.add(name)
    if wrong:
        raise RuntimeError(f"the engine holds other weights than were sent: {sorted(wrong)[:5]}")
    return compared / everything
