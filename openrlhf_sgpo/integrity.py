"""Detects changed files: digests of files, kept in a manifest, and JSON objects that contain their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SEAL = "blake2b"
WEIGHTS = (".safetensors", ".bin")
LARGE = 2**26  # bytes; of larger files of weights only the ends are read
PART = 2**20


def hash_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def files_in(path: Path) -> list[Path]:
    """The file, or the files in the folder; none if it does not exist."""
    return sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path] if path.is_file() else []


def file_digest(path: Path) -> dict[str, Any]:
    """Size in bytes and hash of a file, and the number of rows of a JSONL file.

    For weights beyond 64 MiB, only the first and last MiB are hashed. With the size, this detects a file that is missing, cut
    or of another model, because a safetensors file begins with the names and shapes of its tensors; reading 16 GB whenever a
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
    facts: dict[str, Any] = {"bytes": size, SEAL: digest.hexdigest()}
    return {"rows": rows, **facts} if path.suffix == ".jsonl" else facts


def model_digest(folder: Path) -> str:
    """A hash of a model's weights, configuration and templates: its name does not say that it is still the same one."""
    files = [path for path in files_in(folder) if path.suffix in (*WEIGHTS, ".json", ".jinja")]
    return hash_of([json.dumps({path.name: file_digest(path) for path in files}).encode()])


def rows_digest(content: bytes) -> dict[str, Any]:
    """The ``file_digest`` of a JSONL file with this content."""
    return {"rows": content.count(b"\n"), "bytes": len(content), SEAL: hash_of([content])}


def check_digest(what: str, actual: Mapping[str, Any], expected: Mapping[str, Any], remedy: str) -> None:
    """Raises ValueError, with ``what`` first and ``remedy`` last, unless the digests are equal."""
    for unit in ("rows", "bytes"):
        if actual.get(unit) != expected.get(unit):
            raise ValueError(
                f"{what}: {expected.get(unit)} {unit} were written, {actual.get(unit)} are there; {remedy}"
            )
    if actual != expected:
        raise ValueError(f"{what} was changed after it was written; {remedy}")


def check_file(path: Path, expected: Mapping[str, Any], remedy: str) -> None:
    """Raises ValueError unless the file has this ``file_digest``."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; {remedy}")
    check_digest(str(path), file_digest(path), expected, remedy)


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object with a hash of its content added."""
    content = without_seal(value)
    return content | {SEAL: hash_of([json.dumps(content, sort_keys=True).encode()])}


def without_seal(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key != SEAL}


def intact(value: Any) -> bool:
    """Whether this is an unchanged result of ``sealed``."""
    return isinstance(value, dict) and value == sealed(value)


def unsealed(path: Path, value: Any, remedy: str) -> dict[str, Any]:
    """A ``sealed`` object read from ``path``, without its hash. Raises ValueError if it was changed."""
    if not intact(value):
        raise ValueError(f"{path} is damaged, or was not written by this version of the package; {remedy}")
    return without_seal(value)


def signed(text: str) -> str:
    """The text of a YAML file, with a last comment line that contains the hash of the others."""
    return f"{text}# {SEAL}: {hash_of([text.encode()])}\n"


def unsigned(path: Path) -> str:
    """The ``signed`` text in a file, without the hash. Raises ValueError if the file was changed."""
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
