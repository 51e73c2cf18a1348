"""RLOO: REINFORCE with the other answers to the prompt as baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Plays, Role
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RLOOSettings:
    answers: int = setting(2, "answers per prompt", low=2)
    reward: Literal["win_rate", "score"] = setting(
        "win_rate",
        "win_rate: among the answers to the prompt; score: the oracle's, which has to give one to each answer",
    )


class RLOO(PlayAlgorithm):
    """REINFORCE on k answers per prompt (Ahmadian et al., arXiv 2402.14740), tau = ``--model.beta``, the bracket held fixed:

        -(1/k) sum_i [ (r_i - b_i) - tau * (s_i - mean_{j != i} s_j) ] * log pi(y_i).

    With ``reward`` score, r_i is the oracle's score of an answer and b_i = mean_{j != i} r_j. The expected gradient is that of
    -(E[r] - tau KL(pi || ref)), and the fixed point RLHF's optimum, ref exp(r / tau).

    With win_rate, r_i = mean_{j != i} p(y_i > y_j) and b_i = 1/2, its exact mean: mean_{j != i} r_j depends on y_i, and would
    count the preference k / (k - 1) times. The fixed point is the regularised Nash equilibrium.
    """

    name = "rloo"
    paper = "arXiv 2402.14740"
    summary = "RLOO: REINFORCE on win rates among the policy's own answers, or on scores"
    settings = RLOOSettings

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("policy",) * self.options.answers

    @property
    def scored(self) -> bool:
        return self.options.reward == "score"

    def loss(self, batch: Plays) -> Tensor:
        if batch.rewards is not None:
            gains = _above_the_others(batch.rewards)
        else:
            # The diagonal, an answer against itself, is 1/2.
            gains = (batch.preferences.sum(-1) - 0.5) / (self.options.answers - 1) - 0.5
        advantages = gains - self.beta * _above_the_others(batch.log_ratios().detach())
        return -(advantages * batch.log_probs.sum(-1)).mean(-1)


def _above_the_others(values: Tensor) -> Tensor:
    """Each value minus the mean of the others in its row, shape (batch, k)."""
    return values - (values.sum(-1, keepdim=True) - values) / (values.shape[-1] - 1)
