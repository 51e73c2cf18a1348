"""Answers that cost something, kept by a hash of what was asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from openrlhf_sgpo.run_folder import json_text, parse_json


def content_key(*parts: Any) -> str:
    """A hash of JSON-serialisable parts; the order of a mapping's keys does not matter."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class ContentCache:
    """JSON-serialisable values by ``content_key``, in memory and, with a path, in a file that is only ever appended to.

    A value is a line of its own, written when it arrives, so that a killed process loses none but the one that it was
    writing. For one process: with several ranks, rank 0.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._known: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        for number, line in enumerate(path.read_text(encoding="ascii", errors="replace").split("\n"), start=1):
            try:
                row = parse_json(line)
                self._known[row["key"]] = row["value"]
            except (json.JSONDecodeError, LookupError, TypeError, RecursionError):
                continue  # the line that a killed process was writing, or one that is nothing of ours
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}; delete the line, and it is asked again") from None

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def __setitem__(self, key: str, value: Any) -> None:
        text = json_text({"key": key, "value": value}, ascii_only=True)
        self._known[key] = value
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="ascii") as file:
            # A killed process may have left a line without an end.
            file.write(f"\n{text}\n")
