"""The follower's problem as all solvers of this package read it: checked, in float64, with defaults filled in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openrlhf_sgpo.dro.losses import resolve_pieces, space_variable


@dataclass(frozen=True, eq=False)
class Instance:
    """A checked follower problem, in float64.

    margins: (N,) copy of the input. values: (N,) variable of the space. distance: (N,) from each value down to the edge a, 0
    for values left of it.
    price: (N,) or None, with ``smallest_price`` its minimum (1 for None). window: (a, b) in the units of the space.
    """

    margins: Tensor
    values: Tensor
    distance: Tensor
    radius: float
    space: str
    pieces: int | None
    window: tuple[float, float]
    price: Tensor | None
    smallest_price: float


def read_instance(
    margins: Tensor,
    radius: float,
    *,
    space: str,
    pieces: int | None,
    window: tuple[float, float] | None,
    window_pad: float,
    price: Tensor | None,
) -> Instance:
    """Checks a follower problem and fills in its defaults; arguments as in ``solve_worst_case``.

    Raises ValueError for margins that are empty, not 1-dimensional, not floating-point or not finite; a negative or
    non-finite radius or pad; an unknown space; pieces < 1; a window that is empty or leaves [0, 1] in probability space;
    and prices that have another shape or are not positive and finite.
    """
    pieces = resolve_pieces(space, pieces)
    if not isinstance(margins, Tensor) or not margins.is_floating_point():
        got = f"a tensor of {margins.dtype}" if isinstance(margins, Tensor) else type(margins).__name__
        raise ValueError(f"margins must be a floating-point tensor, got {got}; convert with .float()")
    if margins.dim() != 1 or len(margins) == 0:
        raise ValueError(f"margins must have shape (N,) with N >= 1, got {tuple(margins.shape)}")
    for name, number in (("radius", radius), ("window_pad", window_pad)):
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {number}")
    # A copy, because callers may reuse their buffer of recent margins.
    margins = margins.detach().to(torch.float64, copy=True)
    low, high = torch.stack(margins.aminmax()).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        index = int((~margins.isfinite()).nonzero()[0])
        raise ValueError(f"margin of sample {index} is {margins[index].item()}; drop that sample, or fix its source")
    prices, smallest_price = (None, 1.0) if price is None else _read_price(price, margins)
    values = space_variable(margins, space)
    if window is not None:
        window = _read_window(window, space)
    elif space == "probability":
        window = (0.0, 1.0)
    else:
        window = (low - window_pad, high + window_pad)
        if not window[0] < window[1]:
            raise ValueError(
                f"all margins equal {low} and window_pad {window_pad} leaves the window empty; raise window_pad"
            )
    return Instance(
        margins=margins,
        values=values,
        distance=(values - window[0]).clamp_min(0.0),
        radius=float(radius),
        space=space,
        pieces=pieces,
        window=window,
        price=prices,
        smallest_price=smallest_price,
    )


def _read_price(price: Tensor, margins: Tensor) -> tuple[Tensor, float]:
    """A checked float64 copy of the prices, and the smallest of them."""
    prices = torch.as_tensor(price, dtype=torch.float64, device=margins.device).detach().clone()
    if prices.shape != margins.shape:
        raise ValueError(
            f"price must have one entry per margin, shape {tuple(margins.shape)}; got {tuple(prices.shape)}"
        )
    smallest, largest = torch.stack(prices.aminmax()).tolist()
    if not (smallest > 0 and math.isfinite(largest)):
        index = int((~(prices.isfinite() & (prices > 0))).nonzero()[0])
        raise ValueError(f"price of sample {index} is {prices[index].item()}; prices must be positive and finite")
    return prices, smallest


def _read_window(window: tuple[float, float], space: str) -> tuple[float, float]:
    first, last = float(window[0]), float(window[1])
    if not (math.isfinite(first) and math.isfinite(last) and first < last):
        raise ValueError(f"window must be finite with a < b, got ({first}, {last})")
    if space == "probability" and not (first >= 0.0 and last <= 1.0):
        raise ValueError(f"window of the probability space must lie in [0, 1], got ({first}, {last})")
    return first, last


__all__ = ["Instance", "read_instance"]


def certificate_figures(solution: Any, place: str) -> dict[str, Any]:
    """The figures that certificates of the worst and of the best case share. place: the attribute that says where moved mass
    goes."""
    names = (
        "value",
        "dual_value",
        "gap",
        "empirical",
        "bound",
        "slope",
        place,
        "fraction_moved",
        "budget_used",
        "radius",
    )
    # At radius 0 no sample is below the threshold, and JSON has no infinity.
    threshold = {"threshold": solution.threshold if solution.radius else None}
    return {name: getattr(solution, name) for name in names} | threshold
