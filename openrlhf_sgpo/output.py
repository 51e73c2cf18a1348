"""Output of a command: its own lines on stdout, its progress on stderr, and the output of other packages in a log file.

Other packages write from Python, C++ and child processes, which share only the file descriptors 1 and 2. While a command
runs, these two are redirected to a log, and this package writes to copies of the originals.
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
SECONDS_BETWEEN_LINES = 30.0  # of progress, without a terminal


class _Apart:
    """Redirects descriptors 1 and 2 to a log; ``out`` and ``err`` write to the originals."""

    def __init__(self) -> None:
        # Until the run folder exists.
        self._early = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the descriptors point to it
        self._standard = sys.stdout, sys.stderr
        self._real = os.dup(1), os.dup(2)
        self.out, self.err = (self._copy(stream, number) for number, stream in enumerate(self._standard, 1))
        self._redirect(self._early.fileno())
        sys.stdout, sys.stderr = (
            open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            for number in (1, 2)
        )
        # Crashes without an exception are reported on the real stderr.
        self._faults = not faulthandler.is_enabled()
        if self._faults:
            faulthandler.enable(self._real[1])

    def _copy(self, stream: TextIO, number: int) -> TextIO:
        """A copy of a standard stream; any other stream, such as a notebook's, stays as it is."""
        try:
            is_standard = stream.fileno() == number
        except (OSError, ValueError, AttributeError):
            is_standard = False
        if not is_standard:
            return stream
        return open(
            self._real[number - 1], "w", buffering=1, encoding=stream.encoding, errors="backslashreplace", closefd=False
        )

    def _redirect(self, first: int, second: int | None = None) -> None:
        for stream in (*self._standard, sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(first, 1)
        os.dup2(first if second is None else second, 2)

    def log_to(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # All ranks and their children append to this file.
        with open(path, "ab") as file:
            file.write(f"== process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            file.flush()
            self._redirect(file.fileno())
            self._early.seek(0)
            shutil.copyfileobj(self._early, file)

    def end(self) -> None:
        self._redirect(*self._real)
        sys.stdout, sys.stderr = self._standard
        if self._faults:
            faulthandler.disable()
        for stream in (self.out, self.err):
            stream.flush()
        for descriptor in self._real:
            os.close(descriptor)
        self._early.close()


_apart: _Apart | None = None
last_log: Path | None = None  # of the current or last command


@contextlib.contextmanager
def other_packages_apart() -> Iterator[None]:
    """Within the block only ``say`` and ``Progress`` reach stdout and stderr. Other output goes to the file of ``log_to``,
    or is dropped if that is never called."""
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
    """Sends the output of other packages, including earlier output, to ``folder``/log.txt. Does nothing outside of
    ``other_packages_apart``, as in a notebook."""
    global last_log
    if _apart is not None:
        _apart.log_to(folder / LOG)
        last_log = folder / LOG


def say(text: object = "", end: str = "\n", is_error: bool = False) -> None:
    """Prints a line of this package on stdout, or on stderr."""
    streams = (sys.stdout, sys.stderr) if _apart is None else (_apart.out, _apart.err)
    print(text, end=end, file=streams[is_error], flush=True)


class Progress(tqdm):
    """A progress bar on a terminal, removed when done; elsewhere an occasional line, so that files stay readable."""

    def __init__(self, iterable: Iterable[Any] | None = None, **settings: Any):
        stream = sys.stderr if _apart is None else _apart.err
        self._lines = not stream.isatty()
        self._last = time.monotonic()
        if self._lines:
            settings.setdefault("bar_format", LINE)
        super().__init__(iterable, file=stream, leave=False, dynamic_ncols=not self._lines, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:  # a bool, contrary to tqdm's stubs
        if not self._lines:
            return super().display(msg, pos)
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(self, file=self.fp, flush=True)
        return True

    def close(self) -> None:
        if not self.disable and self._lines:
            self.sp = None  # no bar to erase
        super().close()


def stage_line(name: str, plan: Sequence[str], seconds: dict[str, float]) -> str:
    """The progress of a run, such as: stage 7 of 15, round 1: generate, about 12 min left.

    name, plan: stages by their ledger names, FOLDER/KIND. seconds: of finished stages. The time left is a sum over the
    remaining stages, each taking as long as the last one of its kind. It is omitted until every such kind has run once.
    """
    folder, _, kind = name.partition("/")
    where = "start" if folder == "initial" else folder.replace("_", " ")
    past = {stage.partition("/")[2]: seconds[stage] for stage in plan if stage in seconds and stage != name}
    coming = [stage.partition("/")[2] for stage in plan[plan.index(name) :]]
    line = f"stage {plan.index(name) + 1} of {len(plan)}, {where}: {kind}"
    return line if set(coming) - set(past) else f"{line}, {duration(sum(past[kind] for kind in coming))} left"


def duration(seconds: float) -> str:
    """An approximate duration in words."""
    if seconds < 60:
        return "less than a minute"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
