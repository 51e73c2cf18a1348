"""The losses of the Wasserstein follower and of the leader, as pure functions of tensors.

The follower works in one of two spaces, named by a string:

* ``"margin"``: the variable x is the margin xi itself, x = xi = beta * (log-ratio chosen - log-ratio rejected), in nats
  times beta. The loss is -log sigmoid(x) (``pieces=None``) or the maximum of its K tangents at knots in the window [a, b]
  (SGPO paper, arXiv 2502.18099, section 3): a, b, the midpoint, then the midpoints between these. The knots for K
  are among those for K + 1, so the worst-case value never falls as K grows (Proposition 3.2); uniform knots lack this.
* ``"probability"``: x = sigmoid(xi), a win probability. The loss is the maximum of the tangents of -log x at k / K,
  k = 1..K (SGPO paper, appendix G); its value at 0 is 1 + log K. ``pieces=None`` means K = 6.

Every loss here is convex and non-increasing, works in float32 and float64 on any device, and supports autograd. The
entries a and b of a window are floats, or tensors of shape (N,), because samples solved in different groups have different
knots. The tangents are tabulated, shape (K,), and x is looked up among the points where neighbours intersect. Only
per-sample windows need a table of shape (N, K).
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Scalar: TypeAlias = "float | Tensor"
Window: TypeAlias = "tuple[Scalar, Scalar]"

SPACES = ("margin", "probability")
PROBABILITY_PIECES = 6
RELEASED_FLOOR = 1e-6


def resolve_pieces(space: str, pieces: int | None) -> int | None:
    """Number of tangents in use: ``pieces``, or 6 if it is None in probability space.

    Raises ValueError if the space is unknown or ``pieces`` is not a whole number of at least 1.
    """
    if space not in SPACES:
        raise ValueError(f"unknown space {space!r}; valid spaces: {', '.join(SPACES)}")
    if pieces is None:
        return PROBABILITY_PIECES if space == "probability" else None
    if isinstance(pieces, bool) or not isinstance(pieces, int) or pieces < 1:
        raise ValueError(f"pieces must be a whole number of at least 1, got {pieces!r}")
    return pieces


def space_variable(margins: Tensor, space: str) -> Tensor:
    """The variable x of a space at these margins, same shape: xi itself, or sigmoid(xi)."""
    return torch.sigmoid(margins) if space == "probability" else margins


def lipschitz(space: str, pieces: int | None) -> float:
    """Lipschitz constant L of the loss on the line: 1 in margin space; K, the slope of piece 1, in probability."""
    pieces = resolve_pieces(space, pieces)
    return float(pieces) if space == "probability" and pieces is not None else 1.0


def _smooth(x: Tensor, space: str) -> Tensor:
    # logsigmoid, not softplus: torch's softplus is off by 2e-9 beyond its threshold of 20.
    return -torch.log(x) if space == "probability" else -functional.logsigmoid(x)


def _smooth_slope(x: Tensor, space: str) -> Tensor:
    return -1.0 / x if space == "probability" else -torch.sigmoid(-x)


def _like(value: Scalar, reference: Tensor) -> Scalar:
    """A tensor in the dtype and on the device of ``reference``; a float stays a float, to avoid a transfer."""
    return value.to(reference) if isinstance(value, Tensor) else value


def _knot_ends(space: str, pieces: int, window: Window | None) -> Window:
    """First and last knot."""
    if space == "probability":
        return 1.0 / pieces, 1.0
    if window is None:
        raise ValueError("tangents in margin space need the window (a, b) of their knots; pass window=")
    return window


def _nested_places(count: int) -> list[float]:
    """The first ``count`` of 0, 1, 1/2, 1/4, 3/4, 1/8, 5/8, 3/8, 7/8, ..., sorted: ends, then the van der Corput sequence."""
    places = [0.0, 1.0]
    for number in range(1, count - 1):
        digits = bin(number)[:1:-1]
        places.append(sum(int(digit) / 2 ** (power + 1) for power, digit in enumerate(digits)))
    return sorted(places[:count])


def _tangents(
    space: str, pieces: int, ends: Window, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes and offsets of the K tangents l_k(x) = offset_k + slope_k * x, and the K - 1 points where they meet.

    The last dimension is K, K and K - 1, preceded by one for the samples if each has its own ends.
    """
    first, last = (end.to(device, dtype).unsqueeze(-1) if isinstance(end, Tensor) else end for end in ends)
    if space == "probability":
        places = torch.linspace(0.0, 1.0, pieces, dtype=dtype, device=device)
    else:
        places = torch.tensor(_nested_places(pieces), dtype=dtype, device=device)
    knots = first + (last - first) * places
    slopes = _smooth_slope(knots, space)
    offsets = _smooth(knots, space) - slopes * knots
    meet = offsets.diff() / -slopes.diff()
    # Neighbours meet between their knots, even where rounding says otherwise or makes them equal (0 / 0).
    return slopes, offsets, torch.fmin(torch.fmax(meet, knots[..., :-1]), knots[..., 1:])


