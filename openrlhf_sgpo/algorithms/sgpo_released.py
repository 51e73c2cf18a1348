"""SSAPO as its authors' code runs it, for reproduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openrlhf_sgpo.algorithms.sgpo_transport import SGPOTransport
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.algorithms.base import PairBatch, Stage
    from openrlhf_sgpo.dro import WorstCase


@dataclass
class SGPOReleasedSettings:
    radius: float = setting(0.01, "radius of the Wasserstein ball on win probabilities (0: no follower, DPO)", low=0)
    pieces: int = setting(6, "number of tangents that replace the loss in the follower", low=1)
    group_size: int = setting(100, "pairs per random group, each with its own follower (0: all pairs at once)", low=0)


class SGPOReleased(SGPOTransport):
    r"""SciPy's SLSQP in probability space, stopped after 50 iterations, and the leader

    -sum_k s_ik * log max(sigmoid(xi_i - xi0_i) - d_ik, 1e-6)      (JinYujie99/SSAPO, commit ccb912a),

    where xi0_i is the margin with which the round begins: the follower's margins are against the loss's reference, the leader's
    against the policy that enters the round, so that its win probabilities begin at 1/2.

    The solver is part of the method: at the follower's optimum the clamped logarithm has no gradient for the pairs that are
    moved, and close to the optimum an unbounded one. SLSQP takes minutes for a group of 100 pairs.
    """

    name = "sgpo_released"
    paper = "arXiv 2502.18099"
    summary = "SSAPO as the authors' code runs it: SLSQP on groups, and a leader with a clamped logarithm"
    settings = SGPOReleasedSettings

    def __init__(self, options: Any, beta: float):
        super().__init__(options, beta)
        self._start: Tensor | None = None  # margins of all pairs when the round begins

    @classmethod
    def package(cls, options: Any) -> str:
        return "scipy"

    def begin_stage(self, stage: Stage) -> dict[str, Any]:
        self._start = stage.margins
        return super().begin_stage(stage)

    def _leader_margins(self, batch: PairBatch) -> Tensor:
        assert self._start is not None
        margins = batch.margins(self.beta)
        return margins - self._start[batch.index].to(margins)

    def _exact(self, margins: Tensor, window: tuple[float, float] | None) -> WorstCase:
        from openrlhf_sgpo.dro import solve_worst_case

        return solve_worst_case(margins, self.options.radius, space="probability", pieces=self.options.pieces)

    def _solve_group(self, margins: Tensor, worst: WorstCase) -> tuple[Tensor, Tensor, dict[str, float]]:
        from openrlhf_sgpo.dro import slsqp

        answer = slsqp(margins, worst.radius, pieces=self.options.pieces)
        return answer.s, answer.displacement, {"solver_value": answer.value, "distance": answer.distance}

    def _loss_of_atoms(self, margins: Tensor, s: Tensor, displacement: Tensor) -> Tensor:
        from openrlhf_sgpo.dro.losses import released_loss

        return released_loss(margins, s, displacement)
