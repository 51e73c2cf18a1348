"""A run on disk: what each stage leaves, what it cost, and what is finished.

    resolved_config.yaml   metrics.jsonl   ledger.json   table.txt   log_probs/
    initial/evaluation.json
    round_K/   prompts.jsonl responses.jsonl pairs.jsonl worst_case.json policy/ evaluation.json manifest.json

Round 0 is the seed stage. Beside policy/ there is such a folder for every other role with an adapter of its own, by the role's
name. A file or folder is written beside its final name and then renamed, so that what has the final name is whole;
``manifest.json`` names the finished stages of its round, with what went into them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from openrlhf_sgpo import keys, yaml_files
from openrlhf_sgpo.data.template import today

if TYPE_CHECKING:
    from openrlhf_sgpo.data.template import Template

LOCK = "lock"
MOMENT = "moment.json"
# How a server is reached, which says nothing about its answers; a resumed run may find it elsewhere.
ADDRESS = ("judge.base_url", "judge.concurrency", "judge.max_retries", "judge.timeout")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def json_text(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """``value`` as JSON, which has no NaN and no infinity: a figure without a value is None. Raises ValueError, with the place
    of one that is not finite."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    except ValueError as error:
        place, figure = next(_not_finite(value), ("", error))
        raise ValueError(f"{place} is {figure}, which JSON does not have") from None


def _not_finite(value: Any, place: str = "the value") -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    items = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for key, part in items:
        yield from _not_finite(part, f"{place}[{key!r}]")


def parse_json(text: str | bytes) -> Any:
    """Inverse of ``json_text``. Raises json.JSONDecodeError for what is no JSON, ValueError for NaN and infinity, which Python
    would read."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is no figure")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json_text(row) + "\n" for row in rows))


def keep_rows(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    """Drop the rows of a JSONL file that are not wanted, and the half one that a killed process may have left; returns
    whether there were such."""
    # Not splitlines: it also splits at U+2028 and U+0085, which JSON leaves as they are inside a string.
    # Bytes: the half row may end within a character.
    *rows, half = path.read_bytes().split(b"\n")
    kept = [text for text in (row.decode("utf-8") for row in rows) if wanted(json.loads(text))]
    changed = bool(half) or len(kept) < len(rows)
    if changed:
        write_text(path, "".join(f"{row}\n" for row in kept))
    return changed


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill under another name; it gets its own name only if the block ends without an exception."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


class RunFolder:
    """Paths of a run and the manifests of its rounds. flag: that names the folder, for messages."""

    def __init__(self, path: str, flag: str = "ckpt.output_dir"):
        self.path = Path(path).absolute()
        self.flag = flag

    def lock(self) -> None:
        """Hold the folder until this process ends, however it ends. Raises ValueError if another process holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - the lock lives as long as the file is open
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise ValueError(f"--{self.flag} {self.path} is in use by {holder}: wait for it, or end it") from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def moment(self, source: RunFolder | None = None) -> datetime:
        """What chat templates are told of the present: what they were told when this folder was begun, or else the beginning
        of the day (UTC). source: a run that this one goes on from, whose moment it takes."""
        for folder in (self, source):
            if folder and (folder.path / MOMENT).exists():
                return datetime.fromisoformat(read_json(folder.path / MOMENT)["moment"])
        return today()

    def keep_moment(self, template: Template, begun: bool) -> None:
        """Keep the moment that a template is told. begun: whether the folder has prompts that it rendered before.

        Raises ValueError if it has, the template reads the clock, and no moment was kept.
        """
        path = self.path / MOMENT
        if begun and not path.exists() and template.reads_clock:
            raise ValueError(
                f"{self.path} has no {MOMENT}, and {template.name} writes the date into prompts: which one is not known; begin "
                "again in another folder"
            )
        write_json(path, {"moment": template.moment.isoformat()})

    def prepare(
        self,
        resolved_config: str,
        resume: bool,
        data: dict[str, str] | None = None,
        template: Template | None = None,
    ) -> None:
        """Lock and create the run folder, or take up the one that is there.

        data: a hash of each data set that was read. template: that is told the moment, see ``keep_moment``.
        Raises ValueError if the folder is in use, or holds a run and ``resume`` is off, or if ``resume`` is on and the
        configuration or the data differ from that run's.
        """
        self.lock()
        stored = self.path / "resolved_config.yaml"
        if not stored.exists():
            # A process that was killed at this point left no more than the beginning of these.
            own = (LOCK, MOMENT, "data.json", stored.name)
            if any(entry.name.removesuffix(".partial") not in own for entry in self.path.iterdir()):
                (self.path / LOCK).unlink()  # somebody else's folder stays as it was
                raise ValueError(f"--{self.flag} {self.path} is not empty and not a run: choose another folder")
        elif not resume:
            raise ValueError(
                f"--{self.flag} {self.path} already holds a run: add --resume to continue it, or choose another folder"
            )
        else:
            changed = differences(yaml_files.load(stored), yaml.safe_load(resolved_config))
            changed = {key: values for key, values in changed.items() if key not in ADDRESS}
            if changed:
                listed = "\n  ".join(f"--{key}: was {old!r}, now {new!r}" for key, (old, new) in changed.items())
                raise ValueError(f"--resume with another configuration than the run in {self.path} has:\n  {listed}")
            known = read_json(self.path / "data.json") if data else {}
            other = [name for name, digest in (data or {}).items() if known.get(name, digest) != digest]
            if other:
                raise ValueError(f"--resume, but {' and '.join(other)} changed since the run in {self.path} began")
        if template:
            self.keep_moment(template, begun=stored.exists())
        if data:
            write_json(self.path / "data.json", data)
        write_text(stored, resolved_config)

    def round(self, number: int) -> Path:
        return self.path / f"round_{number}"

    def policy(self, number: int) -> Path:
        return self.round(number) / "policy"

    def finished(self, number: int, stage: str) -> bool:
        return stage in self.manifest(number)["stages"]

    def manifest(self, number: int) -> dict[str, Any]:
        path = self.round(number) / "manifest.json"
        return read_json(path) if path.exists() else {"round": number, "stages": {}}

    def finish(self, number: int, stage: str, facts: dict[str, Any]) -> None:
        """Record that a stage is done; its results must have their final names by now."""
        manifest = self.manifest(number)
        manifest["stages"][stage] = facts
        write_json(self.round(number) / "manifest.json", manifest)


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """(old, new) value of every key, by its dotted name, in which two nested mappings differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found[prefix + key] = (before, after)
    return found


class Ledger:
    """What each stage cost: wall seconds and peak memory, and whatever the stage adds (samples, tokens, calls)."""

    def __init__(self, path: Path, writes: bool):
        self.path = path
        self.writes = writes
        self.stages: dict[str, dict[str, float]] = read_ledger(path)["stages"]

    @contextlib.contextmanager
    def stage(self, name: str, add: bool = False) -> Iterator[dict[str, float]]:
        """The entry of a stage, to which the block adds what it costs. Entries of blocks that fail are dropped. add: to what
        the stage has cost before, and also if the block fails: of stages whose parts are kept."""
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
        """A stage that began at ``start`` of time.perf_counter and is over."""
        entry["seconds"] = round(time.perf_counter() - start, 2)
        entry["peak_memory_gib"] = round(_peak_memory_gib(), 2)
        self.stages[name] = _sum([self.stages[name], entry]) if add and name in self.stages else entry
        if self.writes:
            write_json(self.path, {"total": _sum(self.stages.values()), "stages": self.stages})


def read_ledger(path: Path) -> dict[str, Any]:
    """``total`` and ``stages`` of ledger.json, both empty if there is none. In folders of versions up to 0.1 the entry of the
    follower was that of scoring, with the follower's milliseconds."""
    if not path.exists():
        return {"total": {}, "stages": {}}
    ledger = read_json(path)
    stages = {
        name.replace("/follower", "/score") if "tokens_scored" in entry else name: entry
        for name, entry in ledger["stages"].items()
    }
    return ledger | {"stages": stages}


