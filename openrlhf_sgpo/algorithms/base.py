"""What an algorithm tells the loop, and what the loop hands back to it.

An algorithm is one file: its settings (a dataclass, so also its flags), what it needs, and its loss, a pure function of
tensors that returns one value per sample. The loop samples, ranks, measures margins, batches, reduces and steps. There are
two kinds, with the same hooks: a ``PairAlgorithm`` learns from pairs that are stored before a stage begins, a
``PlayAlgorithm`` (``plays.py``) from answers that are sampled and judged in every step.
This module and the settings of every algorithm import without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.data.records import Pair
    from openrlhf_sgpo.data.tokens import ChatFormat

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Needs:
    """What the loop must provide.

    rounds: the algorithm is made for rounds; one that learns from pairs then begins with a seed stage of DPO (False: one
    stage on the human pairs, unless ``--rounds.count`` asks for rounds; then the seed stage has the algorithm's loss too).
    samples_per_prompt: the fewest responses per prompt that a round of self-annotated pairs must sample.
    reference: the loss is relative to a reference (False: the reference's log-probabilities are 0 everywhere, and there are no
    rounds).
    """

    rounds: bool = False
    samples_per_prompt: int = 2
    reference: bool = True


@dataclass(frozen=True)
class Stage:
    """The stage of training that begins.

    margins: of all its pairs, shape (N,) on the CPU, under the reference and beta of the loss; None where there are no stored
    pairs. number: 0 for the seed, then the round. steps: optimiser steps it takes. seed: decides what is random.
    """

    margins: Tensor | None = None
    number: int = 1
    steps: int = 1
    seed: int = 0


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of pairs. Log-probabilities are of shape (batch,) and summed over response tokens.

    index: position of each pair among the pairs given to ``begin_stage``, so that an algorithm can look up what it
    stored per pair, on the CPU; None where the data loader is not the package's own.
    chosen_length, rejected_length: response tokens, shape (batch,); None in a drop-in loss.
    extrapolated_chosen, extrapolated_rejected: detached log-probabilities under the extrapolated logits that
    ``Algorithm.extrapolation`` asks for; None where it is 0.
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

    def margins(self, beta: float) -> Tensor:
        """Implicit-reward margins, shape (batch,): beta * [(log-ratio of chosen) - (log-ratio of rejected)]."""
        policy = self.policy_chosen - self.policy_rejected
        return beta * (policy - (self.reference_chosen - self.reference_rejected))


@dataclass
class NoSettings:
    """Settings of an algorithm that has none of its own."""


class Algorithm(Generic[Batch]):
    """Base of both kinds; hooks are named after the moment at which the loop calls them. Every stage has an instance of its
    own.

    Class attributes: ``name`` (flag value and flag group), ``paper``, ``summary``, ``settings`` (a dataclass type),
    ``needs``, ``defaults`` (shared settings whose default is another one here, by flag name), ``fresh_answers`` (whether
    answers are sampled and judged in every step, so there are no stored pairs and no seed stage), ``mixes`` (whether some
    answers come from a mixture of policy and reference, from which transformers samples whatever the engine).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    settings: ClassVar[type] = NoSettings
    needs: ClassVar[Needs] = Needs()
    defaults: ClassVar[dict[str, Any]] = {}
    fresh_answers: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    def __init__(self, options: Any, beta: float):
        self.options = options
        self.beta = beta

    @classmethod
    def check(cls, options: Any) -> list[str]:
        """Problems with a combination of settings, each naming its flag; empty when all is well. Needs no torch."""
        return []

    def problems(self, config: Config) -> list[str]:
        """Problems of the algorithm's settings with the shared ones, each naming its flag; empty when all is well."""
        return []

    @classmethod
    def pairs(cls, pairs: Sequence[Pair], chat: ChatFormat) -> Sequence[Pair]:
        """What is trained and evaluated on in place of the pairs of the data, where the two differ."""
        return pairs

    def begin_stage(self, stage: Stage) -> dict[str, Any]:
        """Called once before a stage's training. Returns what to store as the stage's certificate (JSON-serialisable), empty if
        there is none."""
        return {}

    def loss(self, batch: Batch) -> Tensor:
        """Loss of each sample, shape (batch,). Never reduced here."""
        raise NotImplementedError

    def watched(self, batch: Batch) -> Tensor:
        """What ``after_step`` is to see of each sample, shape (batch,)."""
        raise NotImplementedError

    def after_step(self, watched: Tensor) -> dict[str, Any]:
        """Called after each optimiser step with ``watched`` of the step's samples over all ranks, shape (train.batch_size,),
        detached, on the CPU. Returns metrics to log, by name."""
        return {}

    def resting(self, step: int) -> tuple[str, ...]:
        """LoRA adapters that stay as they are in this step."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What ``after_step`` has changed since ``begin_stage``, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; called after ``begin_stage`` when a stage goes on from a checkpoint."""


class PairAlgorithm(Algorithm[PairBatch]):
    """Base of the algorithms that learn from stored pairs: human ones, and those that rounds annotate."""

    # Where this is lambda > 0 after begin_stage, batches carry the log-probabilities under softmax of
    # (1 + lambda) * (logits of the policy) - lambda * (logits of the loss's reference). It costs a forward pass of both.
    extrapolation: float = 0.0

    def watched(self, batch: PairBatch) -> Tensor:
        """Margins."""
        return batch.margins(self.beta)


__all__ = ["Algorithm", "Needs", "NoSettings", "PairAlgorithm", "PairBatch", "Stage"]