_cached_tangents = functools.lru_cache(maxsize=64)(_tangents)


def _active_tangents(values: Tensor, space: str, pieces: int, window: Window | None) -> tuple[Tensor, Tensor, Tensor]:
    """Index, slope and offset of the tangent that is largest at each x."""
    ends = _knot_ends(space, pieces, window)
    tabulate = _tangents if any(isinstance(end, Tensor) for end in ends) else _cached_tangents
    slopes, offsets, meet = tabulate(space, pieces, ends, values.dtype, values.device)
    if meet.dim() == 1:
        index = torch.bucketize(values, meet)
        return index, slopes.take(index), offsets.take(index)
    column = torch.searchsorted(meet, values.detach().unsqueeze(-1))
    return column.squeeze(-1), slopes.gather(-1, column).squeeze(-1), offsets.gather(-1, column).squeeze(-1)


def active_piece(values: Tensor, *, space: str, pieces: int, window: Window | None = None) -> Tensor:
    """Index 0..K-1 of the tangent that is largest at each x, int64, same shape."""
    return _active_tangents(values, space, pieces, window)[0]


def _loss_and_slope(values: Tensor, space: str, pieces: int | None, window: Window | None) -> tuple[Tensor, Tensor]:
    if pieces is None:
        return _smooth(values, space), _smooth_slope(values, space)
    _, slope, offset = _active_tangents(values, space, pieces, window)
    return torch.addcmul(offset, slope, values), slope


def loss_value(values: Tensor, *, space: str, pieces: int | None, window: Window | None = None) -> Tensor:
    """The loss l(x) at the variable x of the space, same shape as ``values``; differentiable in ``values``.

    ``window`` matters only to tangents in margin space, whose knots lie in it. Raises ValueError as
    :func:`resolve_pieces` does, and if these tangents have no window.
    """
    pieces = resolve_pieces(space, pieces)
    return _smooth(values, space) if pieces is None else _loss_and_slope(values, space, pieces, window)[0]


def loss_slope(values: Tensor, *, space: str, pieces: int | None, window: Window | None = None) -> Tensor:
    """The derivative l'(x) <= 0 in the variable of the space, same shape; at a kink, of one of the two pieces."""
    return _loss_and_slope(values, space, resolve_pieces(space, pieces), window)[1]


def chord_slope(values: Tensor, edge: float, *, space: str, pieces: int | None, window: Window | None = None) -> Tensor:
    """Descent (l(edge) - l(x)) / (x - edge) >= 0 of the chord from the edge to x >= edge, same shape as ``values``.

    At x = edge it is the limit -l'(edge). Accurate to rounding even close to the edge, where the difference quotient itself
    would lose all its digits.
    """
    pieces = resolve_pieces(space, pieces)
    at_edge, steepest = _loss_and_slope(values.new_full((), edge), space, pieces, window)
    losses, flattest = _loss_and_slope(values, space, pieces, window)
    cost, gain = values - edge, at_edge - losses
    if pieces is None:
        # log (1 + exp(-edge)) / (1 + exp(-x)) without the cancellation; far from the edge nothing cancels.
        gain = torch.where(cost < 1, -torch.log1p(-steepest * torch.expm1(-cost)), gain)
    # A chord of a convex function is no flatter than the tangent at one end and no steeper than at the other. On a
    # common linear piece the two agree, which removes all rounding; at the edge they replace 0 / 0.
    return torch.fmin(torch.fmax(gain / cost, -flattest), -steepest)


