"""A run on disk: the results of each stage, its costs, and which stages are finished.

    resolved_config.yaml   metrics.jsonl   ledger.json   table.txt   log_probs/
    initial/evaluation.json
    round_K/   prompts.jsonl responses.jsonl pairs.jsonl worst_case.json policy/ evaluation.json manifest.json

Round 0 is the seed stage. Every further role with its own adapter has a folder like policy/, named after the role. Files and
folders are written beside their final name and then renamed, so those with the final name are complete; ``manifest.json``
names the finished stages of its round and the facts about them.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO
from weakref import WeakSet

import yaml

from openrlhf_sgpo.data.template import Template, today
from openrlhf_sgpo.integrity import file_digest, files_in, sealed, signed, unsealed, unsigned

# libyaml is ten times faster.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LOCK = "lock"
MOMENT = "moment.json"
STORED = "resolved_config.yaml"
DATA = "data.json"
METRICS = "metrics.jsonl"
MANIFEST = "manifest.json"
CERTIFICATE = "worst_case.json"
TABLE = "table.txt"
CARD = "README.md"  # of the weights beside it
KEEP = "restore it from a copy, or start again in another folder"
# How a server is reached, which does not affect its answers; a resumed run may find it elsewhere.
ADDRESS = ("judge.base_url", "judge.concurrency", "judge.max_retries", "judge.timeout")
# Settings that a resumed run may change, because training does not depend on them (on those of the forward pass in its last
# digits).
FREE = (
    *(*ADDRESS, "launcher", "ray.", "vllm.", "logger.", "data.limits.", "eval.max_samples", "eval.max_prompts"),
    *(
        "ckpt.output_dir",
        "ckpt.save_steps",
        "ckpt.max_num",
        "out",
        "train.layout",
        "train.max_tokens",
        "train.score_tokens",
    ),
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
    """``value`` as JSON, which has no NaN or infinity: a missing figure is None. Raises ValueError, naming the place of a
    figure that is not finite."""
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
    """Inverse of ``json_text``. Raises json.JSONDecodeError for invalid JSON, and ValueError for NaN and infinity, which Python
    would accept."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is not valid JSON")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, jsonl(rows))


def jsonl(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json_text(row) + "\n" for row in rows)


