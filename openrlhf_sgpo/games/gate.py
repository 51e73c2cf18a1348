"""The gate: gradient descent on every algorithm's real loss must reach its exact solution on a small game."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations
from math import log
from pathlib import Path

import numpy as np

from openrlhf_sgpo import extras
from openrlhf_sgpo.algorithms.base import NoSettings
from openrlhf_sgpo.algorithms.cdpo import CDPO, CDPOSettings
from openrlhf_sgpo.algorithms.comal import COMAL, COMALSettings
from openrlhf_sgpo.algorithms.dpo import DPO
from openrlhf_sgpo.algorithms.dr_dpo import DrDPO, DrDPOSettings
from openrlhf_sgpo.algorithms.egpo import EGPO
from openrlhf_sgpo.algorithms.inpo import INPO, INPOSettings
from openrlhf_sgpo.algorithms.ipo import IPO, IPOSettings
from openrlhf_sgpo.algorithms.ipo_md import IPOMD, IPOMDSettings
from openrlhf_sgpo.algorithms.iter_dpo import IterDPO
from openrlhf_sgpo.algorithms.kl_dpo import KLDPO, KLDPOSettings
from openrlhf_sgpo.algorithms.nash_md import NashMD, NashMDSettings
from openrlhf_sgpo.algorithms.online_dpo import OnlineDPO, OnlineDPOSettings
from openrlhf_sgpo.algorithms.online_ipo import OnlineIPO
from openrlhf_sgpo.algorithms.rdpo import RDPO, RDPOSettings
from openrlhf_sgpo.algorithms.rloo import RLOO, RLOOSettings
from openrlhf_sgpo.algorithms.ropo import ROPO, ROPOSettings
from openrlhf_sgpo.algorithms.sgpo import SGPO, SGPOSettings
from openrlhf_sgpo.algorithms.sgpo_best import SGPOBest, SGPOBestSettings
from openrlhf_sgpo.algorithms.slhf import SLHF, SLHFSettings
from openrlhf_sgpo.algorithms.spa import SPA, SPASettings
from openrlhf_sgpo.algorithms.sppo import SPPO, SPPOSettings
from openrlhf_sgpo.algorithms.sym_po import SymPO, SymPOSettings
from openrlhf_sgpo.algorithms.xpo import XPO, XPOSettings
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.games import drive as driver
from openrlhf_sgpo.games import searched_solutions, solutions
from openrlhf_sgpo.games.check import SKEWED, Check, CheckResult, play
from openrlhf_sgpo.games.last_iterates import draw_last_iterates
from openrlhf_sgpo.games.simplex import draw_paths
from openrlhf_sgpo.games.tabular import GAMES, Game
from openrlhf_sgpo.output import Progress
from openrlhf_sgpo.table import aligned

TAU = 0.1
NOISE = 0.1  # share of wrong labels that cDPO, rDPO and SPA assume
RADIUS = 0.05  # of SGPO's ball; at 0.2 the least worst case lies at a kink, around which gradient descent oscillates
TEMPERATURE = 3.0  # of the weights of Dr. DPO and KLDPO
ALPHA = 0.001  # of XPO's bonus
_SGPO_BEST = SGPOBestSettings(radius=RADIUS, refresh_window=driver.OCCURRENCES)
_SGPO = SGPOSettings(radius=RADIUS, refresh_window=driver.OCCURRENCES)


@dataclass
class GateSettings:
    out: str = setting("", "folder for policy_paths.svg and last_iterates.svg (empty: no plots)")


def _nash_md(coefficient: float) -> Callable[[Game], solutions.Solution]:
    return lambda game: solutions.nash_md(game, TAU, coefficient)


def _stackelberg(credit: bool) -> Callable[[Game], solutions.Solution]:
    return lambda game: solutions.stackelberg(game, TAU, TAU, follower_kl_credit=credit)


def _offline_ipo(game: Game) -> solutions.Solution:
    return solutions.offline_ipo(game, TAU)


def _dpo(game: Game) -> solutions.Solution:
    return solutions.dpo(game, TAU)


def _online_dpo(game: Game) -> solutions.Solution:
    return solutions.online_dpo(game, TAU)


def _xpo(game: Game) -> solutions.Solution:
    return solutions.xpo(game, TAU, ALPHA)


def _relabelled(game: Game, kept: float, added: float) -> solutions.Solution:
    """DPO's solution for the preferences kept * P + added."""
    return solutions.dpo(replace(game, preferences=kept * game.preferences + added), TAU)


