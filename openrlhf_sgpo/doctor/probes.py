"""Statements executed in a process of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openrlhf_sgpo.keys import redacted

_MARK = "openrlhf-sgpo doctor: "  # before the answer, because packages print too
_PACKAGES = str(Path(__file__).parents[2])
# The last package in the traceback that is not part of Python is the one that failed.
_CHILD = """
import json, sys
sys.path[:] = [path for path in sys.path if path] + [{packages!r}]
answer = {{}}
try:
    exec({code!r}, {{"answer": answer}})
except BaseException as error:
    place, frame = "", error.__traceback__
    while frame is not None:
        path = frame.tb_frame.f_code.co_filename.replace("\\\\", "/")
        if "-packages/" in path:
            place = path.rpartition("-packages/")[2].partition("/")[0].removesuffix(".py")
        frame = frame.tb_next
    text = " ".join(str(error).split()) or type(error).__name__
    missing = error.name if isinstance(error, ModuleNotFoundError) else ""
    answer = {{"error": type(error).__name__ + ": " + text, "missing": missing or "", "package": place}}
print({mark!r} + json.dumps(answer), flush=True)
sys.stdout.flush()
import os
os._exit(0)
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a statement. problem: in words, empty if it worked. missing: the module that is not installed. package: the
    one that failed. late: whether it took longer than its limit. values: what the statement put into ``answer``."""

    problem: str = ""
    missing: str = ""
    package: str = ""
    late: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)


def attempt(code: str, limit: float) -> Outcome:
    """Execute statements, which may fill the dictionary ``answer``, within ``limit`` seconds."""
    script = _CHILD.format(packages=_PACKAGES, code=code, mark=_MARK)
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return Outcome(f"took longer than {limit:g} seconds", late=True)
    lines = [line for line in output.splitlines() if line.startswith(_MARK)]
    if not lines:
        return Outcome(f"the process ended {_how(child.returncode)}")
    values = json.loads(lines[-1].removeprefix(_MARK))
    if "error" in values:
        problem = redacted(values["error"])
        short = problem if len(problem) <= 200 else f"{problem[:196]} ..."
        return Outcome(short, values["missing"], values["package"])
    return Outcome(values=values)


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"


def tool(*command: str, limit: float = 10.0) -> str:
    """The output of a program; empty if there is no such program, or it fails or hangs."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
