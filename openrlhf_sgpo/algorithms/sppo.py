"""SPPO: regression of log-ratios on win rates against the policy at the start of the round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Plays, Role
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


def sppo_loss(log_ratios: Tensor, win_rates: Tensor, step: float) -> Tensor:
    """(log pi(y) / pi_t(y) - eta * (p(y > pi_t) - 1/2))^2, any shape (Wu et al., arXiv 2405.00675).

    log_ratios: log pi(y) - log pi_t(y); win_rates: p(y > pi_t); step: eta.
    """
    return (log_ratios - step * (win_rates - 0.5)) ** 2


@dataclass
class SPPOSettings:
    answers: int = setting(5, "answers per prompt, from which the win rates are estimated", low=2)
    step: float = setting(1000.0, "eta, the step size of a round's multiplicative update", above=0)
    train_on: Literal["extremes", "all"] = setting(
        "extremes",
        "extremes: the answers with the largest and the smallest win rate (the authors' code); all: every answer",
    )


class SPPO(PlayAlgorithm):
    """Self-play by multiplicative weights: pi_{t+1} proportional to pi_t exp(eta * p(y > pi_t)) (Wu et al., arXiv 2405.00675).

    Answers come from pi_t, the policy at the start of the round, and log-ratios are relative to it; ``--model.beta`` and the
    initial reference are not used. The win rate of an answer is its mean preference over the prompt's answers, itself included.
    With cyclic preferences the last policy circles around the Nash equilibrium; the average over rounds approaches it.
    """

    name = "sppo"
    paper = "arXiv 2405.00675"
    summary = "SPPO: self-play by regression of log-ratios on win rates"
    settings = SPPOSettings
    models = ("previous",)
    defaults: ClassVar[dict[str, Any]] = {"rollout.temperature": 1.0}
    steps_per_sync = 0

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("previous",) * self.options.answers

    def loss(self, batch: Plays) -> Tensor:
        win_rates = batch.preferences.mean(-1)
        ratios = (batch.log_probs - batch.previous).sum(-1)
        losses = sppo_loss(ratios, win_rates, self.options.step)
        if self.options.train_on == "all":
            return losses.mean(-1)
        best, worst = win_rates.argmax(-1, keepdim=True), win_rates.argmin(-1, keepdim=True)
        return (losses.gather(-1, best) + losses.gather(-1, worst)).squeeze(-1) / 2
