"""KLDPO: the pessimistic side of a KL ball around the pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openrlhf_sgpo.algorithms.kl_ball import KLBall
from openrlhf_sgpo.flags import setting


@dataclass
class KLDPOSettings:
    tau: float = setting(1.0, "temperature of the pairs' weights (large: DPO)", above=0)
    max_weight: float = setting(10.0, "largest weight of a pair", above=1)
    window: int = setting(256, "number of latest margins whose losses set the scale of the weights", low=1)


class KLDPO(KLBall):
    r"""Pairs with large losses count more (Xu et al., KLDPO, arXiv 2502.01930):

    min_theta  max_Q { E_Q[l] - tau KL(Q || pairs) : no weight above max_weight },        l = -log sigmoid(margin).

    Weights are min(exp((l - c) / tau), max_weight), with c such that their mean over all pairs is 1; without the cap, the
    objective is tau log mean exp(l / tau). Under preferences of Bradley and Terry its optimal margins are then
    tau / (tau + 1) times DPO's. As tau goes to infinity it is DPO.

    The authors' code (TheBlackCat22/distributionally_robust_dpo) has the mean loss of a batch in place of c. Below the cap
    that multiplies all weights by the same number, which is above 1.
    """

    name = "kl_dpo"
    paper = "arXiv 2502.01930"
    summary = "KLDPO: the worst case of a KL ball, in which pairs with large losses count more"
    settings = KLDPOSettings
    label_columns = ()  # which pairs are at the cap depends on all losses, and counts every margin once

    def __init__(self, options: Any, beta: float):
        super().__init__(options, beta, options.tau, options.max_weight)
