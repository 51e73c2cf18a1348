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
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from weakref import WeakSet

import yaml

from openrlhf_sgpo.data.template import today
from openrlhf_sgpo.integrity import file_digest, files_in, sealed, signed, unsealed, unsigned

if TYPE_CHECKING:
    from openrlhf_sgpo.data.template import Template

# libyaml reads a configuration in a tenth of the time.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LOCK = "lock"
MOMENT = "moment.json"
STORED = "resolved_config.yaml"
DATA = "data.json"
METRICS = "metrics.jsonl"
MANIFEST = "manifest.json"
TABLE = "table.txt"
KEEP = "restore it from a copy, or start again in another folder"
# How a server is reached, which says nothing about its answers; a resumed run may find it elsewhere.
ADDRESS = ("judge.base_url", "judge.concurrency", "judge.max_retries", "judge.timeout")
# What a resumed run may have otherwise, because what is trained does not depend on it.
FREE = (
    *(*ADDRESS, "vllm.", "logger.", "data.limits.", "eval.max_samples", "eval.max_prompts"),
    *("ckpt.output_dir", "ckpt.save_steps", "ckpt.max_num", "out"),
)


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
    write_text(path, jsonl(rows))


def jsonl(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json_text(row) + "\n" for row in rows)


def keep_rows(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    """Drop the rows of a JSONL file that are not wanted, and the half one that a killed process may have left; returns
    whether there were such."""
    # Not splitlines: it also splits at U+2028 and U+0085, which JSON leaves as they are inside a string.
    # Bytes: the half row may end within a character.
    *rows, half = path.read_bytes().split(b"\n")
    try:
        kept = [row for number, row in enumerate(rows, start=1) if wanted(_row(path, number, row))]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a row has no usable {error}; restore the file from a copy") from error
    changed = bool(half) or len(kept) < len(rows)
    if changed:
        write_text(path, "".join(f"{row.decode('utf-8')}\n" for row in kept))
    return changed


def read_json(path: Path) -> Any:
    """Raises ValueError, naming the file, if it cannot be read or is not JSON."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it from a copy") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Raises ValueError, naming file and line, if it cannot be read or a line is not a JSON object."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it from a copy") from error
    return [_row(path, number, line) for number, line in enumerate(lines, start=1) if line]


def read_growing(path: Path) -> list[dict[str, Any]]:
    """Rows of a file to which a run may be writing, without a last line that is not whole; none if there is no file. Raises
    ValueError as ``read_jsonl`` does."""
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [_row(path, number, line) for number, line in enumerate(lines, start=1)]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = parse_json(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} cannot be read ({error}); restore the file from a copy") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} is not a JSON object; restore the file from a copy")
    return row


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object with a hash of its content, by which ``read_sealed`` knows it."""
    write_json(path, sealed(value))


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """Raises ValueError, which ends with ``remedy``, if the file is not what ``write_sealed`` wrote."""
    return unsealed(path, read_json(path), remedy)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill under another name; it gets its own name only if the block ends without an exception."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


_LOCKS: WeakSet[TextIO] = WeakSet()  # of folders that something still refers to


def release_locks() -> None:
    """The command that held run folders has ended; the process may go on, and run another."""
    while _LOCKS:
        _LOCKS.pop().close()


class RunFolder:
    """Paths of a run and the manifests of its rounds. flag: that names the folder, for messages."""

    def __init__(self, path: str, flag: str = "ckpt.output_dir"):
        self.path = Path(path).absolute()
        self.flag = flag

    def lock(self) -> None:
        """Hold the folder until ``release_locks``, or until this process ends, however it ends. Raises ValueError if it is
        held already."""
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
        _LOCKS.add(self._lock)

    def moment(self, source: RunFolder | None = None) -> datetime:
        """What chat templates are told of the present: what they were told when this folder was begun, or else the beginning
        of the day (UTC). source: a run that this one goes on from, whose moment it takes."""
        for folder in (self, source):
            if folder and (folder.path / MOMENT).exists():
                return datetime.fromisoformat(read_sealed(folder.path / MOMENT, KEEP)["moment"])
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
        write_sealed(path, {"moment": template.moment.isoformat()})

    def check_free(self) -> None:
        """Raises ValueError if another process holds the folder, or something that is not a run lies in it."""
        self._check_foreign()
        if (self.path / LOCK).exists():
            self.lock()
            self._lock.close()

    def _check_foreign(self) -> None:
        if not self.path.is_dir() or (self.path / STORED).exists():
            return
        if self.rounds():
            raise ValueError(
                f"{self.path / STORED} is missing; restore it from a copy, or choose another --{self.flag}"
            )
        # A process that was killed before the configuration was stored left no more than the beginning of these.
        own = (LOCK, MOMENT, DATA, STORED)
        if any(entry.name.removesuffix(".partial") not in own for entry in self.path.iterdir()):
            raise ValueError(f"--{self.flag} {self.path} is not empty and not a run: choose another folder")

    def changes(self, resolved_config: str, resume: bool) -> dict[str, tuple[Any, Any]]:
        """(old, new) value of every setting that differs from the run that is there, without those of ``FREE``.

        Raises ValueError if there is a run and ``resume`` is off.
        """
        if not (self.path / STORED).exists():
            return {}
        if not resume:
            raise ValueError(
                f"--{self.flag} {self.path} already holds a run: add --resume to continue it, or choose another folder"
            )
        found = differences(read_configuration(self.path / STORED), yaml.load(resolved_config, LOADER))
        return {key: values for key, values in found.items() if not key.startswith(FREE)}

    def refuse(self, changed: Mapping[str, tuple[Any, Any]], why: str = "") -> None:
        """Raises ValueError, naming each, if there are changes. why: more of it."""
        if changed:
            listed = "\n  ".join(f"--{key}: was {old!r}, now {new!r}" for key, (old, new) in changed.items())
            raise ValueError(f"--resume with another configuration than the run in {self.path} has:\n  {listed}{why}")

    def prepare(
        self,
        resolved_config: str,
        resume: bool,
        data: dict[str, str] | None = None,
        template: Template | None = None,
        accepted: Sequence[str] = (),
    ) -> None:
        """Lock and create the run folder, or take up the one that is there.

        data: a hash of each data set that was read. template: that is told the moment, see ``keep_moment``. accepted:
        settings that may differ beside those of ``FREE``. Raises ValueError if the folder is in use, or holds a run and
        ``resume`` is off, or if ``resume`` is on and the configuration or the data differ from that run's.
        """
        self._check_foreign()
        self.lock()
        if (self.path / STORED).exists():
            changed = self.changes(resolved_config, resume)
            self.refuse({key: values for key, values in changed.items() if key not in accepted})
            known = self.data() if data else {}
            other = [name for name, digest in (data or {}).items() if known.get(name, digest) != digest]
            if other:
                raise ValueError(f"--resume, but {' and '.join(other)} changed since the run in {self.path} began")
            if changed:  # the results are those of the run before
                (self.path / TABLE).unlink(missing_ok=True)
        if template:
            self.keep_moment(template, begun=(self.path / STORED).exists())
        if data:
            write_sealed(self.path / DATA, data)
        write_text(self.path / STORED, signed(resolved_config))

    def data(self) -> dict[str, str]:
        """A hash of each data set, by flag. Raises ValueError if it cannot be read."""
        return read_sealed(self.path / DATA, KEEP)

    def round(self, number: int | None) -> Path:
        return self.path / ("initial" if number is None else f"round_{number}")

    def policy(self, number: int) -> Path:
        return self.round(number) / "policy"

    def finished(self, number: int | None, stage: str) -> bool:
        return stage in self.manifest(number)["stages"]

    def manifest(self, number: int | None) -> dict[str, Any]:
        """Raises ValueError if there is one that is not what was written."""
        path = self.round(number) / MANIFEST
        found = read_sealed(path, self.remedy(number)) if path.exists() else {"round": number, "stages": {}}
        if found["round"] != number:
            raise ValueError(f"{path} is that of round {found['round']}; {self.remedy(number)}")
        return found

    def finish(self, number: int | None, stage: str, facts: dict[str, Any], files: Iterable[str] = ()) -> None:
        """Record that a stage is done; its results must have their final names by now. files: these results, with which
        ``run_check`` compares what is there when it is read again; a folder stands for the files in it."""
        path = self.round(number)
        kept = [one for name in files for one in files_in(path / name)]
        digests = {str(one.relative_to(path)): file_digest(one) for one in kept}
        self.record(number, stage, facts | ({"files": digests} if digests else {}))

    def record(self, number: int | None, stage: str, facts: dict[str, Any]) -> None:
        """Write these facts of a stage, and no others, into the manifest."""
        manifest = self.manifest(number)
        manifest["stages"][stage] = facts
        write_sealed(self.round(number) / MANIFEST, manifest)

    def rounds(self) -> list[int]:
        names = [path.name[6:] for path in self.path.glob("round_*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def remedy(self, number: int | None) -> str:
        """What to do if files of a round are not what was written."""
        later = [one for one in self.rounds() if number is not None and one > number]
        folders = f"{self.round(number)} and the rounds after it" if later else str(self.round(number))
        return f"restore it from a copy, or delete {folders}, which train --resume then makes again"


def read_configuration(path: Path) -> dict[str, Any]:
    """A resolved_config.yaml. Raises ValueError if it is not what was written."""
    return yaml.load(unsigned(path), LOADER)


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
