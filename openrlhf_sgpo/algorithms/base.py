"""What an algorithm tells the round loop, and what the loop hands back to it.

An algorithm is one file: its settings (a dataclass, so also its flags), what it needs, and its loss, a pure function of
tensors that returns one value per sample. The loop samples, ranks, measures margins, batches, reduces and steps.
This module and the settings of every algorithm import without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Needs:
    """What the loop must provide.

    rounds: the algorithm samples its own data after the seed stage (False: one stage on the human pairs).
    samples_per_prompt: the fewest responses per prompt that a round must sample.
    """

    rounds: bool = False
    samples_per_prompt: int = 0


@dataclass(frozen=True)
class PairBatch:
    """Log-probabilities of one micro-batch of pairs, all of shape (batch,), summed over response tokens.

    index: position of each pair among the pairs given to ``begin_stage``, so that an algorithm can look up what it
    stored per pair, on the CPU; None where the data loader is not the package's own.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    index: Tensor | None = None

    def margins(self, beta: float) -> Tensor:
        """Implicit-reward margins, shape (batch,): beta * [(log-ratio of chosen) - (log-ratio of rejected)]."""
        policy = self.policy_chosen - self.policy_rejected
        return beta * (policy - (self.reference_chosen - self.reference_rejected))


@dataclass
class NoSettings:
    """Settings of an algorithm that has none of its own."""


class Algorithm:
    """Base of every algorithm; hooks are named after the moment at which the trainer calls them.

    Class attributes: ``name`` (flag value and flag group), ``paper``, ``summary``, ``settings`` (a dataclass type),
    ``needs``.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    settings: ClassVar[type] = NoSettings
    needs: ClassVar[Needs] = Needs()

    def __init__(self, options: Any, beta: float):
        self.options = options
        self.beta = beta

    @classmethod
    def check(cls, options: Any) -> list[str]:
        """Problems with a combination of settings, each naming its flag; empty when all is well. Needs no torch."""
        return []

    def begin_stage(self, margins: Tensor, seed: int = 0) -> dict[str, Any]:
        """Called once before a round's training with the margins of all its pairs, shape (N,) on the CPU, under the
        reference and beta of the loss; ``seed`` decides what is random. Returns what to store as the round's certificate
        (JSON-serialisable), empty if there is none."""
        return {}

    def loss(self, batch: PairBatch) -> Tensor:
        """Loss of each pair, shape (batch,). Never reduced here."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What ``after_step`` has changed since ``begin_stage``, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; called after ``begin_stage`` when training goes on from a checkpoint."""

    def after_step(self, margins: Tensor) -> dict[str, Any]:
        """Called after each optimiser step with the step's margins over all ranks, shape (train.batch_size,), detached.
        Returns metrics to log, by name."""
        return {}


__all__ = ["Algorithm", "Needs", "NoSettings", "PairBatch"]
