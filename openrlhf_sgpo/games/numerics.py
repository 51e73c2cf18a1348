"""KL-regularised choices among finitely many actions, and Newton's method, on plain arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from openrlhf_sgpo.games.tabular import Array

TIE = 1e-12  # scores this close to the largest share the reference's mass at tau = 0


class NotConverged(RuntimeError):
    """The certificate of a solver exceeds its tolerance."""


def kl(policy: Any, reference: Any) -> Any:
    """KL(policy || reference) = sum_y policy(y) log(policy(y) / reference(y)) over the last axis, with 0 log 0 = 0; infinite
    where the policy has mass and the reference has none.

    Arrays (..., n) of distributions; returns a float for (n,). Summed as p log(p / q) - p + q, whose terms are not negative,
    so a tiny divergence keeps its digits under a large tau.
    """
    p, q = np.broadcast_arrays(np.asarray(policy, np.float64), np.asarray(reference, np.float64))
    terms = np.where(p > 0, np.inf, q)
    positive_mass = (p > 0) & (q > 0)
    p, q = p[positive_mass], q[positive_mass]
    near = np.abs(p - q) < q / 2
    logarithm = np.log(p) - np.log(q)
    logarithm[near] = np.log1p((p - q)[near] / q[near])
    terms[positive_mass] = p * logarithm - (p - q)
    total = terms.sum(axis=-1)
    return float(total) if total.ndim == 0 else total


def penalty(tau: float, divergence: Any) -> Any:
    """tau * divergence with inf * 0 = 0: at tau = inf only the reference is free, at tau = 0 every policy is."""
    divergence = np.asarray(divergence, np.float64)
    return np.multiply(tau, divergence, out=np.zeros(divergence.shape), where=(divergence != 0) & (tau != 0))[()]


def tilted(reference: Any, scores: Any, tau: float) -> Array:
    """The maximiser of E_pi[scores] - tau KL(pi || reference): pi proportional to reference * exp(scores / tau).

    reference, scores: broadcast to (..., n), one distribution per row. tau: in [0, inf]; 0 is the limit, the reference
    restricted to the best scores, and inf returns the reference. Raises ValueError if tau is negative or not a number.
    """
    reference, scores = np.broadcast_arrays(np.asarray(reference, np.float64), np.asarray(scores, np.float64))
    best = scores.max(axis=-1, keepdims=True, where=reference > 0, initial=-np.inf)
    if strength(tau) == np.inf:
        return reference.copy()
    if tau == 0:
        weights = np.where(scores >= best - TIE, reference, 0.0)
    else:
        weights = reference * np.exp(np.minimum(scores - best, 0.0) / tau)
    return weights / weights.sum(axis=-1, keepdims=True)


def soft_value(reference: Any, scores: Any, tau: float) -> Any:
    """max_pi E_pi[scores] - tau KL(pi || reference) = tau log E_reference exp(scores / tau) over the last axis; the largest
    score at tau = 0, the mean score at tau = inf. Shapes and errors as ``tilted``; a float for (n,)."""
    reference, scores = np.broadcast_arrays(np.asarray(reference, np.float64), np.asarray(scores, np.float64))
    best = scores.max(axis=-1, keepdims=True, where=reference > 0, initial=-np.inf)
    mean = (reference * scores).sum(axis=-1, keepdims=True)
    if strength(tau) == 0:
        value = best
    elif tau == np.inf:
        value = mean
    elif np.ptp(scores) < tau:  # the log of a number near 1, times a large tau, would lose its digits
        value = mean + tau * np.log1p((reference * np.expm1((scores - mean) / tau)).sum(axis=-1, keepdims=True))
    else:
        weights = reference * np.exp(np.minimum(scores - best, 0.0) / tau)
        value = best + tau * np.log(weights.sum(axis=-1, keepdims=True))
    return value[..., 0][()]


def regret(policy: Array, reference: Array, scores: Array, tau: float) -> float:
    """max_pi' [E_pi'[scores] - tau KL(pi' || reference)] minus the same at ``policy``, all of shape (n,); not negative, up
    to rounding."""
    return float(soft_value(reference, scores, tau) - (policy @ scores - penalty(tau, kl(policy, reference))))


def mixture(policy: Any, reference: Any, coefficient: float) -> Array:
    """The geometric mixture policy^(1 - coefficient) * reference^coefficient, normalised, shape (n,): the policy at 0, the
    reference at 1. Raises ValueError for a coefficient outside [0, 1], and if the two share no action."""
    if not 0 <= coefficient <= 1:
        raise ValueError(f"the coefficient of a geometric mixture is {coefficient}; it must be within [0, 1]")
    policy, reference = np.asarray(policy, np.float64), np.asarray(reference, np.float64)
    weights = np.power(policy, 1 - coefficient) * np.power(reference, coefficient)  # 0^0 = 1, the identities at 0 and 1
    if not weights.sum() > 0:
        raise ValueError("the policy and the reference share no action, so their geometric mixture is empty")
    return weights / weights.sum()


def strength(tau: float) -> float:
    """Returns ``tau``. Raises ValueError unless it is at least 0; inf is allowed."""
    if not tau >= 0:
        raise ValueError(f"the regularisation strength is {tau}; it must be at least 0")
    return tau


def positive(value: float, what: str) -> None:
    """Raises ValueError, naming ``what``, unless ``value`` is above 0."""
    if not value > 0:
        raise ValueError(f"{what} is {value}; it must be above 0")


def require_converged(residual: float, tolerance: float, what: str) -> float:
    """Returns ``residual``. Raises NotConverged, naming ``what``, unless it is within ``tolerance``."""
    if not residual <= tolerance:
        raise NotConverged(f"{what} is {residual:.3g}, above {tolerance:.3g}")
    return residual


def newton(
    equation: Callable[[Array], tuple[Array, Array, float]],
    point: Array,
    tolerance: float,
    maximum_iterations: int,
    what: str,
) -> tuple[Array, float, int]:
    """Newton's method with step halving on the norm of ``equation``, which returns (value, Jacobian, residual), until the
    residual is within ``tolerance``. Returns (point, residual, iterations) or raises NotConverged."""
    value, jacobian, residual = equation(point)
    for iteration in range(maximum_iterations):
        if residual <= tolerance:
            return point, residual, iteration
        direction = -np.linalg.solve(jacobian, value)
        for length in 0.5 ** np.arange(40):
            trial = point + length * direction
            trial_value, trial_jacobian, trial_residual = equation(trial)
            shrunk = np.linalg.norm(trial_value) <= (1 - 1e-4 * length) * np.linalg.norm(value)
            if shrunk or trial_residual <= tolerance:
                break
        else:  # only rounding is left
            break
        point, value, jacobian, residual = trial, trial_value, trial_jacobian, trial_residual
    require_converged(residual, tolerance, f"{what}: the residual")
    return point, residual, maximum_iterations


__all__ = [
    "TIE",
    "NotConverged",
    "kl",
    "mixture",
    "newton",
    "penalty",
    "positive",
    "regret",
    "require_converged",
    "soft_value",
    "strength",
    "tilted",
]
