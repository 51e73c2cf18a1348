"""The finite convex program of the SGPO paper, in cvxpy: the reference for tests of the exact solution.

With pieces l_k(x) = offset_k + slope_k * x, Theorem 3.3 / equation 9 of arXiv 2502.18099 reads

    maximise   (1/N) sum_ik s_ik * l_k(x_i - q_ik / s_ik)  =  (1/N) sum_ik [ s_ik * l_k(x_i) - slope_k * q_ik ]
    subject to s_ik >= 0,   sum_k s_ik = 1 for every i,   (1/N) sum_i price_i sum_k |q_ik| <= radius,
               a * s_ik <= s_ik * x_i - q_ik <= b * s_ik     (for x_i outside [a, b]: a or b gives way to x_i),

a linear program once |q| is split. The worst case is the distribution (1/N) sum_ik s_ik * delta(x_i - q_ik / s_ik).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openrlhf_sgpo.dro.instance import Instance, read_instance
from openrlhf_sgpo.dro.losses import loss_slope, loss_value, piece_tangents

if TYPE_CHECKING:
    import numpy as np

# The tightest that HiGHS accepts: its default of 1e-7 leaves errors of up to 1e-9 in the value, these only rounding.
TOLERANCES = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


@dataclass(frozen=True, eq=False)
class ProgramSolution:
    """The optimum. s, q: weights and weighted displacements, (N, K) float64 on the CPU. status: as the solver reports it."""

    value: float
    s: Tensor
    q: Tensor
    status: str


def program(
    margins: Tensor | np.ndarray,
    radius: float,
    *,
    space: str = "margin",
    pieces: int | None = None,
    window: tuple[float, float] | None = None,
    window_pad: float = 1.0,
    price: Tensor | np.ndarray | None = None,
) -> ProgramSolution:
    """Solves the paper's program with cvxpy and HiGHS; arguments as in ``solve_worst_case``, arrays or tensors.

    The exact logistic loss (``pieces=None`` in margin space) is replaced by its tangents at every sample and at the
    edge a. This is exact: the tangents lie below the loss, so the value cannot grow, and they touch it at every sample
    and at a, the only points where some optimal distribution has mass, so it cannot shrink. K is then up to N + 1, which
    suits only small N.

    Raises ValueError as ``solve_worst_case`` does, and RuntimeError if the solver does not report an optimum.
    """
    import cvxpy

    instance = read_instance(
        torch.as_tensor(margins).cpu(),
        radius,
        space=space,
        pieces=pieces,
        window=window,
        window_pad=window_pad,
        price=None if price is None else torch.as_tensor(price).cpu(),
    )
    slopes, offsets = _tangents(instance)
    values, last = instance.values, instance.window[1]
    count, pieces_used = len(values), len(slopes)
    price_column = (torch.ones_like(values) if instance.price is None else instance.price).unsqueeze(1)
    gains = (offsets + values.unsqueeze(1) * slopes).numpy()
    columns = (count, pieces_used)
    s = cvxpy.Variable(columns, nonneg=True)
    left = cvxpy.Variable(columns, nonneg=True)  # q = left - right: towards a, towards b
    right = cvxpy.Variable(columns, nonneg=True)
    q = left - right
    # Samples outside the window may stay where they are.
    room_left = instance.distance.unsqueeze(1).expand(columns).numpy()
    room_right = (last - values).clamp_min(0.0).unsqueeze(1).expand(columns).numpy()
    pull = (-slopes).expand(columns).numpy()
    # The sum, not the mean: HiGHS stops at absolute tolerances, which a factor of 1/N would loosen.
    objective = cvxpy.sum(cvxpy.multiply(gains, s)) + cvxpy.sum(cvxpy.multiply(pull, q))
    constraints = [
        cvxpy.sum(s, axis=1) == 1,
        cvxpy.sum(cvxpy.multiply(price_column.expand(columns).numpy(), left + right)) <= count * instance.radius,
        q <= cvxpy.multiply(room_left, s),
        -q <= cvxpy.multiply(room_right, s),
    ]
    problem = cvxpy.Problem(cvxpy.Maximize(objective), constraints)
    problem.solve(solver=cvxpy.HIGHS, highs_options=TOLERANCES)
    if problem.status != cvxpy.OPTIMAL or s.value is None or q.value is None:
        raise RuntimeError(
            f"HiGHS did not solve the program of {count} samples and {pieces_used} pieces: {problem.status}"
        )
    return ProgramSolution(
        value=float(objective.value) / count,
        s=torch.from_numpy(s.value),
        q=torch.from_numpy(q.value),
        status=problem.status,
    )


def _tangents(instance: Instance) -> tuple[Tensor, Tensor]:
    """Slopes and offsets (values at x = 0) of the pieces, float64, shape (K,)."""
    if instance.pieces is not None:
        return piece_tangents(instance.space, instance.pieces, instance.window)
    points = torch.cat([instance.values, instance.values.new_tensor([instance.window[0]])]).unique()
    slopes = loss_slope(points, space=instance.space, pieces=None)
    return slopes, loss_value(points, space=instance.space, pieces=None) - slopes * points


__all__ = ["ProgramSolution", "program"]
