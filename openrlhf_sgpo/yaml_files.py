"""YAML files written by users, with limits on size, depth and aliases, and errors that quote no line."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

LONGEST = 2**16  # bytes
DEEPEST = 32  # levels
MOST = 5_000  # values
NULL_TAG = "tag:yaml.org,2002:null"


class _Limited:
    """Mixed into a loader: makes unbounded nesting or growth an error at the place where it begins."""

    depth = 0
    values = 0  # composed so far; an alias counts as many as it stands for

    def compose_node(self: Any, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self.sizes:
                raise _problem(f"*{event.anchor} is inside the value that it stands for", event)
            self.values += self.sizes.get(event.anchor, 0)
        self.values += 1
        self.depth += 1
        if self.depth > DEEPEST:
            raise _problem(f"more than {DEEPEST} levels of nesting", event)
        if self.values > MOST:
            raise _problem(f"more than {MOST} values, including those that aliases stand for", event)
        before = self.values
        node = super().compose_node(parent, index)  # type: ignore[misc]
        if not isinstance(event, yaml.AliasEvent) and event.anchor:
            self.sizes[event.anchor] = 1 + self.values - before
        self.depth -= 1
        return node

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of values by anchor, for complete nodes."""
        return {}


def _problem(what: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)


class _Values(_Limited, yaml.SafeLoader):
    pass


class _Texts(_Limited, yaml.BaseLoader):
    """Leaves scalars as text, so 1e-6, 010 or 1:30 mean the same in a file as on the command line."""


_Texts.add_implicit_resolver(NULL_TAG, re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])


def load(path: Path) -> Any:
    """The file's value. Raises ValueError if it cannot be read."""
    return _read(path, yaml.load, _Values)


def load_text(text: str) -> Any:
    """The value of a YAML text. Raises ValueError with the reason if it cannot be read."""
    return _within_limits(text.encode("utf-8", "surrogateescape"), yaml.load, _Values)


def compose(path: Path) -> yaml.Node | None:
    """The file's nodes, with text or null as scalars; None for an empty file. Raises ValueError if it cannot be read."""
    return _read(path, yaml.compose, _Texts)


def _read(path: Path, how: Any, loader: Any) -> Any:
    try:
        with open(path, "rb") as file:
            return _within_limits(file.read(LONGEST + 1), how, loader)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{path} cannot be read: {reason}")


def _within_limits(content: bytes, how: Any, loader: Any) -> Any:
    """The value. Raises ValueError with the reason if it cannot be read."""
    try:
        if len(content) > LONGEST:
            raise yaml.YAMLError(f"more than {LONGEST // 1024} KiB")
        return how(content.decode("utf-8"), loader)
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8; convert the file"
    except yaml.MarkedYAMLError as error:
        # Without the line itself, which may contain a key.
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        reason = f"{line}{error.problem or error.context}"
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    # Raised for a text that does not match its tag, such as !!int x.
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError):
        reason = "a value does not fit its type"
    raise ValueError(reason)
