"""SGPO: the game against the worst distribution of margins in a Wasserstein ball, played by the algorithm SSAPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from openrlhf_sgpo.algorithms.base import Needs, PairAlgorithm, PairBatch, Stage
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.recent import drawn, followed_by
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.dro import BestCase, WorstCase


class SaturatedBallError(ValueError):
    """With this radius the follower moves every margin to the edge, which leaves the leader without a gradient."""


@dataclass
class FollowerSettings:
    """When the follower is solved again, and the leader's proximal term."""

    refresh_steps: int = setting(
        1,
        "optimiser steps after which the follower is solved again, on the latest margins (0: once per stage)",
        low=0,
    )
    refresh_window: int = setting(1024, "number of latest margins on which the follower is solved again", low=1)
    prox: float = setting(
        0.0,
        "weight of a proximal term: the squared distance of each margin from its value at the start of the stage",
        low=0,
    )


@dataclass
class SGPOSettings(FollowerSettings):
    radius: float = setting(0.01, "radius of the Wasserstein ball, in units of --sgpo.space (0: no follower)", low=0)
    space: Literal["margin", "probability"] = setting(
        "margin", "space of the ball: margins (the paper), or win probabilities sigmoid(margin) (the authors' code)"
    )
    pieces: int = setting(
        0,
        "number of tangents that replace the loss (0: the exact loss; in probability space, where it is unbounded, 6 tangents)",
        low=0,
    )
    window_pad: float = setting(
        1.0,
        "margin space: the support reaches this far beyond the smallest and largest margin at the start of a stage",
        low=0,
    )


class SGPO(PairAlgorithm):
    r"""Stackelberg game of a leader, the policy, and a follower that answers with the worst distribution of its margins in a
    Wasserstein ball (Chu et al., arXiv 2502.18099).

    min_theta  V = sup { E_{xi ~ alpha}[-log sigmoid(xi)] : W1(alpha, law of the margins) <= radius, supp(alpha) in [a, b] }.

    The follower is solved exactly (``openrlhf_sgpo.dro``), and the leader's loss has the gradient of V, with the follower's
    answer held fixed (Danskin's theorem): DPO's loss with a straight chord between the edge a and the follower's threshold. The
    support [a, b] is fixed when a stage begins; the follower is solved again after every optimiser step, on the latest margins.
    As the radius goes to 0, the loss becomes DPO's, or that of the tangents if ``pieces`` sets them.
    """

    name = "sgpo"
    paper = "arXiv 2502.18099"
    summary = "SSAPO: self-annotated rounds against the worst case in a Wasserstein ball"
    settings: ClassVar[type] = SGPOSettings
    needs = Needs(rounds=True, samples_per_prompt=2)
    label_columns = ()  # the follower counts every margin once

    def __init__(self, options: Any, beta: float):
        super().__init__(options, beta)
        self._solution: WorstCase | BestCase | None = None
        self._window: tuple[float, float] | None = None  # support in this stage
        self._start: Tensor | None = None  # margins of all pairs at the start of the stage
        self._recent: Tensor | None = None
        self._steps = 0

    @classmethod
    def drop_in_problems(cls, options: Any) -> list[str]:
        problems = cls.option_problems(options)
        if not options.refresh_steps:
            problems.append(
                f"--{cls.name}.refresh_steps 0: here the follower has nothing but recent margins; give 1 or more"
            )
        if options.prox:
            problems.append(
                f"--{cls.name}.prox {options.prox}: where margins were at the start of a stage is unknown here; leave it at 0"
            )
        return problems

    def begin_stage(self, stage: Stage) -> dict[str, Any]:
        """Solve the follower on all margins; returns the certificate. Without margins, the follower begins after the first
        steps.

        Raises SaturatedBallError if the ball moves everything, ValueError for margins that are not finite.
        """
        margins = stage.margins
        if margins is None:
            return {}
        self._window = self._solution = None
        self._solution = self._solve(margins)
        self._start = margins.detach()
        self._recent = drawn(margins, self.options.refresh_window, stage.seed)
        return self._solution.certificate()

    def loss(self, batch: PairBatch) -> Tensor:
        margins = batch.margins(self.beta)
        if self._solution is None:
            return dpo_loss(margins)
        loss = self._solution.robust_loss(margins)
        if self.options.prox:
            if self._start is None or batch.index is None:
                raise ValueError(f"--{self.name}.prox needs the index of each pair, which this batch lacks; use 0")
            loss = loss + self.options.prox * (margins - self._start[batch.index].to(margins)).square()
        return loss

    def after_step(self, watched: Tensor) -> dict[str, Any]:
        """Keep the latest margins and, every ``refresh_steps`` steps, solve the follower on them again."""
        if not self.options.refresh_steps or (self.options.radius == 0 and self._solution is not None):
            return {}  # with radius 0 no margins change the answer
        self._recent = followed_by(self._recent, watched, self.options.refresh_window)
        self._steps += 1
        if self._steps % self.options.refresh_steps:
            return {}
        self._solution = self._solve(self._recent)
        figures = self._solution.certificate()
        return {f"{self.name}/{name}": value for name, value in figures.items() if isinstance(value, (int, float))}

    def state_dict(self) -> dict[str, Any]:
        if not self._steps:
            return {}
        return {
            "solved": None if self._solution is None else self._solution.margins,
            "window": self._window,
            "recent": self._recent,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._window = state["window"]
            self._solution = None if state["solved"] is None else self._solve(state["solved"])
            self._recent, self._steps = state["recent"], state["steps"]

    def _solve(self, margins: Tensor) -> WorstCase | BestCase:
        """The follower's answer within the support, which is set by the first margins."""
        from openrlhf_sgpo.dro import solve_worst_case

        options = self.options
        solution = solve_worst_case(
            margins,
            options.radius,
            space=options.space,
            pieces=options.pieces or None,
            window=self._window,
            window_pad=options.window_pad,
        )
        if solution.saturated:
            remedy = f", or raise --{self.name}.window_pad" if options.space == "margin" else ""
            raise saturated_ball(self.name, options.radius, margins, f"the edge {solution.edge:.4g}", remedy)
        self._window = solution.window
        return solution


def saturated_ball(name: str, radius: float, margins: Tensor, place: str, remedy: str = "") -> SaturatedBallError:
    """The error for a radius that moves all these margins to ``place``. remedy: an alternative to a smaller radius."""
    return SaturatedBallError(
        f"--{name}.radius {radius} is enough to move all {len(margins)} margins to {place}, where the loss has no gradient. "
        f"Margins range from {margins.min():.4g} to {margins.max():.4g}. Lower --{name}.radius{remedy}. With "
        "--rounds.loss_reference previous all margins are 0 when a round begins."
    )
