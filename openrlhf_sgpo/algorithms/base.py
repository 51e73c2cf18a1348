"""The interface between an algorithm and the loop.

An algorithm is one file: its settings (a dataclass, so also its flags), its needs, and its loss, a pure function of tensors
that returns one value per sample. The loop samples, ranks, measures margins, batches, reduces and steps. There are two kinds
with the same hooks: a ``PairAlgorithm`` learns from pairs stored before a stage begins, a ``PlayAlgorithm`` (``plays.py``) from
answers sampled and judged in every step. This module and the settings of every algorithm import without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.data.records import Pair
    from openrlhf_sgpo.data.tokens import ChatFormat

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Needs:
    """What the algorithm needs from the loop.

    rounds: the algorithm is designed for rounds; if it learns from pairs, it begins with a seed stage of DPO (False: one stage
    on the human pairs; with ``--rounds.count`` there are rounds, and the seed stage uses the algorithm's loss too).
    samples_per_prompt: the minimum number of responses per prompt in a round of self-annotated pairs.
    reference: the loss is relative to a reference (False: all reference log-probabilities are 0, and there are no rounds).
    """

    rounds: bool = False
    samples_per_prompt: int = 2
    reference: bool = True


@dataclass(frozen=True)
class Stage:
    """A stage of training.

    margins: of all its pairs, shape (N,), on the CPU, under the reference and beta of the loss; None without stored pairs.
    number: 0 for the seed stage, otherwise the round. steps: number of optimiser steps. seed: of everything random.
    """

    margins: Tensor | None = None
    number: int = 1
    steps: int = 1
    seed: int = 0


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of pairs. Log-probabilities have shape (batch,) and are summed over response tokens.

    index: position of each pair among those given to ``begin_stage``, on the CPU, to look up what the algorithm stored per
    pair; None with another data loader than this package's.
    chosen_length, rejected_length: response tokens, shape (batch,); None in a drop-in loss.
    extrapolated_chosen, extrapolated_rejected: detached log-probabilities under the extrapolated logits, see
    ``PairAlgorithm.extrapolation``; None if it is 0.
    embeddings: input embeddings of (prompt, chosen) and (prompt, rejected) of each pair in turn, shape (2 * batch, T, D), from
    which the policy's log-probabilities were computed; None unless the algorithm ``reads_embeddings``.
    weight, chosen_probability: of the pairs, shape (batch,); None if all are 1. The trainer applies them to the loss.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    index: Tensor | None = None
    chosen_length: Tensor | None = None
    rejected_length: Tensor | None = None
    extrapolated_chosen: Tensor | None = None
    extrapolated_rejected: Tensor | None = None
    embeddings: Tensor | None = None
    weight: Tensor | None = None
    chosen_probability: Tensor | None = None

    def margins(self, beta: float) -> Tensor:
        """Implicit-reward margins, shape (batch,): beta * [(log-ratio of chosen) - (log-ratio of rejected)]."""
        policy = self.policy_chosen - self.policy_rejected
        return beta * (policy - (self.reference_chosen - self.reference_rejected))

    def swapped(self) -> PairBatch:
        """The same pairs with the opposite labels, whose margins have the opposite signs."""
        return replace(
            self,
            policy_chosen=self.policy_rejected,
            policy_rejected=self.policy_chosen,
            reference_chosen=self.reference_rejected,
            reference_rejected=self.reference_chosen,
            chosen_length=self.rejected_length,
            rejected_length=self.chosen_length,
            extrapolated_chosen=self.extrapolated_rejected,
            extrapolated_rejected=self.extrapolated_chosen,
        )


@dataclass
class NoSettings:
    """For algorithms without settings."""


class Algorithm(Generic[Batch]):
    """Base class of both kinds; hooks are named after when the loop calls them. Every stage has a new instance.

    Class attributes: ``name`` (flag value and flag group), ``paper``, ``summary``, ``settings`` (a dataclass type),
    ``needs``, ``defaults`` (defaults of shared settings for this algorithm, by flag name), ``fresh_answers`` (whether answers
    are sampled and judged in every step, so there are no stored pairs and no seed stage), ``extragradient`` (whether steps come
    in pairs: the first only finds the point at which the second takes its gradient, and the second begins where the first
    began).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    settings: ClassVar[type] = NoSettings
    needs: ClassVar[Needs] = Needs()
    defaults: ClassVar[dict[str, Any]] = {}
    fresh_answers: ClassVar[bool] = False
    extragradient: ClassVar[bool] = False

    def __init__(self, options: Any, beta: float):
        self.options = options
        self.beta = beta

    @property
    def roles(self) -> tuple[str, ...]:
        """The role that gives each answer of a step, in order; none if the algorithm learns from stored pairs."""
        return ()

    @property
    def shares(self) -> dict[Any, float]:
        """The reference's share in the mixture that answers, by role; without roles whose answers are the policy's own."""
        return {}

    @property
    def follower_prompt(self) -> str:
        """The instruction for the role ``follower``, after prompt and draft."""
        return ""

    @property
    def reference_rounds(self) -> int:
        """Rounds after which the policy of that moment becomes the reference (0: it stays the initial one)."""
        return 0

    @classmethod
    def option_problems(cls, options: Any) -> list[str]:
        """Problems with a combination of settings, each naming its flag; empty if there are none. Needs no torch."""
        return []

    def problems(self, config: Config) -> list[str]:
        """Problems between the algorithm's settings and the shared ones, each naming its flag; empty if there are none."""
        return []

    @classmethod
    def pairs(cls, pairs: Sequence[Pair], chat: ChatFormat) -> Sequence[Pair]:
        """The pairs to train and evaluate on, made from those of the data; by default the same."""
        return pairs

    @property
    def coupled(self) -> bool:
        """Whether the loss of a sample depends on the others in its micro-batch, which then always has
        ``--train.micro_batch_size``."""
        return False

    def begin_stage(self, stage: Stage) -> dict[str, Any]:
        """Called once before a stage is trained. Returns the stage's certificate (JSON-serialisable), empty if there is
        none."""
        return {}

    def loss(self, batch: Batch) -> Tensor:
        """Loss of each sample, shape (batch,), not reduced."""
        raise NotImplementedError

    def watched(self, batch: Batch) -> Tensor:
        """The value of each sample that ``after_step`` gets, shape (batch,)."""
        raise NotImplementedError

    def after_step(self, watched: Tensor) -> dict[str, Any]:
        """Called after each optimiser step with the ``watched`` values of the step's samples from all ranks, shape
        (train.batch_size,), detached, on the CPU. Returns metrics to log, by name."""
        return {}

    def resting(self, step: int) -> tuple[str, ...]:
        """LoRA adapters that this step leaves unchanged."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: everything that ``after_step`` has changed since ``begin_stage``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; called after ``begin_stage`` if a stage resumes from a checkpoint."""


class PairAlgorithm(Algorithm[PairBatch]):
    """Base class of algorithms that learn from stored pairs: human pairs, and those annotated in rounds.

    Class attributes: ``label_columns``, columns of the data (``weight``, ``chosen_probability``) that the trainer may apply to
    the loss. They have no meaning where the loss of a pair depends on other pairs, or on which label is the right one.
    ``reads_embeddings``: the loss differentiates by ``PairBatch.embeddings``.
    """

    label_columns: ClassVar[tuple[str, ...]] = ("weight", "chosen_probability")
    reads_embeddings: ClassVar[bool] = False

    # If this is lambda > 0 after begin_stage, batches have the log-probabilities under softmax of
    # (1 + lambda) * (logits of the policy) - lambda * (logits of the loss's reference), for one more forward pass of each.
    extrapolation: float = 0.0

    @classmethod
    def drop_in_problems(cls, options: Any) -> list[str]:
        """Problems with these settings in the trainers of others, where a stage begins without margins and pairs have no
        index; each names its flag."""
        return cls.option_problems(options)

    def watched(self, batch: PairBatch) -> Tensor:
        """Margins."""
        return batch.margins(self.beta)


__all__ = ["Algorithm", "Needs", "NoSettings", "PairAlgorithm", "PairBatch", "Stage"]
