"""The follower, solved exactly: the worst case of a convex non-increasing loss over a Wasserstein ball, by one sort.

    V = sup { E_alpha[l] : W1(alpha, empirical) <= radius, supp(alpha) in [a, b] }       (SGPO paper, arXiv 2502.18099)

Primal. By convexity the cheapest way to hurt sample i is to send a share p_i of its mass all the way to the edge a.
Per unit of mass this costs c_i = price_i * (x_i - a) and gains g_i = l(a) - l(x_i). This leaves a fractional knapsack:
serve the samples in decreasing order of g_i / c_i until sum_i p_i c_i = N * radius, with at most one split. With equal
prices the ratio is the slope of a chord from a, which never increases with x_i: the smallest margins come first.

    V = mean_i [ l(x_i) + p_i * (l(a) - l(x_i)) ]

Dual. Two numbers describe the whole solution: the edge a and the slope lam, the ratio g / c of the marginal sample:

    V = min_{lam >= 0}  lam * radius + mean_i max( l(x_i), l(a) - lam * price_i * (x_i - a) )

Both values are computed and reported; their difference certifies the solution and is 0 to rounding.

The window bounds where mass may go, not where it is. Samples left of the edge stay, with c_i = 0 and their own loss, so V is
never below the loss without an attack and converges to it with the radius, wherever the margins are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openrlhf_sgpo.dro.instance import Instance, certificate_figures, read_instance
from openrlhf_sgpo.dro.losses import (
    active_piece,
    chord_slope,
    danskin_loss,
    lipschitz,
    loss_slope,
    loss_value,
    space_variable,
)


@dataclass(frozen=True, eq=False)
class WorstCase:
    """The follower's solution. Scalars are Python floats; "units of the space" are those of xi or of sigmoid(xi).

    value: worst-case mean loss V, from the primal solution.    dual_value: the same from the dual, an upper bound.
    empirical: mean loss without an attack.
    slope: lam, loss per unit of the space (and of price). 0 if saturated. At radius 0 the Lipschitz constant of the
        loss divided by the smallest price; every slope from there on is optimal.
    edge: a, to which mass is moved, units of the space.
    threshold: the margin of the marginal sample (the one that is split, or the next one), in margin units in both
        spaces; the largest if several tie. -inf at radius 0 and inf if saturated, where no sample is marginal.
        Without prices, margins below it are moved and margins above it stay.
    moved: (N,) share p_i of each sample's mass that moves to the edge, in the dtype and on the device of the input.
    share: p_i of the samples at the threshold, 0 to 1.
    budget_used: share of the budget N * radius that is spent, 0 to 1 (0 at radius 0).
    saturated: the budget pays for moving all mass to the edge. Such a ball leaves no gradient to train on.
    margins: (N,) float64 copy of the input.    price: (N,) float64, or None for all 1.
    """

    value: float
    dual_value: float
    empirical: float
    slope: float
    edge: float
    threshold: float
    share: float
    moved: Tensor
    budget_used: float
    saturated: bool
    space: str
    pieces: int | None
    radius: float
    window: tuple[float, float]
    price: Tensor | None
    margins: Tensor

    @property
    def gap(self) -> float:
        """Dual value minus primal value, the certificate: 0 to rounding."""
        return self.dual_value - self.value

    @property
    def bound(self) -> float:
        """Upper bound on V: empirical + L * radius / min(price), with L the Lipschitz constant (Theorem 2.4)."""
        cheapest = 1.0 if self.price is None else float(self.price.min())
        return self.empirical + lipschitz(self.space, self.pieces) * self.radius / cheapest

    @property
    def fraction_moved(self) -> float:
        """Share of all mass that moves to the edge, 0 to 1."""
        return float(self.moved.mean(dtype=torch.float64))

    def certificate(self) -> dict[str, Any]:
        """The figures that describe and prove this solution, JSON-serialisable; see docs/algorithms/sgpo.md."""
        figures = certificate_figures(self, "edge") | {"ball": "worst", "space": self.space, "pairs": len(self.margins)}
        figures |= {"pieces": self.pieces, "window": list(self.window)}
        if self.pieces and self.space == "margin":
            figures["delta_K"] = solve_worst_case(self.margins, self.radius, window=self.window).value - self.value
        return figures

    @property
    def gradient(self) -> Tensor:
        """dV/dxi_i at the solved margins with the window held fixed, shape (N,), dtype and device of ``moved``.

            dV/dxi_i = (1/N) * [ -p_i * lam * price_i + (1 - p_i) * l'(x_i) ] * dx/dxi.

        This is the effect on the mean loss, hence the factor 1/N. At the edge, where V has a kink, it is the derivative from
        the left.
        """
        values = space_variable(self.margins, self.space)
        pull = self.slope if self.price is None else self.slope * self.price
        moved = self.moved.to(values)
        stays = loss_slope(values, space=self.space, pieces=self.pieces, window=self.window)
        gradient = (1 - moved) * stays - moved * pull
        if self.space == "probability":
            # sigmoid(-xi) keeps its digits where 1 - sigmoid(xi) has lost them.
            gradient = gradient * torch.sigmoid(self.margins) * torch.sigmoid(-self.margins)
        return (gradient / len(values)).to(self.moved.dtype)

    def robust_loss(self, margins: Tensor, price: Tensor | None = None) -> Tensor:
        """The leader's loss per sample: the Danskin loss with this slope and edge held fixed.

        ``margins`` may be those of any samples, in any shape; differentiable. ``price`` has their shape and is required
        exactly if this follower was solved with prices. Equals l(x) at radius 0. At the solved margins
        slope * radius + mean(robust_loss) = value.

        Raises ValueError if the ball is saturated, as the loss then has no gradient, or if prices are missing.
        """
        if self.saturated:
            raise ValueError(
                f"the ball of radius {self.radius:g} is saturated: the follower moves every sample to the edge "
                f"{self.edge:g}, so the loss is constant and has no gradient; use a smaller radius or a wider window"
            )
        if self.price is not None and price is None:
            raise ValueError("this follower was solved with prices; pass the prices of these margins as price=")
        if self.radius == 0.0:
            values = space_variable(margins, self.space)
            return loss_value(values, space=self.space, pieces=self.pieces, window=self.window)
        return danskin_loss(
            margins,
            self.slope,
            self.edge,
            space=self.space,
            pieces=self.pieces,
            window=self.window,
            price=price,
            # With prices, samples tie in gain per cost, not in margins.
            threshold=self.threshold if price is None else None,
            share=self.share,
        )

    def transport(self) -> tuple[Tensor, Tensor]:
        """The solution in the paper's own variables (s, q), both of shape (N, K), dtype and device of ``moved``.

        Sample i keeps the mass 1 - p_i on the piece active at x_i, with q = 0, and puts p_i on the piece active at the
        edge with q = p_i * (x_i - a), units of the space. The atoms are x_i - q_ik / s_ik, and sum_k s_ik = 1. If both
        pieces are the same, the single atom lies at the mean of the two, where the linear piece has the same value. The
        exact loss (``pieces=None``) has no pieces: column 0 is the mass that stays, column 1 the mass that moves.
        """
        values = space_variable(self.margins, self.space)
        moved = self.moved.to(values)
        if self.pieces is None:
            piece_at_sample, piece_at_edge = torch.zeros_like(values), torch.ones_like(values)
        else:
            piece_at_sample = active_piece(values, space=self.space, pieces=self.pieces, window=self.window)
            corner = torch.full_like(values, self.edge)
            piece_at_edge = active_piece(corner, space=self.space, pieces=self.pieces, window=self.window)
        columns = torch.arange(2 if self.pieces is None else self.pieces, device=values.device, dtype=values.dtype)
        stays = torch.where(columns == piece_at_sample.unsqueeze(1), (1 - moved).unsqueeze(1), 0.0)
        goes = torch.where(columns == piece_at_edge.unsqueeze(1), moved.unsqueeze(1), 0.0)
        q = goes * (values - self.edge).unsqueeze(1)
        return (stays + goes).to(self.moved.dtype), q.to(self.moved.dtype)


def solve_worst_case(
    margins: Tensor,
    radius: float,
    *,
    space: str = "margin",
    pieces: int | None = None,
    window: tuple[float, float] | None = None,
    window_pad: float = 1.0,
    price: Tensor | None = None,
) -> WorstCase:
    """Solves the follower exactly in O(N log N); the module docstring has the mathematics.

    margins: (N,) floating-point tensor on any device; margins in both spaces.
    radius: of the Wasserstein-1 ball, mean distance per sample in units of the space (xi, or win probability).
    space: ``"margin"`` or ``"probability"``.
    pieces: number of tangents; None means the exact logistic loss in margin space and 6 tangents in probability space.
    window: (a, b), support of the attack in units of the space; samples may lie outside. Default:
        [min - window_pad, max + window_pad] in margin space, (0, 1) in probability space.
    price: (N,) positive, cost of moving sample i by one unit (default: 1 each).

    Computed in float64. Samples that tie (equal margins; with prices, equal gain per cost) share the split equally, so
    the solution does not depend on their order. On an accelerator the host waits for a handful of numbers, however many
    samples there are.

    Raises ValueError, with the index of the sample, for every input that ``read_instance`` rejects.
    """
    instance = read_instance(
        margins, radius, space=space, pieces=pieces, window=window, window_pad=window_pad, price=price
    )
    space, pieces, edge, values = instance.space, instance.pieces, instance.window[0], instance.values
    cost = instance.distance if instance.price is None else instance.price * instance.distance
    stays = loss_value(values, space=space, pieces=pieces, window=instance.window)
    at_edge = loss_value(values.new_full((), edge), space=space, pieces=pieces, window=instance.window)
    if instance.radius == 0.0:
        moved, share, threshold = torch.zeros_like(values), 0.0, -math.inf
        slope = lipschitz(space, pieces) / instance.smallest_price
    else:
        moved, share, slope, threshold = _knapsack(instance, cost)
    sums = torch.stack(
        [
            stays.sum(),
            torch.dot(moved, at_edge - stays),
            torch.maximum(stays, torch.sub(at_edge, cost, alpha=slope)).sum(),
            torch.dot(moved, cost),
        ]
    )
    empirical, gained, dual, spent = (sums / len(values)).tolist()
    return WorstCase(
        value=empirical + gained,
        dual_value=slope * instance.radius + dual,
        empirical=empirical,
        slope=slope,
        edge=edge,
        threshold=threshold,
        share=share,
        moved=moved.to(margins.dtype),
        budget_used=min(1.0, spent / instance.radius) if instance.radius > 0.0 else 0.0,
        saturated=threshold == math.inf,
        space=space,
        pieces=pieces,
        radius=instance.radius,
        window=instance.window,
        price=instance.price,
        margins=instance.margins,
    )


def _knapsack(instance: Instance, cost: Tensor) -> tuple[Tensor, float, float, float]:
    """(shares moved (N,), share of the marginal samples, slope, threshold as a margin or inf if all mass moves).

    Samples are served in increasing order of a key: x itself or, with prices, minus gain per cost. No index is scattered
    back: a sample's share follows from comparing its key with that of the marginal sample.
    """
    values, edge = instance.values, instance.window[0]
    chords = partial(chord_slope, edge=edge, space=instance.space, pieces=instance.pieces, window=instance.window)
    if instance.price is None:
        key = values
        ordered = key.sort().values
        ordered_cost = (ordered - edge).clamp_min(0.0)
    else:
        key = -chords(values) / instance.price
        # Equal ratios may have unequal costs. Sorting by cost too makes every sum independent of the input's order.
        order = cost.argsort()
        order = order[key[order].argsort(stable=True)]
        ordered, ordered_cost = key[order], cost[order]
    budget = len(values) * instance.radius
    position = int(torch.searchsorted(ordered_cost.cumsum(0), budget, right=True))
    movable = cost > 0
    if position == len(values):
        return movable.to(values), 1.0, 0.0, math.inf
    marginal = ordered[position]
    first, last = torch.searchsorted(ordered, marginal), torch.searchsorted(ordered, marginal, right=True)
    share = ((budget - ordered_cost[:first].sum()) / ordered_cost[first:last].sum()).clamp(0.0, 1.0)
    moved = torch.heaviside(marginal - key, share) * movable
    threshold = instance.margins.masked_fill(key != marginal, -math.inf).max()
    slope = chords(marginal) if instance.price is None else -marginal
    return moved, float(share), float(slope), float(threshold)


__all__ = ["WorstCase", "solve_worst_case"]
