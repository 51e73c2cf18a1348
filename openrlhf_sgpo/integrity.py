"""Whether files are still what was written: digests that a manifest keeps of other files, and JSON that carries its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SEAL = "blake2b"
WEIGHTS = (".safetensors", ".bin")
LARGE = 2**26  # bytes of a file of weights beyond which only its ends are read
PART = 2**20


def hash_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def files_in(path: Path) -> list[Path]:
    """The file, or the files in the folder; none if it is not there."""
    return sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path] if path.is_file() else []


def file_digest(path: Path) -> dict[str, Any]:
    """Bytes and hash of a file, and the rows of a JSONL file.

    Of weights beyond 64 MiB the hash is of the first and the last MiB. With the size this notices a file that is missing, cut
    or of another model, because a safetensors file begins with the names and shapes of its tensors; to read 16 GB whenever a
    run is resumed would take minutes.
    """
    size, rows = path.stat().st_size, 0
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if path.suffix in WEIGHTS and size > LARGE:
            digest.update(file.read(PART))
            file.seek(-PART, 2)
        while part := file.read(PART):
            digest.update(part)
            rows += part.count(b"\n")
    found: dict[str, Any] = {"bytes": size, SEAL: digest.hexdigest()}
    return {"rows": rows, **found} if path.suffix == ".jsonl" else found


def rows_digest(content: bytes) -> dict[str, Any]:
    """The ``file_digest`` of a JSONL file with this content."""
    return {"rows": content.count(b"\n"), "bytes": len(content), SEAL: hash_of([content])}


def check_digest(what: str, found: Mapping[str, Any], expected: Mapping[str, Any], remedy: str) -> None:
    """Raises ValueError, which begins with ``what`` and ends with ``remedy``, unless both digests are equal."""
    for unit in ("rows", "bytes"):
        if found.get(unit) != expected.get(unit):
            raise ValueError(f"{what}: {expected.get(unit)} {unit} were written, {found.get(unit)} are there; {remedy}")
    if found != expected:
        raise ValueError(f"{what} was changed after it was written; {remedy}")


def check_file(path: Path, expected: Mapping[str, Any], remedy: str) -> None:
    """Raises ValueError unless the file has this ``file_digest``."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; {remedy}")
    check_digest(str(path), file_digest(path), expected, remedy)


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a hash of the rest of it."""
    rest = {key: item for key, item in value.items() if key != SEAL}
    return rest | {SEAL: hash_of([json.dumps(rest, sort_keys=True).encode()])}


def intact(value: Any) -> bool:
    """Whether this is what was ``sealed``."""
    return isinstance(value, dict) and value == sealed(value)


def unsealed(path: Path, value: Any, remedy: str) -> dict[str, Any]:
    """What was ``sealed`` and read from ``path``, without the hash. Raises ValueError if it is not what was written."""
    if not intact(value):
        raise ValueError(f"{path} is damaged, or was not written by this version of the package; {remedy}")
    return {key: item for key, item in value.items() if key != SEAL}


def signed(text: str) -> str:
    """A YAML file with a last line, a comment, that has the hash of the others."""
    return f"{text}# {SEAL}: {hash_of([text.encode()])}\n"


def unsigned(path: Path) -> str:
    """The text that was ``signed``. Raises ValueError if the file is something else."""
    try:
        lines = path.read_bytes().decode("utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it from a copy") from error
    text = "".join(lines[:-1])
    if signed(text) != "".join(lines):
        raise ValueError(
            f"{path} was changed after it was written, or not written by this version of the package; restore it from a copy"
        )
    return text
