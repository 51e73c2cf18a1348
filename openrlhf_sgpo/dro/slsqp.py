"""The follower of the authors' released code for one group of margins, to compare with the exact solution.

It works in probability space, x = sigmoid(xi), with the K tangents l_k of -log x at k / K, and passes

    minimise   -(1/N) sum_ik s_ik * l_k(x_i - d_ik) + 1e5 * penalty,      d_ik = q_ik / s_ik,
    penalty  = K * sum_i |1 - sum_k s_ik| + sum_ik [ (d_ik - x_i)_+ + (x_i - d_ik - 1)_+ ],
    subject to sum_k s_ik = 1,   sum_ik |q_ik| <= N * radius,   1e-5 <= s_ik <= 1,   |q_ik| <= radius,

to SciPy's SLSQP with finite differences, starting from s = 1 / K and q = 0. The last iterate is used whether or not it
converged. The bound on each |q_ik| and the penalty are not in the SGPO paper (arXiv 2502.18099, equation 9).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openrlhf_sgpo.dro.instance import read_instance
from openrlhf_sgpo.dro.losses import PROBABILITY_PIECES, loss_value, piece_tangents

if TYPE_CHECKING:
    import numpy as np

SMALLEST_WEIGHT = 1e-5
SMALLEST_RADIUS = 1e-5
PENALTY = 1e5


@dataclass(frozen=True, eq=False)
class SlsqpSolution:
    """The last iterate, unrepaired. s, displacement: (N, K) float64, weights and d = q / s in units of probability.

    value: mean loss of the returned distribution, (1/N) sum_ik s_ik * max_j l_j(x_i - d_ik), without the penalty.
    objective: the same with l_k in place of max_j l_j, as in the program; never above ``value``.
    distance: mean transport cost (1/N) sum_ik |q_ik|, to be compared with the radius.
    success: whether SciPy reports convergence. iterations: of SLSQP.
    """

    s: Tensor
    displacement: Tensor
    value: float
    objective: float
    distance: float
    success: bool
    iterations: int


def slsqp(
    margins: Tensor | np.ndarray, radius: float, *, pieces: int = PROBABILITY_PIECES, maximum_iterations: int = 50
) -> SlsqpSolution:
    """Runs the released follower on one group of ``margins``, shape (N,), with a radius in units of probability.

    A radius of at most 1e-5 skips the solver and returns the starting point, which is plain DPO. Memory and time grow quickly:
    a group of 100 takes minutes. Raises ValueError as ``solve_worst_case`` does.
    """
    import numpy as np
    from scipy.optimize import minimize

    instance = read_instance(
        torch.as_tensor(margins).cpu(),
        radius,
        space="probability",
        pieces=pieces,
        window=None,
        window_pad=0.0,
        price=None,
    )
    x = instance.values.numpy()[:, None]
    slopes, offsets = (tensor.numpy() for tensor in piece_tangents("probability", pieces, instance.window))
    count, size = len(x), len(x) * pieces

    def split(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return flat[:size].reshape(count, pieces), flat[size:].reshape(count, pieces)

    def mean_loss(s: np.ndarray, q: np.ndarray) -> float:
        return float((s * (offsets + slopes * (x - q / s))).sum() / count)

    def penalised(flat: np.ndarray) -> float:
        s, q = split(flat)
        atoms = x - q / s
        outside = np.maximum(-atoms, 0.0).sum() + np.maximum(atoms - 1.0, 0.0).sum()
        return -mean_loss(s, q) + PENALTY * (pieces * np.abs(1.0 - s.sum(axis=1)).sum() + outside)

    start = np.concatenate([np.full(size, 1.0 / pieces), np.zeros(size)])
    flat, success, iterations = start, True, 0
    if instance.radius > SMALLEST_RADIUS:
        try:
            result = minimize(
                penalised,
                start,
                method="SLSQP",
                bounds=[(SMALLEST_WEIGHT, 1.0)] * size + [(-instance.radius, instance.radius)] * size,
                constraints=[
                    {"type": "eq", "fun": lambda flat: split(flat)[0].sum(axis=1) - 1.0},
                    {"type": "ineq", "fun": lambda flat: count * instance.radius - np.abs(split(flat)[1]).sum()},
                ],
                options={"maxiter": maximum_iterations},
            )
            flat, success, iterations = result.x, bool(result.success), int(result.nit)
        except ValueError:  # SciPy's finite differences left the bounds; the released code then keeps the start
            success = False
    s, q = split(flat)
    displacement = q / s
    reached = loss_value(torch.from_numpy(x - displacement), space="probability", pieces=pieces).numpy()
    return SlsqpSolution(
        s=torch.from_numpy(s),
        displacement=torch.from_numpy(displacement),
        value=float((s * reached).sum() / count),
        objective=mean_loss(s, q),
        distance=float(np.abs(q).sum() / count),
        success=success,
        iterations=iterations,
    )


__all__ = ["SlsqpSolution", "slsqp"]
