"""A cache of paid results by a hash of the request, in append-only files: a killed process loses only the line that it was
writing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openrlhf_sgpo.integrity import hash_of, intact, sealed, without_seal
from openrlhf_sgpo.output import say
from openrlhf_sgpo.run_folder import json_text, parse_json


def content_key(*parts: Any) -> str:
    """A hash of JSON-serialisable parts; the order of a mapping's keys does not matter."""
    return hash_of([json.dumps(parts, sort_keys=True).encode()])


def kept_lines(path: Path, remedy: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in the lines of a cache file; none if there is no file. Unfinished lines of a killed process are left
    out. Damaged lines are left out too, and a message says how many: their results are computed or requested again.

    Raises ValueError, which names the line and ends with ``remedy``, for a number that is not finite.
    """
    if not path.exists():
        return
    damaged = []
    for number, line in enumerate(path.read_text(encoding="ascii", errors="replace").split("\n"), start=1):
        try:
            value = parse_json(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; {remedy}") from None
        if intact(value):
            yield without_seal(value)
        else:
            damaged.append(number)
    if damaged:
        say(f"{path}: damaged lines, which are computed again: {len(damaged)}, the first is line {damaged[0]}")


def keep_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append a JSON object and its hash to a cache file, which is created if it does not exist."""
    text = json_text(sealed(value), ascii_only=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="ascii") as file:
        # A killed process may have left an unfinished line.
        file.write(f"\n{text}\n")


class ContentCache(dict[str, Any]):
    """JSON-serialisable values by ``content_key``, in memory and, with a path, in a file, to which each value is written when
    it arrives. For a single process: with several ranks, rank 0."""

    def __init__(self, path: Path | None = None):
        self.path = path
        stored = kept_lines(path, "delete the line to request it again") if path else ()
        super().__init__((row["key"], row["value"]) for row in stored)

    def __setitem__(self, key: str, value: Any) -> None:
        if self.path is not None:
            keep_line(self.path, {"key": key, "value": value})
        super().__setitem__(key, value)
