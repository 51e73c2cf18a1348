"""SGPO / SSAPO: preference optimisation against the worst margin distribution in a Wasserstein ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from openrlhf_sgpo import extras
from openrlhf_sgpo.algorithms.base import Algorithm, Needs, PairBatch, Stage
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.dro import BestCase, WorstCase


class SaturatedBallError(RuntimeError):
    """The radius lets the follower move every margin to the edge, which leaves the leader without a gradient."""


@dataclass
class SGPOSettings:
    radius: float = setting(
        0.01, "radius of the Wasserstein ball, in units of --sgpo.space (0: no follower, plain DPO)"
    )
    space: Literal["margin", "probability"] = setting(
        "margin", "where the ball lives: on margins (the paper), or on win probabilities sigmoid(margin) (its code)"
    )
    ball: Literal["worst", "best"] = setting(
        "worst",
        "worst: train against the worst case of the ball (the paper); best: train on its best case, which forgives pairs that "
        "the policy ranks badly (not in the paper; needs the leader danskin, and has no tangents and no window)",
    )
    pieces: int = setting(6, "tangents that stand for the loss in the follower (0: the exact loss, margin space only)")
    window_pad: float = setting(
        1.0, "margin space: the support reaches this far beyond the smallest and largest margin"
    )
    leader: Literal["danskin", "transport", "released"] = setting(
        "danskin",
        "danskin: exact gradient of the worst case; transport: atoms of the worst case move with the policy (margin space); "
        "released: what the authors' code does (probability space)",
    )
    group_size: int = setting(0, "solve the follower on random groups of so many pairs (0: all pairs at once)")
    solver: Literal["exact", "program", "slsqp"] = setting(
        "exact", "exact: one sort; program: the paper's convex program in cvxpy; slsqp: the authors' code"
    )
    refresh_steps: int = setting(0, "danskin: solve again every so many optimiser steps (0: once a round)")
    refresh_window: int = setting(1024, "danskin: how many of the latest margins the refreshed follower sees")


class SGPO(Algorithm):
    r"""Stackelberg game between the policy and a worst-case preference distribution (Chu et al., arXiv 2502.18099).

    min_theta  sup { E_{xi ~ alpha}[-log sigmoid(xi)] : W1(alpha, law of the margins) <= radius }.

    The follower is solved exactly on the margins of all pairs (``openrlhf_sgpo.dro``); the default leader then minimises
    its exact gradient, mean_i phi(xi_i(theta)) with the follower's slope and edge held fixed (Danskin): DPO's loss whose
    part below the follower's threshold is a straight chord. Radius 0 is self-annotated DPO.

    ``--sgpo.ball best`` (not in the paper) puts the inf of the same ball in place of the sup: DPO's loss that goes on as its
    own tangent below the level to which the follower raises the smallest margins.
    """

    name = "sgpo"
    paper = "arXiv 2502.18099"
    summary = "SSAPO: self-annotated rounds against the worst case in a Wasserstein ball"
    settings = SGPOSettings
    needs = Needs(rounds=True, samples_per_prompt=2)

    @classmethod
    def check(cls, options: SGPOSettings) -> list[str]:
        problems = []
        if options.radius < 0:
            problems.append(f"--sgpo.radius {options.radius} must be 0 or more")
        if options.pieces < 0 or (options.pieces == 0 and options.space == "probability"):
            problems.append(
                f"--sgpo.pieces {options.pieces}: give 1 or more, or 0 with --sgpo.space margin (the loss is unbounded at "
                "probability 0, so that space needs tangents)"
            )
        for flag in ("window_pad", "group_size", "refresh_steps"):
            if getattr(options, flag) < 0:
                problems.append(f"--sgpo.{flag} {getattr(options, flag)} must be 0 or more")
        if options.ball == "best":
            problems += [
                f"--sgpo.{flag} {getattr(options, flag)} is not read with --sgpo.ball best, which {has}; leave it at "
                f"{getattr(SGPOSettings, flag)}"
                for flag, has in (
                    ("leader", "has no atoms to move"),
                    ("pieces", "has the exact loss"),
                    ("window_pad", "has no window"),
                )
                if getattr(options, flag) != getattr(SGPOSettings, flag)
            ]
        needed = {"transport": "margin", "released": "probability"}.get(options.leader)
        if needed and options.space != needed:
            problems.append(f"--sgpo.leader {options.leader} needs --sgpo.space {needed}")
        solvers = {
            "danskin": ("exact",),
            "transport": ("exact", "program"),
            "released": ("exact", "program", "slsqp"),
        }[options.leader]
        if options.solver not in solvers:
            problems.append(
                f"--sgpo.solver {options.solver} gives no answer that --sgpo.leader {options.leader} can use; "
                f"valid here: {', '.join(solvers)}"
            )
        if problem := extras.missing(*{"program": ("cvxpy",), "slsqp": ("scipy",)}.get(options.solver, ())):
            problems.append(f"--sgpo.solver {options.solver}: {problem}")
        if options.refresh_steps and options.leader != "danskin":
            problems.append(
                f"--sgpo.refresh_steps {options.refresh_steps} needs --sgpo.leader danskin: the other leaders fix where each "
                "pair of the round is moved to"
            )
        if options.refresh_steps and options.refresh_window < 1:
            problems.append(f"--sgpo.refresh_window {options.refresh_window} must be 1 or more")
        return problems

    def __init__(self, options: SGPOSettings, beta: float):
        super().__init__(options, beta)
        # Danskin: slope, edge and window of each pair's group, or one value for all; of a best case, its level. Other
        # leaders: s and displacement per pair.
        self._answer: dict[str, Any] | None = None
        self._recent: Tensor | None = None
        self._steps = 0

    def begin_stage(self, margins: Tensor, stage: Stage = Stage()) -> dict[str, Any]:  # noqa: B008 - frozen
        """Solve the follower on all margins, shape (N,), group by group; returns the certificate.

        Raises SaturatedBallError if a group's ball moves everything, ValueError for margins that are not finite.
        """
        import torch

        size = self.options.group_size or len(margins)
        order = torch.randperm(len(margins), generator=torch.Generator().manual_seed(stage.seed))
        groups = list(order.split(size)) if size < len(margins) else [slice(None)]
        solutions = [self._solve(margins[group]) for group in groups]
        self._recent = margins.detach()[-self.options.refresh_window :]
        if self.options.radius == 0:
            self._answer = None
        elif self.options.leader == "danskin":
            self._answer = self._danskin_answer(margins, groups, solutions)
        else:
            self._answer = self._transport_answer(margins, groups, solutions)
        return _certificate(self.options.ball, solutions, margins)

    def loss(self, batch: PairBatch) -> Tensor:
        from openrlhf_sgpo.dro.losses import best_case_loss, danskin_loss, released_loss, transport_loss

        margins = batch.margins(self.beta)
        if self._answer is None:
            return dpo_loss(margins)
        if batch.index is None and any(getattr(value, "ndim", 0) for value in self._answer.values()):
            raise ValueError(
                "this follower's answer differs from pair to pair, so the batch must say which pairs it holds"
            )
        answer = {
            name: value[batch.index].to(margins.device) if getattr(value, "ndim", 0) else value
            for name, value in self._answer.items()
        }
        if self.options.ball == "best":
            return best_case_loss(margins, answer["level"], space=self.options.space)
        if self.options.leader == "danskin":
            return danskin_loss(
                margins,
                answer["slope"],
                answer["edge"],
                space=self.options.space,
                pieces=self.options.pieces or None,
                window=(answer["lower"], answer["upper"]),
            )
        leader = transport_loss if self.options.leader == "transport" else released_loss
        return leader(margins, answer["s"], answer["displacement"])

    def after_step(self, watched: Tensor) -> dict[str, Any]:
        """Keep the latest margins and, every ``refresh_steps`` steps, solve the follower on them again."""
        import torch

        if not (self.options.refresh_steps and self.options.radius):
            return {}
        latest = watched.detach().cpu()  # the follower costs milliseconds there, and a checkpoint comes back there
        recent = latest if self._recent is None else torch.cat([self._recent, latest])
        self._recent = recent[-self.options.refresh_window :]
        self._steps += 1
        if self._steps % self.options.refresh_steps:
            return {}
        solution = self._solve(self._recent)
        self._answer = _scalars(solution)
        certificate = _certificate(self.options.ball, [solution], self._recent)
        return {f"sgpo/{name}": value for name, value in certificate.items() if isinstance(value, (int, float))}

    def state_dict(self) -> dict[str, Any]:
        if not self.options.refresh_steps:
            return {}
        return {"answer": self._answer, "recent": self._recent, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._answer, self._recent, self._steps = state["answer"], state["recent"], state["steps"]

    def _solve(self, margins: Tensor) -> WorstCase | BestCase:
        from openrlhf_sgpo.dro import solve_best_case, solve_worst_case

        options = self.options
        solution: WorstCase | BestCase
        if options.ball == "best":
            solution = solve_best_case(margins, options.radius, space=options.space)
            place, or_else = "probability 1", ""
        else:
            solution = solve_worst_case(
                margins,
                options.radius,
                space=options.space,
                pieces=options.pieces or None,
                window_pad=options.window_pad,
            )
            place = f"the edge {solution.edge:.4g}"
            or_else = ", or raise --sgpo.window_pad" if options.space == "margin" else ""
        if solution.saturated:
            raise SaturatedBallError(
                f"--sgpo.radius {options.radius} (space {options.space}) is enough to move all {len(margins)} margins to "
                f"{place}, where the loss has no gradient left. Margins range from {margins.min():.4g} to "
                f"{margins.max():.4g}. Lower --sgpo.radius{or_else}"
                ". With --rounds.loss_reference previous all margins are 0 when a round begins."
            )
        return solution

    def _danskin_answer(self, margins: Tensor, groups: list, solutions: list) -> dict[str, Any]:
        answers = [_scalars(solution) for solution in solutions]
        if len(groups) == 1:
            return answers[0]
        answer = {name: margins.new_empty(len(margins)) for name in answers[0]}
        for group, scalars in zip(groups, answers, strict=True):
            for name, value in scalars.items():
                answer[name][group] = value
        return answer

    def _transport_answer(self, margins: Tensor, groups: list, solutions: list) -> dict[str, Any]:
        import torch
        from torch.nn.functional import pad

        s_parts, displacement_parts = [], []
        for group, worst in zip(groups, solutions, strict=True):
            s, displacement = self._masses(margins[group], worst)
            s_parts.append(s)
            displacement_parts.append(displacement)
        order = torch.cat([torch.arange(len(margins), device=margins.device)[group] for group in groups])
        answer = {}
        for name, parts in (("s", s_parts), ("displacement", displacement_parts)):
            # The program of the exact loss has a tangent per pair, so that groups differ in width; s = 0 is no atom.
            width = max(part.shape[1] for part in parts)
            ordered = torch.cat([pad(part, (0, width - part.shape[1])) for part in parts]).to(margins)
            answer[name] = torch.empty_like(ordered).index_copy_(0, order, ordered)
        return answer

    def _masses(self, margins: Tensor, worst: WorstCase) -> tuple[Tensor, Tensor]:
        """s (N, K) and displacement q / s (N, K), 0 where s is 0, from the solver that was asked for."""
        import torch

        if self.options.solver == "slsqp":
            from openrlhf_sgpo.dro import slsqp

            released = slsqp(margins, self.options.radius, pieces=self.options.pieces)
            return torch.as_tensor(released.s), torch.as_tensor(released.displacement)
        if self.options.solver == "program":
            from openrlhf_sgpo.dro import program

            solution = program(
                margins,
                self.options.radius,
                space=self.options.space,
                pieces=self.options.pieces or None,
                window_pad=self.options.window_pad,
            )
            s, q = torch.as_tensor(solution.s), torch.as_tensor(solution.q)
        else:
            s, q = worst.transport()
        return s, torch.where(s > 0, q / s.clamp_min(torch.finfo(s.dtype).tiny), 0.0)


def _scalars(solution: WorstCase | BestCase) -> dict[str, float]:
    """All that the loss of the danskin leader needs to know of the follower's answer."""
    from openrlhf_sgpo.dro import BestCase

    if isinstance(solution, BestCase):
        return {"level": solution.level}
    lower, upper = solution.window
    return {"slope": solution.slope, "edge": solution.edge, "lower": lower, "upper": upper}


def _certificate(ball: str, solutions: list, margins: Tensor) -> dict[str, Any]:
    """What proves the follower's answer, averaged over groups by their size; see docs/algorithms/sgpo.md."""
    sizes = [len(solution.margins) for solution in solutions]

    def average(name: str) -> float:
        return sum(size * getattr(each, name) for size, each in zip(sizes, solutions, strict=True)) / sum(sizes)

    place = {"worst": "edge", "best": "level"}[ball]
    names = ("value", "dual_value", "empirical", "bound", "slope", place, "fraction_moved", "budget_used")
    certificate: dict[str, Any] = {name: average(name) for name in names}
    # At radius 0 nothing is below the threshold, and JSON has no minus infinity.
    certificate["threshold"] = average("threshold") if solutions[0].radius else None
    certificate["gap"] = max(solution.gap for solution in solutions)
    certificate["ball"] = ball
    certificate["radius"] = solutions[0].radius
    certificate["groups"] = len(solutions)
    certificate["pairs"] = len(margins)
    return certificate