def keep_rows(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    """Drops the rows of a JSONL file that are not wanted, and a partial last row that a killed process may have left; returns
    whether it dropped any."""
    # Not splitlines, which also splits at U+2028 and U+0085, which JSON allows inside a string.
    # Bytes, because the partial row may end within a character.
    *rows, partial = path.read_bytes().split(b"\n")
    try:
        kept = [row for number, row in enumerate(rows, start=1) if wanted(_row(path, number, row))]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a row has no usable {error}; restore the file from a copy") from error
    changed = bool(partial) or len(kept) < len(rows)
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
    """Rows of a file that a run may still be writing, without an incomplete last line; none if the file is missing. Raises
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
    """Writes a JSON object with a hash of its content, which ``read_sealed`` checks."""
    write_json(path, sealed(value))


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """The object that ``write_sealed`` wrote. Raises ValueError, ending with ``remedy``, if the file was changed."""
    return unsealed(path, read_json(path), remedy)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name; it gets its final name only if the block ends without an exception."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


_LOCKS: WeakSet[TextIO] = WeakSet()  # of folders that are still referenced


def _take(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(
            f"{os.path.dirname(lock.name)} is on a file system without locks ({error.strerror}), so two runs could write there "
            "at once: choose a folder on another one, or have it mounted with locks (Lustre: -o flock)"
        ) from error


def release_locks() -> None:
    """Releases the run folders of a command that has ended, because its process may run another command."""
    while _LOCKS:
        _LOCKS.pop().close()


class RunFolder:
    """Paths of a run and the manifests of its rounds. flag: the one that names the folder, for messages."""

    def __init__(self, path: str, flag: str = "ckpt.output_dir"):
        self.path = Path(path).absolute()
        self.flag = flag

    def lock(self) -> None:
        """Holds the folder until ``release_locks`` or the end of this process, however it ends. Raises ValueError if it is
        already held."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - the lock lives as long as the file is open
        if not _take(self._lock):
            gc.collect()  # a command of this process that has ended may still hold it in a reference cycle
            if not _take(self._lock):
                self._lock.seek(0)
                holder = self._lock.read().strip() or "another process"
                raise ValueError(f"--{self.flag} {self.path} is in use by {holder}: wait until it ends, or end it")
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        _LOCKS.add(self._lock)

    def moment(self, source: RunFolder | None = None) -> datetime:
        """The time that chat templates see: the one stored when this folder was started, or that of ``source``, the run that
        it is forked from, or else midnight (UTC) of today."""
        for folder in (self, source):
            if folder and (folder.path / MOMENT).exists():
                return datetime.fromisoformat(read_sealed(folder.path / MOMENT, KEEP)["moment"])
        return today()

    def keep_moment(self, template: Template, begun: bool) -> None:
        """Stores the moment that a template sees. begun: whether the folder has prompts that it has already rendered.

        Raises ValueError if it has, the template reads the clock, and no moment was stored.
        """
        path = self.path / MOMENT
        if begun and not path.exists() and template.reads_clock:
            raise ValueError(
                f"{self.path} has no {MOMENT}, and {template.name} writes the date into prompts, which is now unknown; start "
                "again in another folder"
            )
        write_sealed(path, {"moment": template.moment.isoformat()})

    def check_free(self) -> None:
        """Raises ValueError if another process holds the folder, or if it contains anything but a run."""
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
        # A process that was killed before it stored the configuration left nothing else.
        first_files = (LOCK, MOMENT, DATA, STORED)
        if any(entry.name.removesuffix(".partial") not in first_files for entry in self.path.iterdir()):
            raise ValueError(f"--{self.flag} {self.path} is not empty and not a run: choose another folder")

    def changes(self, resolved_config: str, resume: bool) -> dict[str, tuple[Any, Any]]:
        """(old, new) values of the settings that differ from those of the folder's run, except ``FREE``.

        Raises ValueError if the folder holds a run and ``resume`` is off.
        """
        if not (self.path / STORED).exists():
            return {}
        if not resume:
            raise ValueError(
                f"--{self.flag} {self.path} already holds a run: add --resume to continue it, or choose another folder"
            )
        changed = differences(read_configuration(self.path / STORED), yaml.load(resolved_config, LOADER))
        return {key: values for key, values in changed.items() if not key.startswith(FREE)}

    def refuse(self, changed: Mapping[str, tuple[Any, Any]], why: str = "") -> None:
        """Raises ValueError, naming each change, if there are any. why: further explanation."""
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
        """Locks and creates the run folder, or reopens an existing one.

        data: a hash of each dataset and model, by flag; models may change until a stage has ended. template: whose moment to
        store, see ``keep_moment``. accepted: settings that may differ besides ``FREE``. Raises ValueError if the folder is in
        use, if it holds a run and ``resume`` is off, and if ``resume`` is on and the configuration, the data or the models
        differ from that run's.
        """
        self._check_foreign()
        self.lock()
        if (self.path / STORED).exists():
            changed = self.changes(resolved_config, resume)
            self.refuse({key: values for key, values in changed.items() if key not in accepted})
            old_data = self.data() if data else {}
            begun = any(self.manifest(number)["stages"] for number in (None, *self.rounds()))
            changed_data = [
                name
                for name, digest in (data or {}).items()
                if old_data.get(name, digest) != digest and (begun or not name.startswith(("--model.", "--ref.")))
            ]
            if changed_data:
                raise ValueError(
                    f"--resume, but {' and '.join(changed_data)} changed since the run in {self.path} began"
                )
            if changed:  # the table is that of the old settings
                (self.path / TABLE).unlink(missing_ok=True)
        if template:
            self.keep_moment(template, begun=(self.path / STORED).exists())
        if data:
            write_sealed(self.path / DATA, data)
        write_text(self.path / STORED, signed(resolved_config))

    def data(self) -> dict[str, str]:
        """A hash of each dataset, by flag. Raises ValueError if it cannot be read."""
        return read_sealed(self.path / DATA, KEEP)

    def round(self, number: int | None) -> Path:
        return self.path / ("initial" if number is None else f"round_{number}")

    def policy(self, number: int) -> Path:
        return self.round(number) / "policy"

    def finished(self, number: int | None, stage: str) -> bool:
        return stage in self.manifest(number)["stages"]

    def manifest(self, number: int | None) -> dict[str, Any]:
        """The manifest of a round, empty before its first stage ends. Raises ValueError if it was changed."""
        path = self.round(number) / MANIFEST
        manifest = read_sealed(path, self.remedy(number)) if path.exists() else {"round": number, "stages": {}}
        if manifest["round"] != number:
            raise ValueError(f"{path} is that of round {manifest['round']}; {self.remedy(number)}")
        return manifest

    def finish(self, number: int | None, stage: str, facts: dict[str, Any], files: Iterable[str] = ()) -> None:
        """Records that a stage is finished; its results must already have their final names. files: these results, whose
        digests ``run_check`` compares later; a folder stands for the files in it."""
        path = self.round(number)
        results = [file for name in files for file in files_in(path / name)]
        digests = {str(file.relative_to(path)): file_digest(file) for file in results}
        self.record(number, stage, facts | ({"files": digests} if digests else {}))

    def record(self, number: int | None, stage: str, facts: dict[str, Any]) -> None:
        """Writes these facts of a stage into the manifest, replacing earlier ones."""
        manifest = self.manifest(number)
        manifest["stages"][stage] = facts
        write_sealed(self.round(number) / MANIFEST, manifest)

    def rounds(self) -> list[int]:
        names = [path.name[6:] for path in self.path.glob("round_*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def remedy(self, number: int | None) -> str:
        """What to do if files of a round are missing or changed."""
        later = [after for after in self.rounds() if number is not None and after > number]
        folders = f"{self.round(number)} and the rounds after it" if later else str(self.round(number))
        return f"restore it from a copy, or delete {folders}, which train --resume then creates again"


def read_configuration(path: Path) -> dict[str, Any]:
    """Reads a resolved_config.yaml. Raises ValueError if it was changed."""
    return yaml.load(unsigned(path), LOADER)


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """(old, new) values of the keys, by dotted name, in which two nested mappings differ."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed |= differences(before, after, f"{prefix}{key}.")
        elif before != after:
            changed[prefix + key] = (before, after)
    return changed
