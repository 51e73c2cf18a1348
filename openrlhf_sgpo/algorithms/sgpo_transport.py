"""SSAPO as in section 3.3 of its paper: the atoms of the worst case move with the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from openrlhf_sgpo import extras
from openrlhf_sgpo.algorithms.base import Needs, PairAlgorithm, PairBatch, Stage
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.sgpo import saturated_ball
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.dro import WorstCase


@dataclass
class SGPOTransportSettings:
    radius: float = setting(0.01, "radius of the Wasserstein ball on margins (0: no follower, DPO)", low=0)
    pieces: int = setting(6, "number of tangents that replace the loss in the follower (0: the exact loss)", low=0)
    window_pad: float = setting(1.0, "the support reaches this far beyond the smallest and largest margin", low=0)
    group_size: int = setting(100, "pairs per random group, each with its own follower (0: all pairs at once)", low=0)
    solver: Literal["exact", "program"] = setting(
        "exact", "exact: one sort; program: the paper's convex program in cvxpy"
    )


class SGPOTransport(PairAlgorithm):
    r"""The follower's answer is fixed when a round begins, as atoms with weights s_ik and displacements d_ik = q_ik / s_ik. The
    leader minimises the loss of the atoms, which keep their distance from the policy's margins:

    sum_k s_ik * -log sigmoid(xi_i - d_ik)                         (Chu et al., arXiv 2502.18099, section 3.3 and equation 9).

    Its gradient is not that of the worst-case value; that of ``sgpo`` is.
    """

    name = "sgpo_transport"
    paper = "arXiv 2502.18099"
    summary = (
        "SSAPO as the paper states it: a follower on tangents, frozen for a round, whose atoms move with the policy"
    )
    settings: ClassVar[type] = SGPOTransportSettings
    needs = Needs(rounds=True, samples_per_prompt=2)
    label_columns = ()  # the follower counts every margin once

    @classmethod
    def option_problems(cls, options: Any) -> list[str]:
        problem = cls.package(options) and extras.missing(cls.package(options))
        return [f"--algo {cls.name}: {problem}"] if problem else []

    @classmethod
    def drop_in_problems(cls, options: Any) -> list[str]:
        return [f"--algo {cls.name} moves each pair by a fixed distance, so it needs the rounds of openrlhf-sgpo train"]

    @classmethod
    def package(cls, options: Any) -> str:
        """The package that the solver needs; empty if none."""
        return "cvxpy" if options.solver == "program" else ""

    def __init__(self, options: Any, beta: float):
        super().__init__(options, beta)
        self._atoms: tuple[Tensor, Tensor] | None = None  # s and displacements of all pairs, each (N, K)

    def begin_stage(self, stage: Stage) -> dict[str, Any]:
        """Solve the follower group by group, within the window of all margins; returns the certificate.

        Raises SaturatedBallError if a group's ball moves everything, ValueError for margins that are not finite.
        """
        import torch

        margins = stage.margins
        assert margins is not None
        whole = self._exact(margins, None)
        size = self.options.group_size or len(margins)
        order = torch.randperm(len(margins), generator=torch.Generator().manual_seed(stage.seed))
        groups = list(order.split(size)) if size < len(margins) else [torch.arange(len(margins))]
        solutions = [self._exact(margins[group], whole.window) for group in groups]
        for group, solution in zip(groups, solutions, strict=True):
            if solution.saturated:
                raise saturated_ball(self.name, self.options.radius, margins[group], f"the edge {solution.edge:.4g}")
        value = sum(len(group) * worst.value for group, worst in zip(groups, solutions, strict=True)) / len(margins)
        figures = whole.certificate() | {"groups": len(groups), "grouping_loss": whole.value - value}
        if not self.options.radius:
            return figures
        answers = [
            self._solve_group(margins[group], solution) for group, solution in zip(groups, solutions, strict=True)
        ]
        s, displacement, facts = zip(*answers, strict=True)
        order = torch.cat(groups)
        self._atoms = _in_order(s, order, margins), _in_order(displacement, order, margins)
        shares = [len(group) / len(margins) for group in groups]
        for name in facts[0]:
            figures[name] = sum(share * fact[name] for share, fact in zip(shares, facts, strict=True))
        return figures

    def loss(self, batch: PairBatch) -> Tensor:
        if self._atoms is None:
            return dpo_loss(batch.margins(self.beta))
        if batch.index is None:
            raise ValueError(
                f"--algo {self.name} needs the index of each pair, because each is moved by a fixed distance"
            )
        margins = self._leader_margins(batch)
        s, displacement = (values[batch.index].to(margins.device) for values in self._atoms)
        return self._loss_of_atoms(margins, s, displacement)

    def _leader_margins(self, batch: PairBatch) -> Tensor:
        return batch.margins(self.beta)

    def _exact(self, margins: Tensor, window: tuple[float, float] | None) -> WorstCase:
        from openrlhf_sgpo.dro import solve_worst_case

        options = self.options
        return solve_worst_case(
            margins, options.radius, pieces=options.pieces or None, window=window, window_pad=options.window_pad
        )

    def _solve_group(self, margins: Tensor, worst: WorstCase) -> tuple[Tensor, Tensor, dict[str, float]]:
        """s (N, K) and displacement q / s (N, K), 0 where s is 0, from the chosen solver; and its figures for the
        certificate."""
        import torch

        if self.options.solver == "program":
            from openrlhf_sgpo.dro import program

            solution = program(margins, worst.radius, space=worst.space, pieces=worst.pieces, window=worst.window)
            s, q = torch.as_tensor(solution.s), torch.as_tensor(solution.q)
        else:
            s, q = worst.transport()
        return s, torch.where(s > 0, q / s.clamp_min(torch.finfo(s.dtype).tiny), 0.0), {}

    def _loss_of_atoms(self, margins: Tensor, s: Tensor, displacement: Tensor) -> Tensor:
        from openrlhf_sgpo.dro.losses import transport_loss

        return transport_loss(margins, s, displacement)


def _in_order(parts: Sequence[Tensor], order: Tensor, like: Tensor) -> Tensor:
    """Rows of the groups, concatenated and in the order of the pairs, (N, K); order: the pairs of all groups."""
    import torch
    from torch.nn.functional import pad

    # The program for the exact loss has one tangent per pair, so groups differ in width. s = 0 is no atom.
    width = max(part.shape[1] for part in parts)
    rows = torch.cat([pad(part, (0, width - part.shape[1])) for part in parts]).to(like)
    return torch.empty_like(rows).index_copy_(0, order.to(like.device), rows)
