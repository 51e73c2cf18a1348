"""Provably robust DPO: an unbiased estimate of DPO's loss from noisy labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openrlhf_sgpo.algorithms.base import PairAlgorithm, PairBatch
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


def rdpo_loss(margins: Tensor, flip_rate: float) -> Tensor:
    """[(1 - e) l(m) - e l(-m)] / (1 - 2 e) per pair, any shape, with l(m) = -log sigmoid(m) and e = flip_rate
    (Chowdhury et al., "Provably Robust DPO", arXiv 2403.00409). e = 0 is ``dpo_loss``."""
    return ((1 - flip_rate) * dpo_loss(margins) - flip_rate * dpo_loss(-margins)) / (1 - 2 * flip_rate)


@dataclass
class RDPOSettings:
    flip_rate: float = setting(0.1, "known share of swapped labels, e (0: DPO)", low=0, below=0.5)


class RDPO(PairAlgorithm):
    """One stage on human pairs whose labels are swapped at random at a known rate e.

    In expectation over the swaps the loss is DPO's loss on the true labels. On a single pair it falls without bound as the
    margin grows, unlike DPO's: it is an estimate, not a penalty.
    """

    name = "rdpo"
    paper = "arXiv 2403.00409"
    summary = "provably robust DPO: unbiased under labels flipped at a known rate"
    settings = RDPOSettings

    def loss(self, batch: PairBatch) -> Tensor:
        return rdpo_loss(batch.margins(self.beta), self.options.flip_rate)