def _smoothed(game: Game) -> solutions.Solution:
    return _relabelled(game, 1 - 2 * NOISE, NOISE)


def _unflipped(game: Game) -> solutions.Solution:
    return _relabelled(game, 1 / (1 - 2 * NOISE), -NOISE / (1 - 2 * NOISE))


def _tempered(factor: float) -> Callable[[Game], solutions.Solution]:
    """DPO's solution for preferences whose log-odds are multiplied by ``factor``."""

    def solution(game: Game) -> solutions.Solution:
        odds = (game.preferences / (1 - game.preferences)) ** factor
        return solutions.dpo(replace(game, preferences=odds / (1 + odds)), TAU)

    return solution


def _ropo(game: Game) -> solutions.Solution:
    """DPO's solution where the first of two answers wins with the probability s that solves a (2 p - 1) s (1 - s) = s - p: the
    slope of ROPO's expected loss is 0 there, p being the probability in the data."""
    p = game.preferences[0, 1]
    b = ROPOSettings().alpha * (2 * p - 1)
    s = (b - 1 + ((b - 1) ** 2 + 4 * b * p) ** 0.5) / (2 * b)
    return solutions.dpo(replace(game, preferences=np.array([[0.5, s], [1 - s, 0.5]])), TAU)


def _fewest_defeats(game: Game) -> solutions.Solution:
    """All probability on the first answer of the order that disagrees with the fewest comparisons (Kemeny's)."""

    def defeats(order: tuple[int, ...]) -> float:
        behind = [(order[j], order[i]) for i in range(game.size) for j in range(i + 1, game.size)]
        return sum(game.behaviour[y] * game.behaviour[x] * game.preferences[y, x] for y, x in behind)

    best = min(permutations(range(game.size)), key=defeats)
    return solutions.Solution(np.eye(game.size)[best[0]], 0.0)


def _sgpo(game: Game) -> solutions.Solution:
    """SGPO's solution with the edge of a stage that starts at SKEWED: its smallest margin, padded by 1."""
    rewards = [TAU * log(share) for share in SKEWED]
    return searched_solutions.sgpo(game, TAU, RADIUS, min(rewards) - max(rewards) - 1)


def _sgpo_best(game: Game) -> solutions.Solution:
    return searched_solutions.sgpo_best(game, TAU, RADIUS)


def _regularised_nash(game: Game) -> solutions.Solution:
    return solutions.regularised_nash(game, TAU)


