"""Iterative DPO: rounds whose answers are ranked by an external reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from openrlhf_sgpo.algorithms.base import Needs, PairAlgorithm, PairBatch
from openrlhf_sgpo.algorithms.dpo import dpo_loss

if TYPE_CHECKING:
    from torch import Tensor


class IterDPO(PairAlgorithm):
    """DPO's loss on answers ranked by a reward model (Xu et al., arXiv 2312.16682; the baseline of SPA and SSAPO).

    Round t starts from the policy of round t - 1, which is also the reference of the loss.
    """

    name = "iter_dpo"
    paper = "arXiv 2312.16682"
    summary = "Iterative DPO: rounds ranked by an external reward model"
    needs = Needs(rounds=True)
    defaults: ClassVar[dict[str, Any]] = {"oracle": "reward_model", "rounds.loss_reference": "previous"}

    def loss(self, batch: PairBatch) -> Tensor:
        return dpo_loss(batch.margins(self.beta))
