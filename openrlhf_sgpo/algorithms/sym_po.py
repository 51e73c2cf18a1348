"""SymPO with the sigmoid: a bounded loss that label flips at random leave as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openrlhf_sgpo.algorithms.base import PairAlgorithm, PairBatch
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


def sym_po_loss(chosen: Tensor, rejected: Tensor, clip: float) -> Tensor:
    """sigmoid(r' - r) per pair, with the rewards r = ``chosen`` and r' = ``rejected``, same shape, clipped to [-clip, clip]
    (Nishimori et al., SymPO, arXiv 2505.24709, with the sigmoid as the symmetric loss).

    A clipped reward has no gradient. The losses of a pair under both labels sum to 1, so with labels that are wrong at a rate
    e the expected loss is (1 - 2 e) times the clean one, plus e: flips at random do not move its minimum.
    """
    return (rejected.clamp(-clip, clip) - chosen.clamp(-clip, clip)).sigmoid()


@dataclass
class SymPOSettings:
    clip: float = setting(10.0, "implicit rewards are clipped to plus or minus this", above=0)


class SymPO(PairAlgorithm):
    """One stage on the human pairs that counts wrongly ranked pairs, softly.

    No finite policy is optimal: the loss of a pair falls until the clip stops it, and all that flips cannot change is the
    order of the answers. A pair that is ranked wrongly by far has hardly a gradient, unlike DPO's.
    """

    name = "sym_po"
    paper = "arXiv 2505.24709"
    summary = "SymPO with the sigmoid: a bounded loss whose minimum flips at random do not move"
    settings = SymPOSettings

    def loss(self, batch: PairBatch) -> Tensor:
        chosen = self.beta * (batch.policy_chosen - batch.reference_chosen)
        rejected = self.beta * (batch.policy_rejected - batch.reference_rejected)
        return sym_po_loss(chosen, rejected, self.options.clip)
