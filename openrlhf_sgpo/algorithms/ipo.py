"""Identity Preference Optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from openrlhf_sgpo.algorithms.base import PairAlgorithm, PairBatch
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


def ipo_loss(differences: Tensor, tau: float) -> Tensor:
    """(h - 1 / (2 tau))^2 per pair, any shape (Azar et al., arXiv 2310.12036, eq. 17), with
    h = (log-ratio of chosen) - (log-ratio of rejected), not multiplied by beta."""
    return (differences - 1 / (2 * tau)) ** 2


@dataclass
class IPOSettings:
    normalization: Literal["sum", "mean"] = setting(
        "sum",
        "sum: log-ratios of whole responses (the paper); mean: each divided by its response's length (TRL's DPOTrainer); "
        "the same --model.beta has a different strength under each",
    )


class IPO(PairAlgorithm):
    """One stage on the human pairs that regresses the difference of log-ratios on 1 / (2 tau), tau = ``--model.beta``.

    With deterministic labels DPO's loss has no minimum; this loss has one at a finite difference. The difference is in nats per
    token with normalization ``mean`` and in nats with ``sum``, so a value of tau for one does not suit the other.
    """

    name = "ipo"
    paper = "arXiv 2310.12036"
    summary = "Identity Preference Optimization on the human pairs"
    settings = IPOSettings

    def loss(self, batch: PairBatch) -> Tensor:
        """Raises ValueError if normalization is ``mean`` and the batch has no response lengths."""
        return ipo_loss(self._differences(batch), self.beta)

    def _differences(self, batch: PairBatch) -> Tensor:
        if self.options.normalization == "sum":
            return batch.margins(1.0)
        if batch.chosen_length is None or batch.rejected_length is None:
            raise ValueError(
                "--ipo.normalization mean needs the lengths of the responses, which this batch does not have; use sum, or "
                "give PairBatch chosen_length and rejected_length"
            )
        chosen = (batch.policy_chosen - batch.reference_chosen) / batch.chosen_length
        return chosen - (batch.policy_rejected - batch.reference_rejected) / batch.rejected_length
