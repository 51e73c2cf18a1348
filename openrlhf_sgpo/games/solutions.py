"""Exact solutions of preference games, each with its equation, source and certificate.

Throughout, ref is ``game.leader_reference``, p(y > pi) = E_{y' ~ pi} P[y, y'], and KL-regularised choices are tilted
references: argmax_pi E_pi[score] - tau KL(pi || ref) is pi(y) proportional to ref(y) exp(score(y) / tau).

Solutions by method: SLHF ``stackelberg``; online IPO, INPO and self-play policy gradients ``regularised_nash``;
Nash-MD-PG and IPO-MD ``nash_md``; the average iterate of SPPO ``nash``; offline IPO ``offline_ipo``; DPO ``dpo``; online DPO
and XPO on soft labels ``online_dpo`` and ``xpo``; RLOO with rewards r ``tilted(ref, r, beta)``, and RLOO whose rewards are
win rates against its own samples ``regularised_nash``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from openrlhf_sgpo.games.numerics import (
    NotConverged,
    kl,
    mixture,
    newton,
    penalty,
    positive,
    regret,
    require_converged,
    soft_value,
    tilted,
)
from openrlhf_sgpo.games.tabular import Array, Game, distribution, reachable, win_rates

TOLERANCE = 1e-12
LOOSE = 1e-9  # for certificates of solutions that are not iterated to TOLERANCE


@dataclass(frozen=True, eq=False)
class Solution:
    """A policy and its certificate. policy: shape (n,). residual: by how much the policy misses the conditions that define
    the solution, in a norm or gap that each solver states. iterations: of the solver, 0 for a closed form."""

    policy: Array
    residual: float
    iterations: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class StackelbergSolution(Solution):
    """policy: of the leader. follower: omega(y' | y), shape (n, n), row y for the follower that sees y. scores: what the
    leader maximises in expectation, shape (n,). value: the objective f of ``stackelberg_value`` at this pair."""

    follower: Array
    scores: Array
    value: float


def best_response(game: Game, opponent: Any, tau: float = 0.0) -> Solution:
    """argmax_pi P(pi > opponent) - tau KL(pi || ref), shape (n,); at tau = 0 the reference restricted to the best answers.

    residual: what the best policy would gain over it, in units of preference. Raises ValueError for a wrong opponent or tau.
    """
    scores = win_rates(game, opponent)
    policy = tilted(game.leader_reference, scores, tau)
    return Solution(policy, regret(policy, game.leader_reference, scores, tau))


def exploitability(game: Game, policy: Any, tau: float = 0.0) -> float:
    """max_pi' [P(pi' > pi) - tau KL(pi' || ref)] - [1/2 - tau KL(pi || ref)]: 0 at the (regularised) Nash, positive elsewhere.

    At tau = 0 this is max_y p(y > pi) - 1/2. As the game is symmetric, it is half the duality gap of the pair (pi, pi).
    It grows with the square of the distance to a regularised Nash policy, so 1e-16 certifies about eight digits of it.
    """
    return regret(distribution(policy, game.size, "policy"), game.leader_reference, win_rates(game, policy), tau)


def stackelberg_value(game: Game, leader: Any, follower: Any, tau_leader: float, tau_follower: float) -> float:
    """f(pi, omega) = E_{y ~ pi}[E_{y' ~ omega(.|y)} P[y, y'] + tau_F KL(omega(.|y) || omega_ref(.|y))]
    - tau_L KL(pi || pi_ref), which the leader maximises and the follower minimises (arXiv 2512.16626).

    leader: (n,); follower: (n, n).
    """
    leader = distribution(leader, game.size, "leader")
    rows = _draft_scores(game, np.asarray(follower, np.float64), tau_follower, credit=True)
    return float(leader @ rows) - penalty(tau_leader, kl(leader, game.leader_reference))


def stackelberg(
    game: Game, tau_leader: float, tau_follower: float, *, follower_kl_credit: bool = True
) -> StackelbergSolution:
    """The equilibrium of SLHF in closed form (arXiv 2512.16626, the game of ``stackelberg_value``):

        omega(y' | y) proportional to omega_ref(y' | y) exp(-P[y, y'] / tau_F),
        pi(y)         proportional to pi_ref(y) exp(score(y) / tau_L).

    With ``follower_kl_credit`` the score is V(y) = E_omega P[y, .] + tau_F KL(omega(.|y) || omega_ref(.|y)) = -tau_F log
    E_omega_ref exp(-P[y, .] / tau_F), which gives the saddle point of f. Without it, the score is E_omega P[y, .] alone: the
    fixed point of the published trainer, whose leader gets no credit for a follower that has to leave its reference.

    tau_leader, tau_follower: in [0, inf]. At 0 the limit is returned: equally good answers share the reference's mass, while
    a follower or leader without regularisation could split it in any way. residual: what the leader could gain against this
    follower plus what the follower could gain against this leader, each in its own objective; with credit this is the
    duality gap of f. Raises ValueError for a negative tau.
    """
    preferences, references = game.preferences, game.follower_reference
    follower = tilted(references, -preferences, tau_follower)
    scores = _draft_scores(game, follower, tau_follower, credit=follower_kl_credit)
    policy = tilted(game.leader_reference, scores, tau_leader)
    reached = _draft_scores(game, follower, tau_follower, credit=True)
    follower_regret = float(policy @ (reached + soft_value(references, -preferences, tau_follower)))
    residual = regret(policy, game.leader_reference, scores, tau_leader) + follower_regret
    value = stackelberg_value(game, policy, follower, tau_leader, tau_follower)
    return StackelbergSolution(
        policy,
        require_converged(residual, LOOSE, "stackelberg: the gap"),
        follower=follower,
        scores=scores,
        value=value,
    )


def nash(game: Game) -> Solution:
    """A Nash policy without regularisation, max_pi min_y' P(pi > y'), as a linear program (SciPy's HiGHS).

    If there are several, one vertex of their set; the value is always 1/2. residual: ``exploitability``. Raises NotConverged
    if it is above 1e-9.
    """
    from scipy.optimize import linprog

    size = game.size
    worst_case = np.hstack([-game.preferences.T, np.ones((size, 1))])  # value <= sum_y pi(y) P[y, y'] for every y'
    total = np.append(np.ones(size), 0.0)[None, :]
    bounds = [(0, 1)] * size + [(None, None)]
    result = linprog(-np.eye(size + 1)[-1], worst_case, np.zeros(size), total, [1.0], bounds, method="highs")
    if result.status != 0:
        raise NotConverged(f"nash: the linear program ended with: {result.message}")
    policy = np.maximum(result.x[:size], 0.0)
    policy /= policy.sum()
    residual = exploitability(game, policy)
    return Solution(policy, require_converged(residual, LOOSE, "nash: the exploitability"), int(result.nit))


def regularised_nash(
    game: Game, tau: float, *, tolerance: float = TOLERANCE, maximum_iterations: int = 1000
) -> Solution:
    """The unique Nash policy of P(pi > pi') - tau KL(pi || ref) + tau KL(pi' || ref), Munos et al. (arXiv 2312.00886):

        pi(y) proportional to ref(y) exp(p(y > pi) / tau).

    Newton's method on z = (P - 1/2) softmax(log ref + z) / tau with step halving. It converges from any start: the Jacobian is
    I - A D / tau with A antisymmetric and D a covariance, and A D has only imaginary eigenvalues. residual: the largest
    change of a probability under the equation above. Raises NotConverged if it stays above ``tolerance`` and ValueError
    unless tau is in (0, inf].
    """
    positive(tau, "the tau of regularised_nash (without regularisation use nash)")
    reference, advantage = game.leader_reference, (game.preferences - 0.5) / tau

    def equation(offset: Array) -> tuple[Array, Array, float]:
        policy = tilted(reference, offset, 1.0)
        image = advantage @ policy
        jacobian = np.eye(game.size) - advantage @ _covariance(policy)
        return offset - image, jacobian, float(np.abs(policy - tilted(reference, image, 1.0)).max())

    offset, residual, iterations = newton(
        equation, np.zeros(game.size), tolerance, maximum_iterations, "regularised_nash"
    )
    return Solution(tilted(reference, offset, 1.0), residual, iterations)


def nash_md(game: Game, tau: float, coefficient: float, *, tolerance: float = TOLERANCE) -> Solution:
    """The fixed point of Nash-MD-PG (arXiv 2312.00886) and IPO-MD (arXiv 2403.08635) at mixture ``coefficient`` b:

        pi(y) proportional to ref(y) exp(p(y > m) / tau),  m = mixture(pi, ref, b).

    Substituting the first equation into the second shows that m is the regularised Nash policy at tau / (1 - b), so this takes
    one Nash policy and one best response: at b = 0 the regularised Nash policy, at b = 1 the best response to ref. residual:
    the largest change of a probability under the equation. Raises ValueError outside b in [0, 1], tau > 0.
    """
    positive(tau, "the tau of nash_md")
    if not 0 <= coefficient <= 1:
        raise ValueError(f"the mixture coefficient of nash_md is {coefficient}; it must be within [0, 1]")
    opponent = regularised_nash(game, tau / (1 - coefficient) if coefficient < 1 else np.inf, tolerance=tolerance)
    policy = tilted(game.leader_reference, win_rates(game, opponent.policy), tau)
    image = tilted(game.leader_reference, win_rates(game, mixture(policy, game.leader_reference, coefficient)), tau)
    residual = float(np.abs(policy - image).max())
    return Solution(policy, require_converged(residual, LOOSE, "nash_md: the residual"), opponent.iterations)


def mirror_step(game: Game, policy: Any, step: float, tau: float = 0.0, opponent: Any = None) -> Array:
    """One exact update, pi'(y) proportional to pi(y)^(1 - step tau) ref(y)^(step tau) exp(step p(y > opponent)), shape (n,).

    opponent: pi itself by default. With tau = 0 this is SPPO's ideal round (arXiv 2405.00675) at eta = step; INPO's (arXiv
    2407.00617) with step = 1 / eta; and Nash-MD's (arXiv 2312.00886) with opponent = mixture(pi, ref, step tau), eta = step.
    Raises ValueError unless step > 0 and step tau is within [0, 1].
    """
    if not step > 0 or not 0 <= step * tau <= 1:
        raise ValueError(f"mirror_step has step {step} and tau {tau}; it needs step > 0 and step * tau within [0, 1]")
    base = mixture(distribution(policy, game.size, "policy"), game.leader_reference, step * tau)
    return tilted(base, win_rates(game, policy if opponent is None else opponent), 1 / step)


def offline_ipo(game: Game, tau: float, behaviour: Any = None) -> Solution:
    """Population optimum of IPO against ``behaviour`` mu, by default ``game.behaviour`` (arXiv 2310.12036):

        argmax_pi P(pi > mu) - tau KL(pi || ref), which is pi(y) proportional to ref(y) exp(p(y > mu) / tau).

    On pairs of two samples from mu it minimises E_{y, y' ~ mu} [h(y, y') - (P[y, y'] - 1/2) / tau]^2, with h the difference of
    log(pi / ref). This loss does not depend on answers with mu(y) = 0; for them the formula is returned. residual: as in
    ``best_response``. Raises ValueError unless tau > 0, by which the loss divides.
    """
    positive(tau, "the tau of offline_ipo")
    return best_response(game, game.behaviour if behaviour is None else behaviour, tau)


def bradley_terry_rewards(
    game: Game, pair_weights: Any = None, *, tolerance: float = TOLERANCE, maximum_iterations: int = 1000
) -> tuple[Array, float, int]:
    """Rewards r of mean zero that maximise sum_{y, y'} w[y, y'] P[y, y'] log sigma(r(y) - r(y')) (Bradley and Terry, 1952).

    pair_weights: w, how often each pair is compared, symmetric and not negative, shape (n, n); by default mu mu^T with mu =
    ``game.behaviour``, which balances the pairs if mu is uniform. The diagonal has no effect.

    Returns (r, residual, iterations), r of shape (n,), by Newton's method. residual: the largest gradient sum_y' w (P -
    sigma(r(y) - r(y'))) with weights that sum to 1. Raises ValueError for wrong weights, and if the maximum is at infinity or
    not unique: every action must lead to every other action by wins (Ford, 1957).
    """
    weights = np.outer(game.behaviour, game.behaviour) if pair_weights is None else np.array(pair_weights, np.float64)
    if weights.shape != game.preferences.shape or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"pair_weights must be {game.preferences.shape} finite numbers of at least 0")
    if not np.allclose(weights, weights.T, rtol=1e-9, atol=0.0):
        raise ValueError("pair_weights must be symmetric: a comparison of y and y' is also one of y' and y")
    weights = weights * ~np.eye(game.size, dtype=bool)  # a large diagonal would hide the residual of the pairs
    if not (reachable((weights > 0) & (game.preferences > 0)) | np.eye(game.size, dtype=bool)).all():
        raise ValueError(
            "the rewards of maximum likelihood are not finite and unique: among the compared pairs some action never leads "
            "to another by wins; compare more pairs, or keep P away from 0 and 1"
        )
    weights = weights / max(weights.sum(), np.finfo(float).tiny)

    def equation(rewards: Array) -> tuple[Array, Array, float]:
        win = np.exp(-np.logaddexp(0.0, rewards[None, :] - rewards[:, None]))
        missed = (weights * (win - game.preferences)).sum(axis=1) + rewards.mean()
        curvature = weights * win * win.T
        jacobian = np.diag(curvature.sum(axis=1)) - curvature + 1 / game.size
        return missed, jacobian, float(np.abs(missed).max())

    return newton(equation, np.zeros(game.size), tolerance, maximum_iterations, "bradley_terry_rewards")


def dpo(game: Game, beta: float, pair_weights: Any = None) -> Solution:
    """Population optimum of DPO (arXiv 2305.18290) on soft labels: pi(y) proportional to ref(y) exp(r(y) / beta), with r the
    ``bradley_terry_rewards`` of the compared pairs; also the optimum of RLHF with the reward model fitted to them.

    residual: the largest gradient of the loss with respect to its logits. Raises ValueError unless beta > 0, and as
    ``bradley_terry_rewards`` does.
    """
    positive(beta, "the beta of dpo")
    rewards, residual, iterations = bradley_terry_rewards(game, pair_weights)
    return Solution(tilted(game.leader_reference, rewards, beta), residual, iterations)


def online_dpo(game: Game, beta: float) -> Solution:
    """The fixed point of online DPO (arXiv 2402.04792) on soft labels: DPO's optimum on comparisons of its own answers,

        pi(y) proportional to ref(y) exp(r(y) / beta),  E_{y' ~ pi}[P[y, y'] - sigma(r(y) - r(y'))] = 0 for all y,

    by Newton's method. If P is Bradley-Terry's this is RLHF's optimum, whatever is compared. residual: the largest entry of the
    equation. Raises ValueError unless beta > 0, and as ``bradley_terry_rewards`` does.
    """
    positive(beta, "the beta of online_dpo")

    def equation(rewards: Array) -> tuple[Array, Array, float]:
        policy, missed, slopes = _missed_wins(game, rewards, beta)
        value = missed @ policy
        jacobian = missed @ _covariance(policy) / beta + slopes * policy - np.diag(slopes @ policy)
        return value - rewards.mean(), jacobian - 1 / game.size, float(np.abs(value).max())

    rewards, residual, iterations = newton(equation, bradley_terry_rewards(game)[0], TOLERANCE, 1000, "online_dpo")
    return Solution(tilted(game.leader_reference, rewards, beta), residual, iterations)


def xpo(game: Game, beta: float, alpha: float) -> Solution:
    """The fixed point of XPO (arXiv 2405.21046) on soft labels, which compares answers of the policy with those of ref, and
    adds alpha E_ref[log pi] to the loss:

        sum_y' [pi(y) ref(y') + ref(y) pi(y')] (P[y, y'] - sigma(r(y) - r(y'))) = (alpha / beta) (ref(y) - pi(y)) for all y,

    with pi(y) proportional to ref(y) exp(r(y) / beta), by Newton's method. residual: the largest difference of the two sides.
    Raises ValueError unless beta > 0, and as ``bradley_terry_rewards`` does; NotConverged if alpha is too large for a solution.
    """
    positive(beta, "the beta of xpo")
    reference, bonus = game.leader_reference, alpha / beta

    def equation(rewards: Array) -> tuple[Array, Array, float]:
        policy, missed, slopes = _missed_wins(game, rewards, beta)
        weights = np.outer(policy, reference) + np.outer(reference, policy)
        value = (weights * missed).sum(1) - bonus * (reference - policy)
        by_policy = np.diag(missed @ reference + bonus) + reference[:, None] * missed
        jacobian = by_policy @ _covariance(policy) / beta + weights * slopes - np.diag((weights * slopes).sum(1))
        return value - rewards.mean(), jacobian - 1 / game.size, float(np.abs(value).max())

    rewards, residual, iterations = newton(equation, bradley_terry_rewards(game)[0], TOLERANCE, 1000, "xpo")
    return Solution(tilted(reference, rewards, beta), residual, iterations)


def _missed_wins(game: Game, rewards: Array, beta: float) -> tuple[Array, Array, Array]:
    """(pi proportional to ref exp(r / beta), P[y, y'] - sigma(r(y) - r(y')), sigma'(r(y) - r(y')))"""
    win = np.exp(-np.logaddexp(0.0, rewards[None, :] - rewards[:, None]))
    return tilted(game.leader_reference, rewards, beta), game.preferences - win, win * win.T


def _covariance(policy: Array) -> Array:
    """Of the indicators of the answers, (n, n): the derivative of a softmax."""
    return np.diag(policy) - np.outer(policy, policy)


def _draft_scores(game: Game, follower: Array, tau: float, *, credit: bool) -> Array:
    """E_{y' ~ omega(.|y)} P[y, y'], plus tau KL(omega(.|y) || omega_ref(.|y)) with ``credit``, for each draft y, (n,)."""
    scores = (follower * game.preferences).sum(axis=1)
    return scores + penalty(tau, kl(follower, game.follower_reference)) if credit else scores


__all__ = [
    "Solution",
    "StackelbergSolution",
    "best_response",
    "bradley_terry_rewards",
    "dpo",
    "exploitability",
    "mirror_step",
    "nash",
    "nash_md",
    "offline_ipo",
    "online_dpo",
    "regularised_nash",
    "stackelberg",
    "stackelberg_value",
    "xpo",
]
