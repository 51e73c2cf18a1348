"""The best case of a convex decreasing loss over the same Wasserstein ball, solved exactly by one sort.

    V = inf { E_alpha[l] : W1(alpha, empirical) <= radius }

with l(x) = -log sigmoid(x) on the whole line (margin space), or l(x) = -log x on [0, 1] (probability space, where
x = sigmoid(xi)). The loss is not replaced by tangents, because no mass is sent to where it is steepest. This is not in the
SGPO paper (arXiv 2502.18099), whose follower is the worst case (``solve.py``).

Primal. By Jensen's inequality every sample can keep its mass together, at one point y_i: spreading it costs as much and
helps less. Moving left never helps. This leaves a convex program in y_i >= x_i, and at its optimum all samples that move
have the same slope l'(y_i), hence the same y_i: they are raised to one level c, and the others stay.

    V = mean_i l(max(x_i, c)),        c such that  mean_i (c - x_i)_+ = radius

The left side of this equation is piecewise linear in c with kinks at the samples: sort them, accumulate the cost of raising
all samples below each one to it, and search these costs for the radius.

Dual. With one number lam, the loss saved per unit of budget:

    V = max_{lam >= 0}  -lam * radius + mean_i psi(x_i),      psi(x) = min_z l(z) + lam * |z - x|

The minimum is at x if l is no steeper than lam there; then psi(x) = l(x). Otherwise psi(x) = h(lam) - lam * x with

    h(lam) = min_z l(z) + lam * z = -lam log(lam) - (1 - lam) log(1 - lam)      margin space, 0 <= lam <= 1
                                  = 1 + log(lam), or lam if lam < 1             probability space

and lam = -l'(c) attains the maximum. The dual value is computed from lam alone, without c and without the points y_i. It
is a lower bound on V for every lam; the primal value is an upper bound. Their difference certifies both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from openrlhf_sgpo.dro.instance import certificate_figures, read_instance
from openrlhf_sgpo.dro.losses import best_case_loss


@dataclass(frozen=True, eq=False)
class BestCase:
    """The best case and its certificate. Scalars are Python floats; "units of the space" are those of xi or sigmoid(xi).

    value: best-case mean loss V, from the primal solution.    dual_value: the same from the dual, a lower bound.
    empirical: mean loss -log sigmoid(xi) at the margins themselves.
    slope: lam = -l'(c), loss per unit of the space, and -dV/dradius. 0 if saturated.
    level: c, to which the samples below it are raised, units of the space. The smallest sample at radius 0.
    threshold: the level as a margin: c itself, or log(c / (1 - c)) in probability space (inf if saturated).
    fraction_moved: share of the samples that are raised, 0 to 1.
    raised: (N,) distance (c - x_i)_+ of every sample, units of the space, in the dtype and on the device of the input.
    budget_used: share of the radius that is spent, 0 to 1 (0 at radius 0).
    saturated: probability space only; the budget raises all samples to p = 1, where the loss is 0 and has no gradient.
    margins: (N,) float64 copy of the margins as given.
    """

    value: float
    dual_value: float
    empirical: float
    slope: float
    level: float
    threshold: float
    fraction_moved: float
    raised: Tensor
    budget_used: float
    saturated: bool
    space: str
    radius: float
    margins: Tensor

    @property
    def window(self) -> tuple[float, float]:
        """The support, which is unbounded."""
        return (-math.inf, math.inf)

    def certificate(self) -> dict[str, Any]:
        """The figures that describe and prove this solution, JSON-serialisable; see docs/algorithms/sgpo.md."""
        return certificate_figures(self, "level") | {"ball": "best", "space": self.space, "pairs": len(self.margins)}

    @property
    def gap(self) -> float:
        """Primal value minus dual value, the certificate: 0 to rounding."""
        return self.value - self.dual_value

    @property
    def bound(self) -> float:
        """Lower bound on V: empirical - L * radius, or 0, with L the steepest slope -l' at any sample.

        The loss flattens to the right, so L is its Lipschitz constant wherever the best case can move a sample; it is at
        most 1 in margin space. In probability space, where -log p as a whole has no such constant, L = 1 / min_i p_i.
        """
        steepest = _steepness(_values(self.margins, self.space).min(), self.space)
        return max(0.0, self.empirical - float(steepest) * self.radius)

    @property
    def gradient(self) -> Tensor:
        """dV/dxi_i at the solved margins, shape (N,), dtype and device of the input.

            dV/dxi_i = (1/N) * l'(max(x_i, c)) * dx/dxi,        0 if saturated.

        This is the effect on a mean loss, hence the factor 1/N.
        """
        if self.saturated:
            return torch.zeros_like(self.raised)
        values, pull = _values(self.margins, self.space), torch.full_like(self.margins, self.slope)
        if self.space == "probability":
            pull = pull * values * torch.sigmoid(-self.margins)
        stays = torch.sigmoid(-self.margins)  # -dl/dxi of the plain loss, the same in both spaces
        return (-torch.where(values < self.level, pull, stays) / len(values)).to(self.raised.dtype)

    def robust_loss(self, margins: Tensor) -> Tensor:
        """The leader's loss per sample: ``best_case_loss`` with this level held fixed.

        ``margins`` may be those of any samples, in any shape; differentiable. Equals the plain logistic loss at radius 0.
        At the solved margins mean(robust_loss) - slope * radius = value.

        Raises ValueError if the ball is saturated, as the loss then has no gradient.
        """
        if self.saturated:
            raise ValueError(
                f"the ball of radius {self.radius:g} is saturated: it raises every sample to probability 1, so the loss "
                "is constant and has no gradient; use a smaller radius"
            )
        if self.radius == 0.0:
            return -functional.logsigmoid(margins)
        return best_case_loss(margins, self.level, space=self.space)


def solve_best_case(margins: Tensor, radius: float, *, space: str = "margin") -> BestCase:
    """Solves the best case exactly in O(N log N); the module docstring has the mathematics.

    margins: (N,) floating-point tensor on any device; margins in both spaces.
    radius: of the Wasserstein-1 ball, mean distance per sample in units of the space (xi, or win probability).
    space: ``"margin"`` or ``"probability"``.

    Computed in float64. The answer does not depend on the order of the samples.

    Raises ValueError, with the index of the sample, for margins that are empty, not 1-dimensional, not floating-point or
    not finite, for a negative or non-finite radius, and for an unknown space.
    """
    instance = read_instance(margins, radius, space=space, pieces=None, window=None, window_pad=1.0, price=None)
    margins_read, radius = instance.margins, instance.radius
    values = _values(margins_read, space)
    level = _level(values, radius)
    saturated = space == "probability" and radius > 0.0 and level >= 1.0
    if saturated:
        level = 1.0
    losses = -functional.logsigmoid(margins_read)
    corner = values.new_tensor(level)
    slope = 0.0 if saturated else float(_steepness(corner, space))
    if space == "probability":
        at_level, threshold = -torch.log(corner), float(torch.logit(corner))
    else:
        at_level, threshold = -functional.logsigmoid(corner), level
    raised = (level - values).clamp_min(0.0)
    below = values < level
    means = torch.stack(
        [
            torch.where(below, at_level, losses).mean(),
            _dual_losses(values, losses, slope, space).mean(),
            losses.mean(),
            below.double().mean(),
            raised.mean(),
        ]
    )
    value, dual, empirical, fraction, spent = means.tolist()
    return BestCase(
        value=value,
        dual_value=dual - slope * radius,
        empirical=empirical,
        slope=slope,
        level=level,
        threshold=threshold,
        fraction_moved=fraction,
        raised=raised.to(margins.dtype),
        budget_used=min(1.0, spent / radius) if radius > 0.0 else 0.0,
        saturated=saturated,
        space=space,
        radius=radius,
        margins=margins_read,
    )


def _values(margins: Tensor, space: str) -> Tensor:
    """The variable of the space. A sigmoid that underflows (margins below -700) becomes the smallest normal number."""
    if space == "probability":
        return torch.sigmoid(margins).clamp_min(torch.finfo(margins.dtype).tiny)
    return margins


def _steepness(values: Tensor, space: str) -> Tensor:
    """-l'(x) > 0, same shape."""
    return 1.0 / values if space == "probability" else torch.sigmoid(-values)


