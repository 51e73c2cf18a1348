"""Finite preference games, their exact solutions, and plots of paths towards them.

Needs only NumPy; ``nash`` loads SciPy and ``draw_paths`` Matplotlib when first called.
"""

from openrlhf_sgpo.games.numerics import NotConverged, kl, mixture, tilted
from openrlhf_sgpo.games.simplex import draw_paths
from openrlhf_sgpo.games.solutions import (
    Solution,
    StackelbergSolution,
    best_response,
    bradley_terry_rewards,
    dpo,
    exploitability,
    mirror_step,
    nash,
    nash_md,
    offline_ipo,
    online_dpo,
    regularised_nash,
    stackelberg,
    stackelberg_value,
    xpo,
)
from openrlhf_sgpo.games.tabular import GAMES, Game, condorcet_winner, cycles, win_rate, win_rates

__all__ = [
    "GAMES",
    "Game",
    "NotConverged",
    "Solution",
    "StackelbergSolution",
    "best_response",
    "bradley_terry_rewards",
    "condorcet_winner",
    "cycles",
    "dpo",
    "draw_paths",
    "exploitability",
    "kl",
    "mirror_step",
    "mixture",
    "nash",
    "nash_md",
    "offline_ipo",
    "online_dpo",
    "regularised_nash",
    "stackelberg",
    "stackelberg_value",
    "tilted",
    "win_rate",
    "win_rates",
    "xpo",
]
