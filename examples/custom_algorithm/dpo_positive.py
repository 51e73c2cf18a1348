"""DPO-Positive: DPO that does not let the chosen response become less likely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openrlhf_sgpo.algorithms import PairAlgorithm
from openrlhf_sgpo.algorithms.base import PairBatch
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


def dpop_loss(batch: PairBatch, beta: float, penalty: float) -> Tensor:
    """-log sigmoid(beta * (h - penalty * max(0, log ref(y_w) - log pi(y_w)))) per pair, shape (batch,), with
    h = (log-ratio of chosen) - (log-ratio of rejected) (Pal et al., arXiv 2402.13228). Penalty 0 is DPO."""
    from torch.nn.functional import logsigmoid

    lost = (batch.reference_chosen - batch.policy_chosen).clamp(min=0)
    return -logsigmoid(batch.margins(beta) - beta * penalty * lost)


@dataclass
class DPOPositiveSettings:
    penalty: float = setting(
        5.0, "lambda: weight of the log-probability that the chosen response has lost (0: DPO)", low=0
    )


class DPOPositive(PairAlgorithm):
    """One stage on the human pairs, as ``PairAlgorithm.needs`` says by default."""

    name = "dpop"
    paper = "arXiv 2402.13228"
    summary = "DPO-Positive: the chosen response must not become less likely"
    settings = DPOPositiveSettings

    def loss(self, batch: PairBatch) -> Tensor:
        return dpop_loss(batch, self.beta, self.options.penalty)
