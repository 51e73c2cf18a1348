"""DeepSpeed checkpoints. Training may be killed at any moment, and files may be damaged or replaced before it resumes."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from openrlhf_sgpo import ranks, shared_files
from openrlhf_sgpo.output import say
from openrlhf_sgpo.run_folder import read_json, write_json, write_text

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import DeepspeedStrategy


RANKS = "ranks"
DIGESTS = "digests.json"


class Checkpoints:
    """Checkpoints ``step_N`` in ``folder``, written by OpenRLHF's strategy; the latest ``ckpt.max_num + 1`` of them are kept.

    Each has ``digests.json`` with the digest of every other file in it, written last. DeepSpeed's files are pickles, which run
    code when they are read, so a file is read only if its digest matches.
    """

    def __init__(self, folder: Path, strategy: DeepspeedStrategy):
        self.folder = folder
        self.strategy = strategy
        self._latest: int | None = None  # checked or written by this process

    def latest(self) -> int:
        """The step of the latest checkpoint that is whole, 0 if there is none. Later ones are deleted, and a line says why.
        Collective.

        Raises ValueError if they were written by another number of ranks: each holds a share of the optimiser.
        """
        if self._latest is not None:
            return self._latest
        ranks.on_rank_0(self._check_ranks)
        self._latest, problems = 0, []
        for step in ranks.on_rank_0(self._steps):
            if not (problem := self._problem(step)):
                self._latest = step
                break
            problems.append(problem)
            # It would count when OpenRLHF makes room, and a whole one would go.
            if self.strategy.is_rank_0():
                shutil.rmtree(self.folder / f"step_{step}")
        if problems and self.strategy.is_rank_0():
            where = f"from the checkpoint of step {self._latest}" if self._latest else "from the beginning"
            say(f"{'; '.join(problems)}: training goes on {where}")
        return self._latest

    def restore(self, engine: Any) -> dict[str, Any] | None:
        """Take up the ``latest`` checkpoint; returns the state that was saved with it, None if there is none. Collective."""
        if not (step := self.latest()):
            return None
        place = Path(shared_files.local(str(self.folder / f"step_{step}")))
        _, state = self.strategy.load_ckpt(engine, str(place.parent), tag=place.name)
        return state

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Collective."""
        if self.strategy.is_rank_0():
            write_text(self.folder / RANKS, str(self.strategy.world_size))
        settings = self.strategy.args.ckpt
        ranks.barrier()
        sees, name = shared_files.seen(self.folder / RANKS), f"step_{step}"
        apart = [rank for rank, sees_it in enumerate(sees) if not sees_it]
        is_apart = self.strategy.get_rank() in apart
        with TemporaryDirectory(prefix="sgpo-checkpoint-") if is_apart else nullcontext(str(self.folder)) as written:
            place = Path(written)
            # OpenRLHF makes room before it writes: with one more than asked for, the last whole checkpoint stays meanwhile.
            self.strategy.save_ckpt(engine, str(place), name, settings.max_num + 1, settings.max_mem, state)
            ranks.barrier()
            shared_files.bring(place / name, self.folder / name, apart)
        ranks.barrier()
        digests = self._digests(step)
        if self.strategy.is_rank_0():
            write_json(self.folder / f"step_{step}" / DIGESTS, digests)
        self._latest = step
        ranks.barrier()

    def _steps(self) -> list[int]:
        """Of the checkpoints that are there, the latest first."""
        return sorted((int(path.name.removeprefix("step_")) for path in self.folder.glob("step_*")), reverse=True)

    def _digests(self, step: int) -> dict[str, str]:
        """By name, for every file but the one with the digests. Collective: each rank reads its share."""
        folder, rank = self.folder / f"step_{step}", self.strategy.get_rank()
        readers = [reader for reader, sees_it in enumerate(shared_files.seen(folder)) if sees_it]
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
        share = files[readers.index(rank) :: len(readers)] if rank in readers else []
        parts = ranks.gather({str(path.relative_to(folder)): _digest(path) for path in share})
        return {name: digest for part in parts for name, digest in part.items()}

    def _problem(self, step: int) -> str:
        """Why a checkpoint is not to be read, empty if it is. Collective."""
        folder = self.folder / f"step_{step}"
        written = ranks.on_rank_0(lambda: _written(folder / DIGESTS))
        if written is None:
            return f"{folder} was not written to its end"
        there = self._digests(step)
        wrong = sorted(name for name in written.keys() | there.keys() if written.get(name) != there.get(name))
        return f"{folder} is damaged ({', '.join(wrong)})" if wrong else ""

    def _check_ranks(self) -> None:
        path, now = self.folder / RANKS, self.strategy.world_size
        if path.exists() and int(path.read_text()) != now:
            raise ValueError(
                f"--resume on {now} ranks, but {self.folder} was written by {path.read_text()}; start as many again"
            )


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def _written(path: Path) -> dict[str, str] | None:
    """The digests that were written with a checkpoint; None if they are missing or not JSON."""
    try:
        digests = read_json(path)
    except (OSError, ValueError):
        return None
    return digests if isinstance(digests, dict) else None
