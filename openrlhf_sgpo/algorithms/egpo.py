"""EGPO: extragradient steps on online IPO's regression, with a third answer as the opponent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Plays, Role

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.config import Config


class EGPO(PlayAlgorithm):
    """Extragradient preference optimisation (Zhou, Fazel and Du, arXiv 2503.08942), beta = ``--model.beta``, on three answers
    y, y', y'' of the policy:

        [ h(y, y') - (p(y > y'') - p(y' > y'')) / beta ]^2,   h = s(y) - s(y').

    In expectation over y'' its gradient is that of the regression of h on p(y > pi) - p(y' > pi), with the opponent pi held
    fixed; it vanishes where s(y) = p(y > pi) / beta + constant, the regularised Nash equilibrium. Steps come in pairs: the
    first is a half step, the second takes the gradient on answers of the half step's policy, and begins where the first began.

    The second gradient is that of an extragradient method: at the half step, its log-ratios included. The paper's update keeps
    those of the start, theta + eta beta [ref - theta + p(y > pi_half) / beta] in a table; both have the same fixed point.
    """

    name = "egpo"
    paper = "arXiv 2503.08942"
    summary = "EGPO: extragradient steps of self-play by regression on preferences"
    extragradient = True

    def problems(self, config: Config) -> list[str]:
        problems = super().problems(config)
        for flag, steps in {"rounds.steps": config.rounds.steps, "ckpt.save_steps": config.ckpt.save_steps}.items():
            if steps > 0 and steps % 2:
                problems.append(
                    f"--{flag}: {steps} ends between the two halves of a step of --algo {self.name}; use an even number"
                )
        return problems

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("policy", "policy", "policy")

    def loss(self, batch: Plays) -> Tensor:
        ratios = batch.log_ratios()
        wins = batch.preferences[:, :2, 2]
        return (ratios[:, 0] - ratios[:, 1] - (wins[:, 0] - wins[:, 1]) / self.beta) ** 2
