"""Costs of a run, a comparison or an evaluation, by stage."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from openrlhf_sgpo.integrity import check_file, rows_digest
from openrlhf_sgpo.run_folder import MANIFEST, jsonl, read_jsonl, read_sealed, write_jsonl, write_sealed


class Ledger:
    """Costs of each stage: wall-clock seconds, peak memory, and what the stage adds (samples, tokens, calls)."""

    def __init__(self, path: Path, writes: bool):
        self.path = path
        self.writes = writes
        self.stages: dict[str, dict[str, float]] = read_ledger(path)["stages"] if writes else {}

    @contextlib.contextmanager
    def stage(self, name: str, add: bool = False) -> Iterator[dict[str, float]]:
        """The entry of a stage, to which the block adds its costs. Entries of blocks that fail are dropped. add: adds to the
        stage's earlier costs, even if the block fails, for stages that keep finished parts."""
        entry: dict[str, float] = {}
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            yield entry
        except BaseException:
            if add:
                self.book(name, entry, start, add)
            raise
        self.book(name, entry, start, add)

    def book(self, name: str, entry: dict[str, float], start: float, add: bool = False) -> None:
        """Enters the costs of a stage that began at ``start`` of time.perf_counter and has ended."""
        entry["seconds"] = round(time.perf_counter() - start, 2)
        entry["peak_memory_gib"] = round(_peak_memory_gib(), 2)
        self.stages[name] = _sum([self.stages[name], entry]) if add and name in self.stages else entry
        if self.writes:
            write_ledger(self.path, self.stages)


class Stopwatch:
    """Adds the seconds of parts of a stage to its costs. For nested parts, the seconds count only for the inner part."""

    def __init__(self, **cost: float):
        self.cost = cost
        self._parts: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._count()
        self._parts.append(f"seconds_{part}")
        try:
            yield
        finally:
            self._count()
            self._parts.pop()

    def _count(self) -> None:
        now = time.perf_counter()
        if self._parts:
            self.cost[self._parts[-1]] = self.cost.get(self._parts[-1], 0.0) + now - self._since
        self._since = now


def write_ledger(path: Path, stages: Mapping[str, Mapping[str, float]]) -> None:
    write_sealed(path, {"total": _sum(stages.values()), "stages": stages})


def read_ledger(path: Path) -> dict[str, Any]:
    """``total`` and ``stages`` of ledger.json, both empty without the file. Raises ValueError if it was changed."""
    if not path.exists():
        return {"total": {}, "stages": {}}
    return read_sealed(path, "restore it from a copy, or delete it: the costs of finished stages are then unknown")


def _sum(costs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for cost in costs:
        for key, value in cost.items():
            totals[key] = max(totals.get(key, 0), value) if "peak" in key else totals.get(key, 0) + value
    return totals


def increase(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Of running totals, by name."""
    return {name: total - before[name] for name, total in now.items()}


def stage_rows(
    folder: Path,
    ledger: Ledger,
    name: str,
    work: Callable[[dict[str, float]], list[dict[str, Any]]],
    usage: Callable[[], Mapping[str, float]] = dict,
) -> list[dict[str, Any]]:
    """The rows of ``folder``/stages/NAME.jsonl, which ``work`` creates if the file is missing. usage: running totals of
    costs, whose increase is entered beside what ``work`` adds. Raises ValueError if the file was changed."""
    path = folder / "stages" / f"{name}.jsonl"
    remedy = "restore it from a copy, or delete it and add --resume to create it again"
    digests = read_sealed(path.with_name(MANIFEST), remedy) if path.with_name(MANIFEST).exists() else {}
    if path.exists():
        check_file(path, digests.get(path.name, {}), remedy)
    else:
        before = usage()
        with ledger.stage(name) as cost:
            rows = work(cost)
            cost |= increase(before, usage())
        # The digest comes first: after a kill in between, the rows are created again.
        write_sealed(path.with_name(MANIFEST), digests | {path.name: rows_digest(jsonl(rows).encode())})
        write_jsonl(path, rows)
    return read_jsonl(path)


def _peak_memory_gib() -> float:
    """Peak memory of this process: on its GPU if it has one, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
