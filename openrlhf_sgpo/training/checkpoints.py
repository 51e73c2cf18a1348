"""DeepSpeed checkpoints of training that may be killed at any moment."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openrlhf_sgpo import ranks
from openrlhf_sgpo.run_folder import write_text

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import DeepspeedStrategy


RANKS = "ranks"


class Checkpoints:
    """Checkpoints ``step_N`` in ``folder``, written by OpenRLHF's strategy; the latest ``ckpt.max_num`` of them are kept."""

    def __init__(self, folder: Path, strategy: DeepspeedStrategy):
        self.folder = folder
        self.strategy = strategy

    def restore(self, engine: Any) -> dict[str, Any] | None:
        """Take up the latest whole checkpoint; returns the state that was saved with it, None if there is none. Collective.

        Raises ValueError if it was written by another number of ranks: each holds a share of the optimiser.
        """
        ranks.on_rank_0(self._check_ranks)
        if not ranks.from_rank_0(self.strategy.is_rank_0() and self._drop_half()):
            return None
        path, state = self.strategy.load_ckpt(engine, str(self.folder))
        return None if path is None else state

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Collective."""
        if self.strategy.is_rank_0():
            write_text(self.folder / RANKS, str(self.strategy.world_size))
        settings = self.strategy.args.ckpt
        # OpenRLHF makes room before it writes: with one more than asked for, the last whole checkpoint stays meanwhile.
        self.strategy.save_ckpt(engine, str(self.folder), f"step_{step}", settings.max_num + 1, settings.max_mem, state)

    def _check_ranks(self) -> None:
        path, now = self.folder / RANKS, self.strategy.world_size
        if path.exists() and int(path.read_text()) != now:
            raise ValueError(
                f"--resume on {now} ranks, but {self.folder} was written by {path.read_text()}; start as many again"
            )

    def _drop_half(self) -> bool:
        """Whether there is a whole checkpoint. One that a killed process was writing is later than the latest whole one; it
        would count when OpenRLHF makes room, and the whole one would go."""
        latest = self.folder / "latest"
        last = int(latest.read_text().removeprefix("step_")) if latest.exists() else -1
        for folder in self.folder.glob("step_*"):
            if int(folder.name.removeprefix("step_")) > last:
                shutil.rmtree(folder)
        return last >= 0
