"""Why an engine failed. vLLM's processes write it to their log, and tell each other only to look there."""

from __future__ import annotations

import os
import re

# The process that says it, and the level, the time and the place of what it logs.
_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[\S+\] )?")
_POINTER = "root cause"  # in messages that say no more than where to look
_MUCH = 2**20  # bytes


def last_error(log: str) -> str:
    """The last exception of which a log has a traceback; empty if there is none that says more than where to look."""
    last, inside = "", False
    for line in log.splitlines():
        text = _PREFIX.sub("", line)
        if text.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and text and not text[0].isspace():
            inside = False
            last = last if _POINTER in text else text
    return last


def reason_of(error: BaseException, log: str) -> str:
    """Why an engine with this log failed with this error, in one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = " ".join(line for line in lines if line and not line.startswith("For further information"))
    if _POINTER not in said:
        return said
    return last_error(log) or "its process ended without a message, as it does where memory runs out"


def last_line(error: BaseException) -> str:
    """The cause of one of Ray's errors, whose messages begin with a traceback."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def own_log() -> str:
    """The end of what this process, an actor of Ray, and those that it has started have written."""
    parts = []
    for number in (1, 2):
        path = os.readlink(f"/proc/self/fd/{number}")
        if os.path.isfile(path):
            with open(path, "rb") as file:
                file.seek(max(0, os.path.getsize(path) - _MUCH))
                parts.append(file.read().decode(errors="replace"))
    return "\n".join(reversed(parts))  # of the two, stdout has vLLM's log