def piece_tangents(space: str, pieces: int, window: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Slopes and offsets of all tangents l_k(x) = offset_k + slope_k * x, two float64 tensors of shape (K,)."""
    return _tangents(space, pieces, _knot_ends(space, pieces, window), torch.float64, torch.device("cpu"))[:2]


def danskin_loss(
    margins: Tensor,
    slope: Scalar,
    edge: Scalar,
    *,
    space: str,
    pieces: int | None,
    window: Window | None,
    price: Tensor | None = None,
    threshold: Scalar | None = None,
    share: Scalar = 1.0,
) -> Tensor:
    """The follower's dual loss phi of each margin, in the shape of ``margins``; differentiable in ``margins``.

    With x the variable of the space,

        phi(x) = max( l(x), l(edge) - slope * price * (x - edge) ).

    By Danskin's theorem its gradient at fixed ``slope`` and ``edge`` is that of the robust objective
    V = slope * radius + mean_i phi(x_i) (the dual of the SGPO paper's equation 9, arXiv 2502.18099). Left of the edge, where
    training may push a margin, phi is l: nothing is moved from there. Where l and the chord meet, phi has a kink, and the
    follower's solution decides which gradient is that of V: at the edge l's, because its sample stays; at the ``threshold``,
    whose samples are split, ``share`` times the chord's plus (1 - ``share``) times l's.

    ``slope`` (loss per unit of x and of price), ``edge`` and the entries of ``window`` (units of x), ``threshold`` (a margin;
    None: no sample is split) and ``share`` are floats, or tensors in the shape of ``margins`` if samples come from
    different groups. ``price`` multiplies the cost of moving each sample (None: 1). Raises ValueError as :func:`loss_value`
    does.
    """
    values = space_variable(margins, space)
    slope, edge = _like(slope, margins), _like(edge, margins)
    corner = edge if isinstance(edge, Tensor) else margins.new_full((), edge)
    if price is not None:
        slope = slope * price.to(margins)
    stays = loss_value(values, space=space, pieces=pieces, window=window)
    chord = loss_value(corner, space=space, pieces=pieces, window=window) - slope * (values - edge)
    loss = torch.where((chord > stays) & (values > edge), chord, stays)
    if threshold is None:
        return loss
    share = _like(share, margins)
    return torch.where(margins == _like(threshold, margins), stays + share * (chord - stays), loss)


def best_case_loss(margins: Tensor, level: Scalar, *, space: str) -> Tensor:
    """Logistic loss that continues as its own tangent below a level, in the shape of ``margins``; differentiable in them.

    With x the variable of the space, c the level and l(x) = -log sigmoid(x) or -log x,

        psi(x) = l(x)  for x >= c,        l(c) + l'(c) * (x - c)  for x < c.

    This is the dual loss of the best case (``best.py``; not in the SGPO paper). In margin space its gradient is that of the
    logistic loss, but no larger than at the level; in probability space it vanishes like sigmoid(xi) / c for wrong pairs.

    ``level`` (units of x, finite, above 0 in probability space) is a float, or a tensor in the shape of ``margins`` if
    samples come from different groups. Raises ValueError if the space is unknown.
    """
    resolve_pieces(space, None)
    stays = -functional.logsigmoid(margins)
    corner = torch.as_tensor(level, dtype=torch.float64, device=margins.device)
    if space == "probability":
        # The tangent is -log c + 1 - x / c, and x / c = exp(log x - log c) is safe where the sigmoid underflows. The clamp
        # keeps an overflow above the level, where the tangent is unused, from turning the gradient into 0 * inf.
        at_level = -torch.log(corner).to(margins)
        log_ratio = at_level - stays
        return torch.where(log_ratio < 0, at_level + (1.0 - torch.exp(log_ratio.clamp(max=0.0))), stays)
    # The tangent's value at 0, l(c) - l'(c) * c, is the entropy of sigmoid(c): a sum of terms that do not cancel.
    up, down = torch.sigmoid(corner), torch.sigmoid(-corner)
    at_zero = -up * functional.logsigmoid(corner) - down * functional.logsigmoid(-corner)
    return torch.where(margins < corner, at_zero.to(margins) - down.to(margins) * margins, stays)


def transport_loss(margins: Tensor, s: Tensor, displacement: Tensor) -> Tensor:
    """Logistic loss of the follower's atoms, which move with the policy: sum_k s_ik * log(1 + exp(-(xi_i - d_ik))).

    This is the SGPO paper's section 3.3 (arXiv 2502.18099) with the displacements d_ik = q_ik / s_ik held fixed.
    ``margins`` has shape (N,), ``s`` (weights) and ``displacement`` (units of the margin) have shape (N, K); returns
    shape (N,). An entry with s_ik = 0 does not count, whatever its displacement (0 / 0 included).
    """
    present, weights, shift = _atoms(margins, s, displacement)
    terms = -functional.logsigmoid(margins.unsqueeze(-1) - shift)
    return torch.where(present, weights * terms, 0.0).sum(dim=-1)


def released_loss(margins: Tensor, s: Tensor, displacement: Tensor) -> Tensor:
    """Loss of the authors' released code: -sum_k s_ik * log(max(sigmoid(xi_i) - d_ik, 1e-6)).

    The displacement, in units of probability, is subtracted from the current win probability; a clamped term is
    constant and has no gradient. Shapes as in :func:`transport_loss`; an entry with s_ik = 0 does not count.
    """
    present, weights, shift = _atoms(margins, s, displacement)
    terms = -torch.log((torch.sigmoid(margins).unsqueeze(-1) - shift).clamp(min=RELEASED_FLOOR))
    return torch.where(present, weights * terms, 0.0).sum(dim=-1)


def _atoms(margins: Tensor, s: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask of existing atoms, their weights, and displacements with 0 where there is no atom (to avoid 0 * inf)."""
    weights = s.to(margins)
    present = weights > 0
    return present, weights, torch.where(present, displacement.to(margins), 0.0)


__all__ = [
    "PROBABILITY_PIECES",
    "SPACES",
    "Scalar",
    "Window",
    "active_piece",
    "best_case_loss",
    "chord_slope",
    "danskin_loss",
    "lipschitz",
    "loss_slope",
    "loss_value",
    "piece_tangents",
    "released_loss",
    "resolve_pieces",
    "space_variable",
    "transport_loss",
]