CHECKS = (
    Check("slhf", SLHF(SLHFSettings(), TAU), "Stackelberg", _stackelberg(True), 8.0),
    Check(
        "slhf, no KL credit",
        SLHF(SLHFSettings(follower_kl_credit=False), TAU),
        "where the released code rests",
        _stackelberg(False),
        8.0,
    ),
    Check("nash_md, mixture 0", NashMD(NashMDSettings(0.0), TAU), "regularised Nash", _nash_md(0.0), 2.0),
    Check("nash_md, mixture 1/8", NashMD(NashMDSettings(0.125), TAU), "its own", _nash_md(0.125), 2.0),
    Check(
        "online_dpo, soft labels",
        OnlineDPO(OnlineDPOSettings("soft"), TAU),
        "Bradley-Terry on its own answers",
        _online_dpo,
        50.0,
    ),
    Check("xpo, soft labels", XPO(XPOSettings("soft", ALPHA), TAU), "its own", _xpo, 50.0),
    Check("online_ipo", OnlineIPO(NoSettings(), TAU), "regularised Nash", _regularised_nash, 0.1),
    Check("egpo", EGPO(NoSettings(), TAU), "regularised Nash", _regularised_nash, 0.1),
    Check("ipo_md, mixture 1/8", IPOMD(IPOMDSettings(0.125), TAU), "Nash-MD's", _nash_md(0.125), 0.1),
    Check("rloo", RLOO(RLOOSettings(), TAU), "regularised Nash", _regularised_nash, 2.0),
    Check("rloo, scores", RLOO(RLOOSettings(2, "score"), TAU), "RLHF", _dpo, 2.0, "bradley_terry_close"),
    Check("inpo", INPO(INPOSettings(0.3), TAU), "regularised Nash", _regularised_nash, 0.5, rounds=30),
    Check("comal", COMAL(COMALSettings(0.12, 3), TAU), "Nash", solutions.nash, 1.0, rounds=75),
    Check(
        "sppo, average",
        SPPO(SPPOSettings(2, 0.5, "all"), TAU),
        "Nash",
        solutions.nash,
        2.0,
        game="rock_paper_scissors",
        steps=10,
        rounds=200,
        average=True,
        begin=(0.5, 0.3, 0.2),
        tolerance=0.03,
    ),
    Check("ipo, offline", IPO(IPOSettings(), TAU), "best response to the data", _offline_ipo, 0.5, "offline_ipo"),
    Check("ipo, uniform data", IPO(IPOSettings(), TAU), "best response to the data", _offline_ipo, 0.5),
    Check("dpo, uniform data", DPO(NoSettings(), TAU), "Bradley-Terry", _dpo, 500.0),
    Check("iter_dpo", IterDPO(NoSettings(), TAU), "Bradley-Terry", _dpo, 500.0),
    Check("cdpo", CDPO(CDPOSettings(NOISE), TAU), "DPO's on smoothed labels", _smoothed, 500.0),
    Check("rdpo", RDPO(RDPOSettings(NOISE), TAU), "DPO's on clean labels", _unflipped, 500.0),
    Check("ropo", ROPO(ROPOSettings(), TAU), "its own", _ropo, 100.0, "two_actions_51_49", begin=(0.3, 0.7)),
    Check("sym_po", SymPO(SymPOSettings(), TAU), "first of Kemeny's order", _fewest_defeats, 500.0, steps=500),
    Check(
        "dr_dpo",
        DrDPO(DrDPOSettings(TEMPERATURE, driver.OCCURRENCES), TAU),
        "DPO's on sharper labels",
        _tempered(TEMPERATURE / (TEMPERATURE - 1)),
        200.0,
        "bradley_terry_close",
    ),
    Check(
        "kl_dpo",
        KLDPO(KLDPOSettings(TEMPERATURE, window=driver.OCCURRENCES), TAU),
        "DPO's on flatter labels",
        _tempered(TEMPERATURE / (TEMPERATURE + 1)),
        200.0,
        "bradley_terry_close",
    ),
    Check(
        "spa, all in doubt", SPA(SPASettings(NOISE, 1.0, [0.0], 0.0), TAU), "DPO's on smoothed labels", _smoothed, 500.0
    ),
    Check("sgpo", SGPO(_SGPO, TAU), "least worst case", _sgpo, 100.0),
    Check("sgpo_best", SGPOBest(_SGPO_BEST, TAU), "least best case", _sgpo_best, 100.0),
    Check("sgpo, wide window", SGPO(replace(_SGPO, window_pad=1e5), TAU), "Bradley-Terry", _dpo, 100.0),
)


def gate_table(results: list[CheckResult]) -> str:
    """One aligned row per check."""
    rows = [["algorithm", "game", "solution", "target", "reached", "error", "tolerance", ""]]
    for result in results:
        check = result.check
        target, reached = (" ".join(f"{value:.6f}" for value in policy) for policy in (result.target, result.reached))
        verdict = "" if result.passed else "MISSED"
        rows.append(
            [
                check.title,
                check.game,
                check.solution,
                target,
                reached,
                f"{result.error:.1e}",
                f"{check.tolerance:g}",
                verdict,
            ]
        )
    return "\n".join(aligned(rows, left=range(len(rows[0])), rule=False)) + "\n"


def run_gate(settings: GateSettings) -> int:
    """Prints the table, and draws the paths if ``out`` is set. Returns 1 if an algorithm misses its solution, else 0."""
    if settings.out and (problem := extras.missing("matplotlib")):
        raise ValueError(f"--out: {problem}")
    results = [play(check) for check in Progress(CHECKS, desc="games", unit="check")]
    print(gate_table(results), end="")
    if settings.out:
        game = GAMES["condorcet"]()
        drawn = {result.check.title: result for result in results if result.check.title in _DRAWN}
        marked = {result.check.solution: result.target for result in drawn.values()}
        picture = draw_paths(
            {title: result.path for title, result in drawn.items()},
            marked,
            Path(settings.out) / "policy_paths.svg",
            actions=game.actions,
            title=f"Condorcet paradox, tau = {TAU:g}",
        )
        print(f"\npaths: {picture}\n")
        print(draw_last_iterates(Path(settings.out)), end="")
    return 0 if all(result.passed for result in results) else 1


_DRAWN = (
    "slhf",
    "slhf, no KL credit",
    "nash_md, mixture 0",
    "nash_md, mixture 1/8",
    "dpo, uniform data",
    "ipo, uniform data",
)
