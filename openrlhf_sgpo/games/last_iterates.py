"""Where the last policy of Nash-MD, INPO, EGPO and COMAL ends if regularisation is weak and steps are long."""

from __future__ import annotations

from pathlib import Path

from openrlhf_sgpo.algorithms.base import NoSettings
from openrlhf_sgpo.algorithms.comal import COMAL, COMALSettings
from openrlhf_sgpo.algorithms.egpo import EGPO
from openrlhf_sgpo.algorithms.inpo import INPO, INPOSettings
from openrlhf_sgpo.algorithms.nash_md import NashMD, NashMDSettings
from openrlhf_sgpo.games.check import Check, play
from openrlhf_sgpo.games.simplex import draw_paths
from openrlhf_sgpo.games.solutions import Solution, nash, regularised_nash
from openrlhf_sgpo.games.tabular import GAMES, Game
from openrlhf_sgpo.table import aligned

TAU = 0.02
RATE = 20.0  # of a policy gradient; a regression's gradient is 4 / tau times as large
GRADIENTS = 400


def _regularised(game: Game) -> Solution:
    return regularised_nash(game, TAU)


REGULARISED = f"regularised Nash, tau {TAU}"
RUNS = (
    Check(
        f"nash_md, mixture 0, tau {TAU}",
        NashMD(NashMDSettings(0.0), TAU),
        REGULARISED,
        _regularised,
        RATE,
        steps=GRADIENTS,
    ),
    Check(f"egpo, tau {TAU}", EGPO(NoSettings(), TAU), REGULARISED, _regularised, RATE * TAU / 4, steps=GRADIENTS),
    Check(f"inpo, tau {TAU}", INPO(INPOSettings(0.2), TAU), REGULARISED, _regularised, 0.5, steps=40, rounds=40),
    Check("comal, tau 0.1", COMAL(COMALSettings(0.12, 3), 0.1), "Nash", nash, 1.0, steps=40, rounds=40),
)


def draw_last_iterates(folder: Path) -> str:
    """Draws the paths of RUNS into last_iterates.svg. Returns a table of how far their last policies are from their targets,
    and where the picture is."""
    results = [play(check) for check in RUNS]
    rows = [["last policy", "target", "largest error"]]
    rows += [[result.check.title, result.check.solution, f"{result.error:.1e}"] for result in results]
    picture = draw_paths(
        {result.check.title: result.path for result in results},
        {result.check.solution: result.target for result in results},
        folder / "last_iterates.svg",
        actions=GAMES["condorcet"]().actions,
        title="Condorcet paradox: last iterates",
    )
    return "\n".join(aligned(rows, left=(0, 1), rule=False)) + f"\n\nlast iterates: {picture}\n"
