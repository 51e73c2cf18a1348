"""Preference games on finitely many answers to a prompt, small enough to know every solution exactly.

A game is a matrix P, where P[y, y'] is the probability that answer y is preferred to answer y', so P + P^T = 1 and the
diagonal is 1/2, together with the reference distributions of the regularisers. The named games are those of the checks for
SLHF (Pasztor et al., arXiv 2512.16626) and for the Nash methods (Munos et al., arXiv 2312.00886).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PREFERENCE_TOLERANCE = 1e-9
SUM_TOLERANCE = 1e-6  # distributions may come from single precision
DEFAULT: Any = None  # set by __post_init__


def distribution(values: Any, size: int, what: str, *, positive: bool = False) -> Array:
    """``values`` as read-only float64 probabilities of shape (size,), rescaled to sum to one.

    Raises ValueError, naming ``what``, unless the shape matches, entries are finite and not negative (with ``positive``:
    above 0, as the logarithm of a reference needs) and their sum is within 1e-6 of one.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (size,):
        raise ValueError(f"{what} has shape {array.shape}; a game of {size} actions needs ({size},)")
    wrong = ~np.isfinite(array) | (array <= 0 if positive else array < 0)
    if wrong.any():
        index = int(np.argmax(wrong))
        limit = "positive" if positive else "not negative"
        raise ValueError(f"{what}[{index}] is {array[index]}; it must be finite and {limit}")
    if abs(array.sum() - 1) > SUM_TOLERANCE:
        raise ValueError(f"{what} sums to {array.sum()}; probabilities must sum to 1")
    return _frozen(array / array.sum())


@dataclass(frozen=True, eq=False)
class Game:
    """A preference game for one prompt. Arrays are copied, float64 and read-only.

    preferences: P, shape (n, n); P[y, y'] is p(y > y').
    actions: the n names of the answers; by default A, B, C, ... (a0, a1, ... beyond 26).
    leader_reference: pi_ref, shape (n,), uniform by default; also the reference of methods with a single policy.
    follower_reference: omega_ref, shape (n, n), row y for the follower that sees y; a single distribution (n,) is used for
        every y. Uniform by default.
    behaviour: mu, shape (n,), the distribution of answers in a fixed dataset; pi_ref by default. May have zeros.

    Raises ValueError if P is not a square matrix of probabilities with P + P^T = 1 (within 1e-9), naming the pair, or if
    names or distributions do not match its size; references must be positive everywhere.
    """

    preferences: Array
    actions: tuple[str, ...] = ()
    leader_reference: Array = DEFAULT
    follower_reference: Array = DEFAULT
    behaviour: Array = DEFAULT

    def __post_init__(self) -> None:
        preferences = np.array(self.preferences, dtype=np.float64)
        if preferences.ndim != 2 or preferences.shape[0] != preferences.shape[1] or not preferences.size:
            raise ValueError(f"preferences have shape {preferences.shape}; they must be a square matrix")
        size = len(preferences)
        actions = tuple(self.actions) or tuple(chr(65 + i) if size <= 26 else f"a{i}" for i in range(size))
        if len(actions) != size or len(set(actions)) != size:
            raise ValueError(f"actions {actions} must be {size} different names, one for each row of the preferences")
        _check_preferences(preferences, actions)
        uniform = np.full(size, 1 / size)
        leader = uniform if self.leader_reference is None else self.leader_reference
        leader = distribution(leader, size, "leader_reference", positive=True)
        behaviour = leader if self.behaviour is None else distribution(self.behaviour, size, "behaviour")
        follower = np.array(uniform if self.follower_reference is None else self.follower_reference, dtype=np.float64)
        if follower.ndim == 1:
            follower = np.tile(distribution(follower, size, "follower_reference", positive=True), (size, 1))
        if follower.shape != (size, size):
            raise ValueError(f"follower_reference has shape {follower.shape}; it must be ({size},) or ({size}, {size})")
        follower = np.array(
            [distribution(row, size, f"follower_reference[{i}]", positive=True) for i, row in enumerate(follower)]
        )
        object.__setattr__(self, "preferences", _frozen(preferences))
        object.__setattr__(self, "actions", actions)
        object.__setattr__(self, "leader_reference", leader)
        object.__setattr__(self, "follower_reference", _frozen(follower))
        object.__setattr__(self, "behaviour", behaviour)

    @property
    def size(self) -> int:
        """Number of actions, n."""
        return len(self.actions)


def win_rates(game: Game, opponent: Any) -> Array:
    """p(y > opponent) = E_{y' ~ opponent} P[y, y'] for every action y, shape (n,). opponent: probabilities, shape (n,)."""
    return game.preferences @ distribution(opponent, game.size, "opponent")


def win_rate(game: Game, policy: Any, opponent: Any) -> float:
    """P(policy > opponent), the probability that a sample of the first is preferred to one of the second; both shape (n,)."""
    return float(distribution(policy, game.size, "policy") @ win_rates(game, opponent))


def condorcet_winner(game: Game) -> str | None:
    """The action preferred to every other action with probability above 1/2, or None."""
    beats = _majority(game) | np.eye(game.size, dtype=bool)
    winners = np.flatnonzero(beats.all(axis=1))
    return game.actions[winners[0]] if len(winners) else None


def cycles(game: Game) -> tuple[tuple[str, ...], ...]:
    """Groups of actions that beat each other in cycles: the strongly connected components, of two or more actions, of the
    graph with an edge y -> y' where P[y, y'] > 1/2. Empty exactly if the graph has no cycle; each cycle lies in one group.
    """
    reach = reachable(_majority(game))
    mutual = reach & reach.T
    groups = {tuple(np.flatnonzero(row).tolist()) for row in mutual if row.any()}
    return tuple(tuple(game.actions[i] for i in group) for group in sorted(groups))


