"""Conservative DPO: label smoothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openrlhf_sgpo.algorithms.base import PairAlgorithm, PairBatch
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


def cdpo_loss(margins: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m) per pair, any shape, e = label_smoothing, a number or one per pair
    (Mitchell, "A note on DPO with noisy preferences & relationship to IPO", 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3).
    e = 0 is ``dpo_loss``."""
    return (1 - label_smoothing) * dpo_loss(margins) + label_smoothing * dpo_loss(-margins)


@dataclass
class CDPOSettings:
    label_smoothing: float = setting(0.1, "assumed share of wrong labels e (0: DPO)", low=0, below=0.5)


class CDPO(PairAlgorithm):
    """One stage on the human pairs that takes each label to be right with probability 1 - e only.

    The loss of a pair has its minimum where sigmoid(m) = 1 - e, so no margin is driven to infinity.
    """

    name = "cdpo"
    paper = "ericmitchell.ai/cdpo.pdf"
    summary = "conservative DPO: label smoothing on the human pairs"
    settings = CDPOSettings

    def loss(self, batch: PairBatch) -> Tensor:
        return cdpo_loss(batch.margins(self.beta), self.options.label_smoothing)
