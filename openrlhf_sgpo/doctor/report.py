"""The command ``doctor``: all checks, as text for a terminal of 80 columns or as JSON for an issue report."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from openrlhf_sgpo import __version__
from openrlhf_sgpo.doctor.checks import Diagnosis
from openrlhf_sgpo.doctor.features import attempt_all, feature_checks
from openrlhf_sgpo.doctor.machine import gpu_checks, network_checks, system_checks
from openrlhf_sgpo.doctor.packages import version_checks

LIMIT = 120.0  # seconds for each process; a cold disk is slow
WIDTH = 80
USAGE = f"""usage: openrlhf-sgpo doctor [--json] [--offline] [--timeout SECONDS]

Checks this machine: packages, GPUs, disks, network, and what works of each
feature, with the command that mends what does not. No key is shown.

  --json             print JSON, for an issue report
  --offline          do not ask whether the hub answers
  --timeout SECONDS  for each process that imports (default: {LIMIT:g})

The exit code is 0 if training would start, and 1 if not.
It needs nothing but Python, and this package.
"""
_COLOURS = {"ok": "32", "note": "33", "fails": "31"}


def examine(limit: float = LIMIT, offline: bool = False) -> list[Diagnosis]:
    """All checks. limit: seconds for each process that imports packages. offline: the hub is not asked."""
    torch, answers = attempt_all(limit)
    on_gpu = bool(torch.values.get("usable")) or shutil.which("nvidia-smi") is not None
    extra = "gpu" if on_gpu else "cpu"
    return [
        *system_checks(),
        *gpu_checks(torch),
        *version_checks(extra),
        *feature_checks(answers, extra, limit),
        *network_checks(offline),
    ]


def starts(checks: Sequence[Diagnosis]) -> bool:
    """Whether training would start."""
    return not any(check.stops and check.status == "fails" for check in checks)


def text_of(checks: Sequence[Diagnosis], colour: bool = False) -> str:
    """The report, at most ``WIDTH`` columns wide but for words that are longer."""
    lines = [f"openrlhf-sgpo {__version__}"]
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            lines += ["", section]
        mark = f"\x1b[{_COLOURS[check.status]}m{check.status:<5}\x1b[0m" if colour else f"{check.status:<5}"
        words = f"{check.name}: {check.detail}" if check.detail else check.name
        first, *rest = _wrapped(words, 9) or [""]
        lines.append(f"  {mark}  {first.lstrip()}")
        lines += rest
        if check.mend:
            lines += _wrapped(f"-> {check.mend}", 9)
    verdict = "training would start" if starts(checks) else "training would not start"
    failing = sum(check.status == "fails" for check in checks)
    lines += ["", f"{verdict}; {failing} of {len(checks)} checks fail"]
    return "\n".join(lines)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 3 * text.startswith("-> ")),
        break_long_words=False,
        break_on_hyphens=False,
    )


def main(argv: Sequence[str]) -> int:
    """Print the report. Returns 0 if training would start, 1 if not, 2 for arguments that are not known."""
    words = list(argv)
    if {"-h", "--help"} & set(words):
        print(USAGE, end="")
        return 0
    limit, as_json, offline = LIMIT, False, False
    while words:
        word = words.pop(0)
        if word == "--json":
            as_json = True
        elif word == "--offline":
            offline = True
        elif word == "--timeout" and words and _seconds(words[0]):
            limit = _seconds(words.pop(0))
        else:
            print(f"error: unexpected {word!r}; --timeout takes a number of seconds above 0\n{USAGE}", file=sys.stderr)
            return 2
    if not as_json and sys.stderr.isatty():
        print("importing packages, up to a few minutes ...", file=sys.stderr)
    checks = examine(limit, offline)
    if as_json:
        result = {"version": __version__, "starts": starts(checks), "checks": [asdict(check) for check in checks]}
        print(json.dumps(result, indent=2).replace(os.path.expanduser("~"), "~"))
    else:
        print(text_of(checks, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return 0 if starts(checks) else 1


def _seconds(text: str) -> float:
    """A positive number; 0 for anything else."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 < value < float("inf") else 0.0