def reachable(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Transitive closure (n, n): whether a path of one or more edges leads from row to column (Warshall's algorithm)."""
    reach = edges.copy()
    for middle in range(len(reach)):
        reach |= reach[:, middle, None] & reach[None, middle, :]
    return reach


def cycle(probability: float = 1.0) -> Game:
    """Rock-paper-scissors with p(1>2) = p(2>3) = p(3>1) = ``probability``. Uniform play is Nash by symmetry,
    and regularised Nash at every tau. Raises ValueError outside [0, 1]."""
    p, q = probability, 1 - probability
    return Game(np.array([[0.5, p, q], [q, 0.5, p], [p, q, 0.5]]), ("1", "2", "3"))


def from_voters(shares: Sequence[float], orders: Sequence[str | Sequence[str]], actions: Sequence[str] = ()) -> Game:
    """P[y, y'] = total share of the annotator groups that rank y above y'.

    shares: one per group, summing to one. orders: each group's ranking of all actions, best first. actions: their order in
    the matrix, by default that of the first ranking. Raises ValueError if an order is not a ranking of all actions.
    """
    names = tuple(actions) or tuple(orders[0])
    weights = distribution(shares, len(orders), "shares")
    preferences = 0.5 * np.eye(len(names))
    for group, (share, order) in enumerate(zip(weights, orders, strict=True)):
        if sorted(order) != sorted(names):
            raise ValueError(f"orders[{group}] is {order}; it must rank each of {names} once")
        rank = np.array([list(order).index(name) for name in names])
        preferences += share * (rank[:, None] < rank[None, :])
    return Game(preferences, names)


def condorcet(first: float = 0.40, second: float = 0.35, third: float = 0.25) -> Game:
    """The Condorcet paradox: shares alpha_1, alpha_2, alpha_3 of annotators with the orders A>B>C, B>C>A, C>A>B.

    If every share is below 1/2, A beats B beats C beats A; Nash is (1 - 2 alpha_3, 1 - 2 alpha_1, 1 - 2 alpha_2), and an
    unregularised Stackelberg leader plays the favourite of the largest group, and its value is the share of this group.
    """
    return from_voters((first, second, third), ("ABC", "BCA", "CAB"))


def bradley_terry(rewards: Sequence[float] = (1.0, 0.0, -1.0)) -> Game:
    """P[y, y'] = sigma(r(y) - r(y')), rewards of shape (n,)."""
    values = np.asarray(rewards, dtype=np.float64)
    return Game(np.exp(-np.logaddexp(0.0, values[None, :] - values[:, None])))  # no overflow, unlike 1 / (1 + exp)


def two_actions(probability: float = 0.7) -> Game:
    """p(1>2) = q = ``probability``: SLHF, Nash and IPO agree on the log-ratio (q - 1/2) / tau."""
    q = probability
    return Game(np.array([[0.5, q], [1 - q, 0.5]]), ("1", "2"))


def offline_ipo_game(behaviour: Sequence[float] = (0.6, 0.3, 0.1)) -> Game:
    """The offline-IPO game: the cycle at 5/9, whose Nash policy is uniform, with data from ``behaviour`` mu, on which the
    optimum of offline IPO depends."""
    return Game(cycle(5 / 9).preferences, ("1", "2", "3"), behaviour=np.asarray(behaviour))


def indifferent(size: int = 3) -> Game:
    """P = 1/2 everywhere, so every regularised solution is its reference."""
    return Game(np.full((size, size), 0.5))


GAMES: dict[str, Callable[[], Game]] = {
    "rock_paper_scissors": cycle,
    "condorcet": condorcet,
    "condorcet_tied": partial(condorcet, 1 / 3, 1 / 3, 1 / 3),
    "condorcet_45_30_25": partial(condorcet, 0.45, 0.30, 0.25),
    "bradley_terry": bradley_terry,
    "bradley_terry_close": partial(bradley_terry, (0.1, 0.0, -0.1)),
    "two_actions": two_actions,
    "two_actions_51_49": partial(two_actions, 0.51),
    "offline_ipo": offline_ipo_game,
    "indifferent": indifferent,
}


def _frozen(array: Array) -> Array:
    array.setflags(write=False)
    return array


def _check_preferences(preferences: Array, actions: tuple[str, ...]) -> None:
    outside = ~((preferences >= 0) & (preferences <= 1))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"preferences[{row}, {column}] = p({actions[row]} > {actions[column]}) is {preferences[row, column]}; it must "
            "be within [0, 1]"
        )
    excess = np.abs(preferences + preferences.T - 1)
    if excess.max() > PREFERENCE_TOLERANCE:
        row, column = np.unravel_index(np.argmax(excess), excess.shape)
        if row == column:
            raise ValueError(
                f"preferences[{row}, {row}] is {preferences[row, row]}; the diagonal must be 1/2, as an answer neither "
                "wins nor loses against itself"
            )
        raise ValueError(
            f"p({actions[row]} > {actions[column]}) = {preferences[row, column]} and p({actions[column]} > {actions[row]}) "
            f"= {preferences[column, row]} do not sum to 1, at preferences[{row}, {column}]; average both orders of the "
            "oracle, for instance (P + 1 - P.T) / 2"
        )


def _majority(game: Game) -> NDArray[np.bool_]:
    return game.preferences > 0.5 + PREFERENCE_TOLERANCE


__all__ = [
    "GAMES",
    "Game",
    "bradley_terry",
    "condorcet",
    "condorcet_winner",
    "cycle",
    "cycles",
    "distribution",
    "from_voters",
    "indifferent",
    "offline_ipo_game",
    "two_actions",
    "win_rate",
    "win_rates",
]