def _level(values: Tensor, radius: float) -> float:
    """c with mean_i (c - x_i)_+ = radius; the smallest value at radius 0. May lie beyond 1 in probability space."""
    ordered, count = values.sort().values, len(values)
    shares = torch.arange(1, count, dtype=values.dtype, device=values.device) / count
    # Entry k is the mean cost of raising all samples below ordered[k] to it. No term is negative, so nothing cancels.
    costs = torch.cat([values.new_zeros(1), (shares * ordered.diff()).cumsum(0)])
    last = int(torch.searchsorted(costs, radius, right=True)) - 1
    return float(ordered[last] + (radius - costs[last]) * (count / (last + 1)))


def _dual_losses(values: Tensor, losses: Tensor, slope: float, space: str) -> Tensor:
    """psi(x_i) = min_z l(z) + slope * |z - x_i|, shape (N,), from the slope alone."""
    if space == "probability":
        at_zero = 1.0 + math.log(slope) if slope >= 1.0 else slope
    else:
        at_zero = -slope * math.log(slope) if slope > 0.0 else 0.0
        at_zero -= (1.0 - slope) * math.log1p(-slope) if slope < 1.0 else 0.0
    return torch.where(_steepness(values, space) > slope, at_zero - slope * values, losses)


__all__ = ["BestCase", "solve_best_case"]