def _sum(costs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for one in costs:
        for key, value in one.items():
            totals[key] = max(totals.get(key, 0), value) if "peak" in key else totals.get(key, 0) + value
    return totals


def stage_rows(
    folder: Path,
    ledger: Ledger,
    name: str,
    work: Callable[[dict[str, float]], list[dict[str, Any]]],
    usage: Callable[[], Mapping[str, float]] = dict,
) -> list[dict[str, Any]]:
    """The rows of ``folder``/stages/NAME.jsonl, which ``work`` makes if it is not there. usage: running totals of what it
    costs, which the ledger gets beside what ``work`` adds."""
    path = folder / "stages" / f"{name}.jsonl"
    if not path.exists():
        before = usage()
        with ledger.stage(name) as cost:
            rows = work(cost)
            cost |= {key: total - before[key] for key, total in usage().items()}
        write_jsonl(path, rows)
    return read_jsonl(path)


def _peak_memory_gib() -> float:
    """Of this process: GPU memory where there is one, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Metrics:
    """metrics.jsonl, and W&B or TensorBoard where asked for; one run for all rounds."""

    def __init__(self, folder: Path, config: Any, resolved: dict[str, Any], writes: bool):
        self.every = config.logger.logging_steps
        self.file = None
        self._trackers: list[Any] = []
        self._step = 0
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open for the run
        wandb_settings = config.logger.wandb
        if wandb_settings.key:
            import wandb

            # `env` is W&B's own way. A key from elsewhere is for this process alone; login would write it to ~/.netrc.
            key = None if wandb_settings.key == "env" else keys.read(wandb_settings.key, "WANDB_API_KEY")
            self._trackers.append(
                wandb.init(
                    entity=wandb_settings.org or None,
                    project=wandb_settings.project,
                    group=wandb_settings.group or None,
                    name=wandb_settings.run_name,
                    config=resolved,
                    settings=wandb.Settings(api_key=key) if key else None,
                )
            )
        if config.logger.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._trackers.append(SummaryWriter(os.path.join(config.logger.tensorboard_dir, wandb_settings.run_name)))

    def rewind(self, stage: str, step: int) -> None:
        """Drop what a killed process logged of this stage after ``step``: those steps are taken again."""
        if self.file is None:
            return
        path = Path(self.file.name)
        if keep_rows(path, lambda row: row["stage"] != stage or row["step"] <= step):
            self.file.close()  # it is another file now
            self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        # Trackers count on from where the steps that stay end.
        self._step = self.every * len(read_jsonl(path))

    def log(self, stage: str, step: int, row: Mapping[str, float | None]) -> None:
        """step counts within the stage; trackers get a counter over the whole run. A metric whose value is None is left out."""
        self._step += 1
        if self.file is None or step % self.every:
            return
        row = {name: value for name, value in row.items() if value is not None}
        self.file.write(json_text({"stage": stage, "step": step, **row}) + "\n")
        for tracker in self._trackers:
            if hasattr(tracker, "add_scalar"):
                for name, value in row.items():
                    tracker.add_scalar(name, value, self._step)
            else:
                tracker.log(row, step=self._step)

    def close(self) -> None:
        if self.file:
            self.file.close()
        for tracker in self._trackers:
            (tracker.close if hasattr(tracker, "add_scalar") else tracker.finish)()
