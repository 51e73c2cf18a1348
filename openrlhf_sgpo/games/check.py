"""A check: gradient descent on an algorithm's real loss, on a small game, beside the exact solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from openrlhf_sgpo.algorithms import Algorithm
from openrlhf_sgpo.games.drive import drive, start
from openrlhf_sgpo.games.solutions import Solution
from openrlhf_sgpo.games.tabular import GAMES, Array, Game

SKEWED = (0.1, 0.2, 0.7)  # where paths start, far from all solutions
SETTLED = 1e-8  # a step that moves no logit by more ends a path, or a round: far below all tolerances


@dataclass(frozen=True)
class Check:
    """An algorithm on a game. solution: name of the target. steps: of a round, at most. average: compare the mean over rounds,
    not the last policy."""

    title: str
    algorithm: Algorithm
    solution: str
    target: Callable[[Game], Solution]
    learning_rate: float
    game: str = "condorcet"
    steps: int = 4000
    rounds: int = 1
    average: bool = False
    begin: tuple[float, ...] = SKEWED
    tolerance: float = 1e-4


@dataclass(frozen=True)
class CheckResult:
    check: Check
    target: Array
    reached: Array
    path: Array

    @property
    def error(self) -> float:
        return float(abs(self.reached - self.target).max())

    @property
    def passed(self) -> bool:
        return self.error <= self.check.tolerance


def play(check: Check, behind: bool = False) -> CheckResult:
    """Runs the algorithm from the check's initial policy and compares the policy it reaches with the target. behind: see
    ``drive``."""
    game = GAMES[check.game]()
    driven = drive(
        game,
        check.algorithm,
        steps=check.steps,
        learning_rate=check.learning_rate,
        rounds=check.rounds,
        policies=start(game, check.begin),
        settled=SETTLED,
        behind=behind,
    )
    # Of a pair of extragradient steps, the first ends nowhere.
    path = driven.rounds if check.rounds > 1 else driven.policies[:: 2 if check.algorithm.extragradient else 1]
    reached = path[1:].mean(0) if check.average else path[-1]
    return CheckResult(check, check.target(game).policy, reached, path)
