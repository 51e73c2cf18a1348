"""INPO: no-regret self-play by regression, without win rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from openrlhf_sgpo.algorithms.online_ipo import soft_ipo_loss
from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Plays, Role
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class INPOSettings:
    inverse_step: float = setting(
        0.0075, "eta, the inverse step size of a round's mirror step; must be larger than --model.beta", above=0
    )


class INPO(PlayAlgorithm):
    """Iterative Nash policy optimisation (Zhang et al., arXiv 2407.00617), tau = ``--model.beta``, eta = ``inverse_step``:

        h = log pi(y)/pi(y') - (tau/eta) log ref(y)/ref(y') - (1 - tau/eta) log pi_t(y)/pi_t(y')

    is regressed on (p(y > y') - 1/2) / eta for two answers of pi_t, the policy at the start of the round. The round's
    solution is pi_{t+1} proportional to ref^(tau/eta) pi_t^(1 - tau/eta) exp(p(y > pi_t) / eta), whose last iterate
    converges to the regularised Nash equilibrium at tau. Deterministic preferences (0 or 1) give the paper's (h - 1/(2 eta))^2.
    """

    name = "inpo"
    paper = "arXiv 2407.00617"
    summary = "INPO: no-regret self-play by regression on preferences"
    settings: ClassVar[type] = INPOSettings
    models = ("reference", "previous")
    defaults: ClassVar[dict[str, Any]] = {"model.beta": 0.0025, "rollout.temperature": 1.0}
    steps_per_sync = 0

    def __init__(self, options: INPOSettings, beta: float):
        super().__init__(options, beta)
        if beta >= options.inverse_step:
            raise ValueError(
                f"--{self.name}.inverse_step {options.inverse_step} must be larger than --model.beta {beta}: the weight of the "
                "previous policy, 1 - beta / inverse_step, would not be positive"
            )

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("previous", "previous")

    def loss(self, batch: Plays) -> Tensor:
        share = self.beta / self.options.inverse_step
        anchored = batch.log_probs - share * batch.reference - (1 - share) * batch.previous
        first, second = anchored.sum(-1).unbind(-1)
        return soft_ipo_loss(first - second, batch.preferences[:, 0, 1], self.options.inverse_step)
