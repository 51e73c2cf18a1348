"""Locating and checking the files and code of a benchmark.

Flags are named without their dashes, as in ``alpaca_eval.file``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from openrlhf_sgpo import extras
from openrlhf_sgpo.data.files import DataError, listing, read_rows
from openrlhf_sgpo.integrity import hash_of

_NAMED = 3  # rows named in a message


class Hub(NamedTuple):
    """A file on the Hugging Face hub. revision: a commit; None: the newest."""

    repository: str
    kind: Literal["dataset", "space", "model"]
    file: str
    revision: str | None = None


class Package(NamedTuple):
    """A file shipped in a package. name: for pip; module: for import; file: path below the module's folder."""

    name: str
    module: str
    file: str


def locate(flag: str, user_path: str, hub: Hub | None, package: Package | None = None) -> Path:
    """The user's file, else the installed package's, else the hub's, if it has the file. The package is not imported.

    Raises ValueError if the file is unavailable."""
    if user_path:
        path = Path(user_path)
        if not path.is_file():
            raise ValueError(f"--{flag}: {user_path}: no such file")
        return path
    if package and (packaged := _in_package(package)):
        return packaged
    if hub is None:
        raise ValueError(
            f"--{flag} is not set, and no installed package has the file; give --{flag}{_install(package)}"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub.repository, hub.file, repo_type=hub.kind, revision=hub.revision))
    except Exception as error:  # the library raises many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        also = f"the package {package.name}, which has the file, is not installed, and " if package else ""
        raise ValueError(
            f"--{flag} is not set, {also}{hub.file} cannot be downloaded from the {hub.kind} {hub.repository} on the hub "
            f"({reason}); give --{flag}{_install(package)}"
        ) from error


def _install(package: Package | None) -> str:
    return f", or pip install {package.name}" if package else ""


def _in_package(package: Package) -> Path | None:
    spec = find_spec(package.module)
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () if (path := Path(folder) / package.file).is_file()), None)


def content_hash(rows: Iterable[Mapping[str, Any]], fields: Collection[str]) -> str:
    """BLAKE2b hash (32 hexadecimal digits) of these fields of the rows, in row order. Other fields and the file format (JSON
    or JSONL) do not matter. A missing field counts as null."""
    content = [[row.get(field) for field in fields] for row in rows]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hash_of([text.encode("ascii")])


class Kind(NamedTuple):
    """What a field may hold. words: its noun with the article, for error messages."""

    words: str
    holds: Callable[[Any], bool]


TEXT = Kind("text", lambda value: isinstance(value, str))
NUMBER = Kind("an integer", lambda value: type(value) in (int, str) and str(value).isdecimal())
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value))
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECTS = Kind(
    "list of objects", lambda value: isinstance(value, list) and all(isinstance(value, dict) for value in value)
)
Fields = Mapping[str, Kind]


def read_fields(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """Rows of a JSON or JSONL file (also .gz). Raises DataError if a row cannot be read, lacks a field or has a field of
    another kind."""
    if path.suffix.lower() == ".parquet":
        raise DataError(f"{path}: a Parquet file; expected .json or .jsonl, either also .gz")
    source = read_rows(str(path))
    entries = list(source.entries)
    problems = [(place, problem) for place, row in entries if (problem := _problem(row, fields))]
    if problems:
        raise DataError("\n".join(listing(str(path), source.unit, problems)[0]))
    return [row for _, row in entries]


def read_checked(
    flag: str, path: Path, fields: Fields, digest: str, unverified: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, as ``read_fields`` returns them, of a file whose ``content_hash`` should be ``digest``, and notes for the result.

    Raises ValueError for another hash. With ``unverified`` (the user's flag of that name beside ``flag``) it is a note.
    """
    try:
        rows = read_fields(path, fields)
    except DataError as error:
        raise ValueError(f"--{flag}: {error}") from error
    actual = content_hash(rows, fields)
    if actual == digest:
        return rows, []
    what = f"{path} is not the published file: the hash of its {', '.join(fields)} is {actual}, not {digest}"
    if unverified:
        return rows, [what]
    raise ValueError(
        f"--{flag}: {what}. Results with it cannot be compared with others: download the file again, or give "
        f"--{flag.partition('.')[0]}.unverified to use it"
    )


def check_once(path: Path, noun: str, answered: Sequence[str], ids: Iterable[str]) -> None:
    """Check that each id ``answered`` in another tool's file is one of ``ids`` and occurs once. noun: for an id, in messages.
    Raises ValueError."""
    expected = set(ids)
    groups = {
        f"unknown {noun}": [identifier for identifier in answered if identifier not in expected],
        f"{noun} answered twice": [identifier for identifier, count in Counter(answered).items() if count > 1],
    }
    problems = [f"{path}: {name} ({len(wrong)}): {_shown(wrong)}" for name, wrong in groups.items() if wrong]
    if problems:
        raise ValueError("\n".join(problems))


def upstream(task: str, module: str) -> Any:
    """The imported module that defines a benchmark. Raises ValueError if the import fails."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"--tasks {task}: {extras.how_to_install(error.name or module, extras.BENCHMARKS)}") from error
    except ImportError as error:
        raise ValueError(f"--tasks {task}: {module} cannot be imported ({error})") from error


def _problem(row: Any, fields: Fields) -> str:
    if isinstance(row, DataError):
        return str(row)
    if not isinstance(row, dict):
        return f"expected an object, found {type(row).__name__}"
    missing = [field for field in fields if field not in row]
    if missing:
        return f"no field {' and no field '.join(missing)}"
    wrong = [f"{name} is not {kind.words}" for name, kind in fields.items() if not kind.holds(row[name])]
    return " and ".join(wrong)


def _shown(texts: Sequence[str]) -> str:
    shown = [repr(text if len(text) <= 60 else f"{text[:60]}...") for text in texts[:_NAMED]]
    return ", ".join([*shown, "..."] if len(texts) > _NAMED else shown)
