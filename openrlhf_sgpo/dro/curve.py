"""The worst-case value V of fixed margins as a function of the radius: what a follower of any strength could do to a policy.

Whatever the radius, the follower serves the samples in the same order (``solve.py``), so V is piecewise linear in it. With
l(x_i), costs c_i and gains g_i in that order, the first k samples are moved at

    radius_k = (1/N) sum_{i <= k} c_i,        V(radius_k) = (1/N) [ sum_i l(x_i) + sum_{i <= k} g_i ].

Its slopes g_k / c_k are the follower's lam, which fall: V is concave. V(0) is the loss without an attack, which in margin space
with the exact loss is DPO's, and beyond the last kink V stays at what the support allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openrlhf_sgpo.dro.instance import read_instance
from openrlhf_sgpo.dro.losses import loss_value, space_variable
from openrlhf_sgpo.dro.solve import solve_worst_case
from openrlhf_sgpo.intervals import standard_error


def worst_case_curve(
    margins: Tensor,
    radii: Sequence[float],
    *,
    space: str = "margin",
    pieces: int | None = None,
    window: tuple[float, float] | None = None,
    window_pad: float = 1.0,
) -> npt.NDArray[np.float64]:
    """``solve_worst_case(margins, radius, ...).value`` for each of the ``radii``, from one sort; shape (len(radii),).

    The other arguments are those of ``solve_worst_case``. Raises ValueError as it does.
    """
    instance = read_instance(
        margins, max(radii), space=space, pieces=pieces, window=window, window_pad=window_pad, price=None
    )
    edge = instance.window[0]
    values, order = instance.values.sort()
    stays = loss_value(values, space=space, pieces=instance.pieces, window=instance.window)
    at_edge = loss_value(values.new_full((), edge), space=space, pieces=instance.pieces, window=instance.window)
    cost = instance.distance[order]
    gain = torch.where(cost > 0, at_edge - stays, 0.0)
    kinks, reached = (
        torch.cat([start.reshape(1), start + step.cumsum(0) / len(values)]).cpu().numpy()
        for start, step in ((cost.new_zeros(()), cost), (stays.mean(), gain))
    )
    return np.interp(np.asarray(radii, np.float64), kinks, reached)


def certified_curve(
    certificate: Mapping[str, Any], margins: Sequence[float], radii: Sequence[float]
) -> npt.NDArray[np.float64]:
    """The same of these margins, shape (N,), in the space and window and with the tangents of a worst case's certificate."""
    return worst_case_curve(
        torch.tensor(margins, dtype=torch.float64),
        radii,
        space=certificate["space"],
        pieces=certificate["pieces"],
        window=tuple(certificate["window"]),
    )


def influences(
    margins: Tensor,
    radius: float,
    *,
    space: str = "margin",
    pieces: int | None = None,
    window: tuple[float, float] | None = None,
) -> Tensor:
    """What each sample contributes to V, shape (N,), float64: lam * radius + phi(x_i), with the arguments and errors of
    ``solve_worst_case``.

    Their mean is V and, up to a constant, they are its influence function: V is a minimum over lam, so that lam may be held
    fixed (envelope theorem). So the standard error of their mean is that of V to first order, and that of their mean difference
    over the same pairs under two policies is that of the difference of the two V.
    """
    worst = solve_worst_case(margins, radius, space=space, pieces=pieces, window=window)
    values = space_variable(worst.margins, space)
    edge = values.new_full((), worst.edge)
    stays, at_edge = (
        loss_value(places, space=space, pieces=worst.pieces, window=worst.window) for places in (values, edge)
    )
    return worst.slope * radius + torch.maximum(stays, at_edge - worst.slope * (values - edge).clamp_min(0.0))


class Saving(NamedTuple):
    """V of a policy and of a base on the same pairs; base - value, what the policy saves, and its standard error over the pairs
    (None for a single pair)."""

    value: float
    base: float
    saved: float
    error: float | None


def saving(
    margins: Tensor,
    base: Tensor,
    radius: float,
    *,
    space: str = "margin",
    pieces: int | None = None,
    window: tuple[float, float] | None = None,
) -> Saving:
    """V of two policies at a radius, from their margins of the same pairs, each (N,), in one support: pass the ``window``. The
    other arguments and errors are those of ``solve_worst_case``, the standard error is that of ``influences``."""
    shares, base_shares = (
        influences(values, radius, space=space, pieces=pieces, window=window) for values in (margins, base)
    )
    gains = base_shares - shares
    return Saving(float(shares.mean()), float(base_shares.mean()), float(gains.mean()), standard_error(gains.tolist()))


def support_of(margins: Iterable[Tensor], space: str = "margin") -> tuple[float, float]:
    """A support for policies that are compared: [0, 1] in probability space, otherwise 1 beyond the smallest and the largest
    margin of all of them."""
    if space == "probability":
        return 0.0, 1.0
    least, most = (float(bound) for bound in torch.cat(list(margins)).aminmax())
    return least - 1.0, most + 1.0


__all__ = ["Saving", "certified_curve", "influences", "saving", "support_of", "worst_case_curve"]
