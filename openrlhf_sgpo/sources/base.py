"""Where the batches of a stage of training come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from openrlhf_sgpo.training.trainer import Trainer, TrainingStage

if TYPE_CHECKING:
    from openrlhf_sgpo.run import Run


class Source:
    """Base of both sources. Methods stand in the order in which the loop calls them. All are collective.

    Class attributes: ``training``, the name of the stage in which steps are taken; ``shown``, metrics beside the progress bar
    by their short names; ``trains_first``, whether the first round is trained before the start is evaluated, since it needs no
    engine, and engines start meanwhile; ``follows_policy``, whether batches are sampled from the policy that steps leave.
    """

    training: ClassVar[str]
    shown: ClassVar[dict[str, str]]
    trains_first: ClassVar[bool]
    follows_policy = False

    def __init__(self, run: Run):
        """Raises ValueError if data is too little for a stage. The run is not open yet."""
        self.run = run
        self.config = run.config
        self.folder = run.folder

    @property
    def numbers(self) -> Sequence[int]:
        """Of the rounds, in their order."""
        raise NotImplementedError

    def plan(self) -> list[str]:
        """All stages of the run in their order, by their names in the ledger."""
        raise NotImplementedError

    def open(self) -> None:
        """The run is open and begins, or goes on."""

    def prepare(self, number: int) -> None:
        """Make what the round trains on, in stages of their own."""

    def begin(self, number: int) -> TrainingStage:
        """What is trained in a round. The algorithm has begun the stage."""
        raise NotImplementedError

    def restore(self, stage: TrainingStage, trainer: Trainer, step: int) -> None:
        """Training goes on after ``step``."""

    def batch(self, step: int) -> Any:
        """This rank's samples of a step, which count from 1: a sequence that slices."""
        raise NotImplementedError

    def record(self, step: int, recorded: Tensor) -> dict[str, float]:
        """Store what a step has recorded (see ``Trainer.step``), if the source keeps it; returns further metrics."""
        return {}

    def sync(self) -> None:
        """The next batch to begin with is sampled from the weights that were just trained."""

    def ahead(self) -> Any:
        """What there is already of the next step's batch, for a checkpoint."""

    def measure(self, stage: TrainingStage, trainer: Trainer) -> None:
        """All steps are taken: measure what needs the policy while it is in memory."""

    def files(self, number: int) -> list[str]:
        """Files and folders that the training of a round has left in the round's folder."""
        raise NotImplementedError

    def end(self, number: int) -> None:
        """The training of a round is recorded as finished, now or by a process before this one."""

    def results(self, number: int) -> dict[str, Any]:
        """Further figures of a round for the results table. Asked on rank 0 alone, which has the files."""
        return {}

    def finish(self) -> None:
        """All rounds are done, and their results are written."""
