"""Solutions that are found by direct search: SGPO's in the worst and in the best case. Notation as in ``solutions``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from openrlhf_sgpo.games.numerics import positive, require_converged, tilted
from openrlhf_sgpo.games.solutions import LOOSE, Solution, bradley_terry_rewards
from openrlhf_sgpo.games.tabular import Array, Game


def sgpo(game: Game, beta: float, radius: float, edge: float) -> Solution:
    """argmin_pi of SGPO's worst-case value (arXiv 2502.18099) on soft labels, by direct search from the solution of ``dpo``:

        V(x) = min_{lam >= 0}  lam * radius + sum_i w_i max( l(x_i), l(a) - lam (x_i - a) ),      l(x) = -log sigmoid(x),

    with the margins x = r(y) - r(y') of all pairs of two samples from mu, r = beta log(pi / ref), weights w = 2 mu mu' P, which
    sum to one, and ``edge`` a. Margins left of the edge stay. V is convex and piecewise linear in lam, so its minimum is at 0
    or where two pieces meet. residual: by how much a second search, starting where the first ended, lowers V. Raises
    ValueError unless beta > 0, and NotConverged if the residual is above 1e-9.
    """
    weights = 2 * np.outer(game.behaviour, game.behaviour) * game.preferences
    at_edge = np.logaddexp(0, -edge)

    def value(margins: Array) -> float:
        distance = np.maximum(margins - edge, 0)
        losses = np.logaddexp(0, -margins)
        chords = np.divide(at_edge - losses, distance, out=np.zeros_like(losses), where=distance > 0)
        slopes = np.append(chords.ravel(), 0.0)[:, None, None]
        worst = np.maximum(losses, at_edge - slopes * distance)
        return float((slopes.ravel() * radius + (weights * worst).sum((1, 2))).min())

    return _searched(game, beta, value, "sgpo")


def sgpo_best(game: Game, beta: float, radius: float) -> Solution:
    """argmin_pi of the best-case value on soft labels, the same with inf in place of sup and no edge, by direct search:

        V(x) = max_{0 <= lam <= 1}  -lam * radius + sum_i w_i psi(x_i),      psi(x) = min_{z >= x} l(z) + lam (z - x),

    where psi(x) is l(x) if l is no steeper than lam at x, and -lam log(lam) - (1 - lam) log(1 - lam) - lam x otherwise. What
    is maximised is concave in lam. residual and errors: as for ``sgpo``.
    """
    from scipy.optimize import minimize_scalar

    weights = 2 * np.outer(game.behaviour, game.behaviour) * game.preferences

    def value(margins: Array) -> float:
        losses, steepness = np.logaddexp(0, -margins), np.exp(-np.logaddexp(0, margins))

        def saved(lam: float) -> float:
            line = -lam * np.log(lam) - (1 - lam) * np.log1p(-lam) - lam * margins
            return float(lam * radius - (weights * np.where(steepness <= lam, losses, line)).sum())

        return -float(minimize_scalar(saved, bounds=(1e-12, 1 - 1e-12), method="bounded", options={"xatol": 1e-12}).fun)

    return _searched(game, beta, value, "sgpo_best")


def _searched(game: Game, beta: float, value: Callable[[Array], float], what: str) -> Solution:
    """argmin_pi of a value of the margins, (n, n), by two searches without gradients, the second from the end of the first."""
    from scipy.optimize import minimize

    positive(beta, f"the beta of {what}")

    def of_rewards(free: Array) -> float:
        rewards = np.append(free, -free.sum())
        return value(rewards[:, None] - rewards[None, :])

    options = {"xatol": 1e-10, "fatol": 1e-15, "maxiter": 10_000}
    first = minimize(of_rewards, bradley_terry_rewards(game)[0][:-1], method="Nelder-Mead", options=options)
    second = minimize(of_rewards, first.x, method="Nelder-Mead", options=options)
    policy = tilted(game.leader_reference, np.append(second.x, -second.x.sum()), beta)
    residual = require_converged(float(first.fun - second.fun), LOOSE, f"{what}: the gain of a second search")
    return Solution(policy, residual, int(first.nit + second.nit))
