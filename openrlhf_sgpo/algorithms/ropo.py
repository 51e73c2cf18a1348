"""ROPO's noise-tolerant loss: DPO's, plus a bounded part that uncertain pairs cannot dominate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openrlhf_sgpo.algorithms.base import PairAlgorithm, PairBatch
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


def ropo_loss(margins: Tensor, alpha: float) -> Tensor:
    """4 a / (1 + a)^2 [ -log sigmoid(m) + a sigmoid(-m) ] per pair, any shape, a = alpha (Liang et al., ROPO, arXiv
    2404.04102).

    With u = sigmoid(-m), the slope is -4 a / (1 + a)^2 u [1 + a (1 - u)]. For a >= 1 it is steepest, and exactly -1, where
    u = (1 + a) / (2 a): a pair whose label the policy disbelieves by more than that pulls less, down to 4 a / (1 + a)^2.
    Divided by its factor, the loss is ``dpo_loss`` at a = 0; the part with the sigmoid sums to a constant over both labels,
    so flips at random do not move its minimum.
    """
    return 4 * alpha / (1 + alpha) ** 2 * (dpo_loss(margins) + alpha * (-margins).sigmoid())


@dataclass
class ROPOSettings:
    alpha: float = setting(14.0, "weight of the bounded part, relative to DPO's loss", above=0)


class ROPO(PairAlgorithm):
    """One stage on the human pairs with a loss whose gradient falls off where the policy doubts the label.

    This is the loss alone. The paper also drops the pairs with the largest losses between iterations and samples new answers
    for them; this package does neither.
    """

    name = "ropo"
    paper = "arXiv 2404.04102"
    summary = "ROPO's noise-tolerant loss: DPO's plus a bounded one"
    settings = ROPOSettings

    def loss(self, batch: PairBatch) -> Tensor:
        return ropo_loss(batch.margins(self.beta), self.options.alpha)
