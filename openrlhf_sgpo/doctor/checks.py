"""A check and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "fails"]


@dataclass(frozen=True)
class Diagnosis:
    """section, name: where it stands in the report. status: note, if something is worth knowing. detail: what was seen.
    mend: the command, or the step, that makes it right; empty if nothing is wrong. stops: whether training cannot start."""

    section: str
    name: str
    status: Status
    detail: str = ""
    mend: str = ""
    stops: bool = False
