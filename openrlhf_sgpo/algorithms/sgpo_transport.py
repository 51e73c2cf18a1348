"""SSAPO as its paper's section 3.3 has it: the atoms of the worst case move with the policy."""

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
    pieces: int = setting(6, "tangents that stand for the loss in the follower (0: the exact loss)", low=0)
    window_pad: float = setting(1.0, "the support reaches this far beyond the smallest and largest margin", low=0)
    group_size: int = setting(100, "solve the follower on random groups of so many pairs (0: all pairs at once)", low=0)
    solver: Literal["exact", "program"] = setting(
        "exact", "exact: one sort; program: the paper's convex program in cvxpy"
    )


class SGPOTransport(PairAlgorithm):
    r"""The follower's answer is fixed when a round begins, as atoms that are displaced by d_ik = q_ik / s_ik and weigh s_ik.
    The leader minimises the loss of the atoms, which keep their distance from the policy's margins:

    sum_k s_ik * -log sigmoid(xi_i - d_ik)                         (Chu et al., arXiv 2502.18099, section 3.3 and equation 9).

    Its gradient is not that of the worst-case value; see ``sgpo`` for a leader that has it.
    """

    name = "sgpo_transport"
    paper = "arXiv 2502.18099"
    summary = (
        "SSAPO as the paper states it: a follower on tangents, frozen for a round, whose atoms move with the policy"
    )
    settings: ClassVar[type] = SGPOTransportSettings
    needs = Needs(rounds=True, samples_per_prompt=2)

    @classmethod
    def check(cls, options: Any) -> list[str]:
        problem = cls.package(options) and extras.missing(cls.package(options))
        return [f"--algo {cls.name}: {problem}"] if problem else []

    @classmethod
    def package(cls, options: Any) -> str:
        """The package of the solver, where it needs one."""
        return "cvxpy" if options.solver == "program" else ""

    def __init__(self, options: Any, beta: float):
        super().__init__(options, beta)
        self._atoms: tuple[Tensor, Tensor] | None = None  # s and displacement of all pairs, (N, K)

    def begin_stage(self, stage: Stage) -> dict[str, Any]:
        """Solve the follower group by group, all groups in the window of all margins; returns the certificate.

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
        value = sum(len(group) * each.value for group, each in zip(groups, solutions, strict=True)) / len(margins)
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
        margins = batch.margins(self.beta)
        if self._atoms is None:
            return dpo_loss(margins)
        if batch.index is None:
            raise ValueError(
                f"--algo {self.name} fixes where each pair is moved, so a batch must say which pairs it holds"
            )
        s, displacement = (values[batch.index].to(margins.device) for values in self._atoms)
        return self._loss_of_atoms(margins, s, displacement)

    def _exact(self, margins: Tensor, window: tuple[float, float] | None) -> WorstCase:
        from openrlhf_sgpo.dro import solve_worst_case

        options = self.options
        return solve_worst_case(
            margins, options.radius, pieces=options.pieces or None, window=window, window_pad=options.window_pad
        )

    def _solve_group(self, margins: Tensor, worst: WorstCase) -> tuple[Tensor, Tensor, dict[str, float]]:
        """s (N, K) and displacement q / s (N, K), 0 where s is 0, from the solver that was asked for; and what the certificate
        should say of it."""
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
    """(N, K) in the order of the pairs from the rows of the groups; order: the pairs of all groups in a row."""
    import torch
    from torch.nn.functional import pad

    # The program of the exact loss has a tangent per pair, so that groups differ in width; s = 0 is no atom.
    width = max(part.shape[1] for part in parts)
    rows = torch.cat([pad(part, (0, width - part.shape[1])) for part in parts]).to(like)
    return torch.empty_like(rows).index_copy_(0, order.to(like.device), rows)
