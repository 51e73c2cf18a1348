"""The best case of SGPO's ball: badly ranked pairs count less, not more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from openrlhf_sgpo.algorithms.sgpo import SGPO, FollowerSettings, saturated_ball
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.dro import BestCase, WorstCase


@dataclass
class SGPOBestSettings(FollowerSettings):
    radius: float = setting(0.01, "radius of the Wasserstein ball, in units of --sgpo_best.space (0: DPO)", low=0)
    space: Literal["margin", "probability"] = setting(
        "margin", "space of the ball: margins, or win probabilities sigmoid(margin)"
    )


class SGPOBest(SGPO):
    r"""SGPO with inf in place of sup (not in the paper):

    min_theta  V = inf { E_{xi ~ alpha}[-log sigmoid(xi)] : W1(alpha, law of the margins) <= radius }.

    The follower raises the smallest margins to one level c (``openrlhf_sgpo/dro/best.py``). The leader's loss has the gradient
    of V: DPO's loss, continued by its tangent below c. Radius 0 is DPO.
    """

    name = "sgpo_best"
    paper = "arXiv 2502.18099"
    summary = "self-annotated rounds with the best case of SGPO's ball, which caps the pull of badly ranked pairs"
    settings = SGPOBestSettings

    def _solve(self, margins: Tensor) -> WorstCase | BestCase:
        from openrlhf_sgpo.dro import solve_best_case

        solution = solve_best_case(margins, self.options.radius, space=self.options.space)
        if solution.saturated:
            if self._solution is None:
                raise saturated_ball(self.name, self.options.radius, margins, "probability 1")
            return self._solution  # training has brought the pairs there: the answer before goes on capping their pull
        return solution
