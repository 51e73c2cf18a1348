"""Direct Preference Optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openrlhf_sgpo.algorithms.base import PairAlgorithm, PairBatch

if TYPE_CHECKING:
    from torch import Tensor


def dpo_loss(margins: Tensor) -> Tensor:
    """-log sigmoid(margin) per pair, any shape (Rafailov et al., arXiv 2305.18290, eq. 7, with
    margin = beta * [(log-ratio of chosen) - (log-ratio of rejected)])."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(margins)


class DPO(PairAlgorithm):
    """One stage of supervised preference training on the human pairs; no sampling, no rounds."""

    name = "dpo"
    paper = "arXiv 2305.18290"
    summary = "Direct Preference Optimization on the human pairs"

    def loss(self, batch: PairBatch) -> Tensor:
        return dpo_loss(batch.margins(self.beta))
