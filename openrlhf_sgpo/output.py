"""What a command says: its own lines on stdout, its progress on stderr, and all that other packages say in a log file.

Other packages write from Python, from C++ and from processes of their own, and share nothing but the file descriptors 1 and 2.
While a command works, these two lead to a log, and this package writes to copies of the real ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

LOG = "log.txt"
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left{postfix}"
SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal


class _Apart:
    """Descriptors 1 and 2 lead to a log; ``out`` and ``err`` are what they were."""

    def __init__(self) -> None:
        # Until there is a run folder.
        self._early = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the descriptors lead to it
        self._standard = sys.stdout, sys.stderr
        self._real = os.dup(1), os.dup(2)
        self.out, self.err = (self._copy(stream, number) for number, stream in enumerate(self._standard, 1))
        self._lead_to(self._early.fileno())
        sys.stdout, sys.stderr = (
            open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            for number in (1, 2)
        )
        # What ends the process without an exception is told where people look.
        self._faults = not faulthandler.is_enabled()
        if self._faults:
            faulthandler.enable(self._real[1])

    def _copy(self, stream: TextIO, number: int) -> TextIO:
        """A stream that is not the process's own, as of a notebook, stays what it is."""
        try:
            own = stream.fileno() == number
        except (OSError, ValueError, AttributeError):
            own = False
        if not own:
            return stream
        return open(
            self._real[number - 1], "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False
        )

    def _lead_to(self, first: int, second: int | None = None) -> None:
        for stream in (*self._standard, sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(first, 1)
        os.dup2(first if second is None else second, 2)

    def log_to(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # All ranks, and their children, append to one file.
        with open(path, "ab") as file:
            file.write(f"== process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            file.flush()
            self._lead_to(file.fileno())
            self._early.seek(0)
            shutil.copyfileobj(self._early, file)

    def end(self) -> None:
        self._lead_to(*self._real)
        sys.stdout, sys.stderr = self._standard
        if self._faults:
            faulthandler.disable()
        for stream in (self.out, self.err):
            stream.flush()
        for descriptor in self._real:
            os.close(descriptor)
        self._early.close()


_apart: _Apart | None = None
last_log: Path | None = None  # of the command that runs, or has just ended


@contextlib.contextmanager
def other_packages_apart() -> Iterator[None]:
    """Within the block only ``say`` and ``Progress`` reach stdout and stderr. What else is written there goes to the file of
    ``log_to``, and is dropped if that is never called."""
    global _apart
    if _apart is not None:  # a command within a command
        yield
        return
    _apart = _Apart()
    try:
        yield
    finally:
        _apart.end()
        _apart = None


def log_to(folder: Path) -> None:
    """From now on, and what was said before: other packages to ``folder``/log.txt. Outside of ``other_packages_apart``, as in a
    notebook, nothing is changed."""
    global last_log
    if _apart is not None:
        _apart.log_to(folder / LOG)
        last_log = folder / LOG


def say(text: object = "", end: str = "\n") -> None:
    """A line of this package on stdout."""
    print(text, end=end, file=sys.stdout if _apart is None else _apart.out, flush=True)


class Progress(tqdm):
    """A bar on a terminal, gone when it is done; elsewhere a line from time to time, so that a file of them can be read."""

    def __init__(self, iterable: Iterable[Any] | None = None, **settings: Any):
        stream = sys.stderr if _apart is None else _apart.err
        self._lines = not stream.isatty()
        self._last = time.monotonic()
        if self._lines:
            settings.setdefault("bar_format", LINE)
        super().__init__(iterable, file=stream, leave=False, dynamic_ncols=not self._lines, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:  # a bool, which its stubs do not know
        if not self._lines:
            return super().display(msg, pos)
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(self, file=self.fp, flush=True)
        return True

    def close(self) -> None:
        if not self.disable and self._lines:
            self.sp = None  # there is nothing to wipe out
        super().close()


def stage_line(name: str, plan: Sequence[str], seconds: dict[str, float]) -> str:
    """Where a run is, such as: stage 7 of 15, round 1: generate, about 12 min left.

    name, plan: stages as the ledger calls them, FOLDER/KIND. seconds: of finished stages. The time left is the sum over the
    stages to come of what the last one of the same kind took. It is left out until each of these kinds has been there once.
    """
    folder, _, kind = name.partition("/")
    where = "start" if folder == "initial" else folder.replace("_", " ")
    known = {other.partition("/")[2]: seconds[other] for other in plan if other in seconds and other != name}
    coming = [other.partition("/")[2] for other in plan[plan.index(name) :]]
    line = f"stage {plan.index(name) + 1} of {len(plan)}, {where}: {kind}"
    return line if set(coming) - set(known) else f"{line}, {duration(sum(known[other] for other in coming))} left"


def duration(seconds: float) -> str:
    """About so long, in the unit that suits it."""
    if seconds < 60:
        return "less than a minute"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
