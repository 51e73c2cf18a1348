"""A pairwise preference model, trained from pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from openrlhf_sgpo.algorithms.base import Needs, PairAlgorithm, PairBatch
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.data.pairwise import LETTERS, fitted
from openrlhf_sgpo.data.records import Pair

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.data.tokens import ChatFormat


ORDERS = ("chosen_first", "rejected_first")


class PreferenceModel(PairAlgorithm):
    """Trains the chat model to name the better of two answers, for the oracle ``preference_model``.

    Each pair is shown in both orders. With c the letter of the chosen answer and o the other letter, the loss is
    -log sigmoid(log pi(c|..) - log pi(o|..)): the cross-entropy of the two letters. There is no reference, and a margin is
    the log-odds. (Pairwise models that answer with a letter: Zhao et al., arXiv 2305.10425; Dong et al., arXiv
    2405.07863, whose cross-entropy is over the whole vocabulary and whose order is random.)
    """

    name = "preference_model"
    paper = "arXiv 2405.07863"
    summary = "a pairwise model for --oracle preference_model, from the human pairs in both orders"
    needs = Needs(reference=False)
    defaults: ClassVar[dict[str, Any]] = {"model.beta": 1.0}

    @classmethod
    def drop_in_problems(cls, options: Any) -> list[str]:
        return [f"--algo {cls.name} trains on pairs of its own making; use openrlhf-sgpo train"]

    @classmethod
    def pairs(cls, pairs: Sequence[Pair], chat: ChatFormat) -> list[Pair]:
        """Each pair as two comparisons, whose responses are the letters, without an end of turn."""
        comparisons = []
        for pair in pairs:
            both = fitted(pair.prompt, pair.chosen, pair.rejected, chat, pair.template_kwargs.get("tools", ()))
            for order, messages, right, wrong in zip(ORDERS, both, LETTERS, LETTERS[::-1], strict=True):
                comparisons.append(
                    replace(
                        pair,
                        id=f"{pair.id}/{order}",
                        prompt=messages,
                        chosen=right,
                        rejected=wrong,
                        chosen_truncated=True,
                        rejected_truncated=True,
                        template_kwargs={},  # the comparison has the tools as text
                    )
                )
        return comparisons

    def loss(self, batch: PairBatch) -> Tensor:
        return dpo_loss(batch.margins(1.0))
