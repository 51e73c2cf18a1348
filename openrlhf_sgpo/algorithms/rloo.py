"""RLOO: REINFORCE with the other answers to the prompt as baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Plays, Role
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RLOOSettings:
    answers: int = setting(2, "answers per prompt", low=2)


class RLOO(PlayAlgorithm):
    """REINFORCE on k answers per prompt (Ahmadian et al., arXiv 2402.14740), with the win rate among them as reward:

        -(1/k) sum_i [ (r_i - 1/2) - tau * (s_i - mean_{j != i} s_j) ] * log pi(y_i),   r_i = mean_{j != i} p(y_i > y_j),

    tau = ``--model.beta``, the bracket held fixed. The baseline of the divergence is the leave-one-out mean. That of the win
    rates is 1/2, their exact mean: mean_{j != i} r_j depends on y_i, and would count the preference
    k / (k - 1) times. The fixed point is the regularised Nash equilibrium.
    """

    name = "rloo"
    paper = "arXiv 2402.14740"
    summary = "RLOO: REINFORCE on win rates among the policy's own answers"
    settings = RLOOSettings

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("policy",) * self.options.answers

    def loss(self, batch: Plays) -> Tensor:
        count = self.options.answers
        # The diagonal, an answer against itself, is 1/2.
        rewards = (batch.preferences.sum(-1) - 0.5) / (count - 1)
        ratios = batch.log_ratios().detach()
        others = (ratios.sum(-1, keepdim=True) - ratios) / (count - 1)
        advantages = (rewards - 0.5) - self.beta * (ratios - others)
        return -(advantages * batch.log_probs.sum(-1)).mean(-1)
