"""Dr. DPO: the optimistic side of a KL ball around the pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openrlhf_sgpo.algorithms.kl_ball import KLBall
from openrlhf_sgpo.flags import setting


@dataclass
class DrDPOSettings:
    beta: float = setting(
        1.0, "temperature b' of the pairs' weights (large: DPO; at 1 or less, no finite policy is optimal)", above=0
    )
    window: int = setting(256, "number of latest margins whose losses set the scale of the weights", low=1)


class DrDPO(KLBall):
    r"""Pairs that the policy finds implausible count less (Wu et al., Dr. DPO, arXiv 2407.07880):

    min_theta  -b' log mean exp(-l / b')  =  min_Q { E_Q[l] + b' KL(Q || pairs) },        l = -log sigmoid(margin).

    The weight of a pair is exp(-l / b') = sigmoid(margin)^(1 / b'), divided by the mean over all pairs. Under preferences of
    Bradley and Terry the optimal margins are b' / (b' - 1) times DPO's if b' > 1, and infinite otherwise: with b' = 1 the
    objective is -log mean sigmoid(margin), which has the direction of ``sym_po``. As b' goes to infinity it is DPO.

    A mean over a micro-batch would make the loss depend on its size; this one follows the latest margins, see ``KLBall``.
    """

    name = "dr_dpo"
    paper = "arXiv 2407.07880"
    summary = "Dr. DPO: the best case of a KL ball, in which implausible pairs count less"
    settings = DrDPOSettings

    def __init__(self, options: Any, beta: float):
        super().__init__(options, beta, temperature=-options.beta)
