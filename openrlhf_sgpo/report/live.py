"""What a run that goes on writes for its readers: report.html, drawn again when a stage begins and as steps are taken, at
little cost; and the model cards of its rounds."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from openrlhf_sgpo.output import say
from openrlhf_sgpo.report import REPORT, write_report
from openrlhf_sgpo.report.model_card import write_cards
from openrlhf_sgpo.report.moments import Moment, moments_so_far
from openrlhf_sgpo.report.running import Running
from openrlhf_sgpo.run_folder import CARD, RunFolder

SHARE = 50  # drawing takes at most this part of the time: a stage that is over sooner is not worth a page
SECONDS_BETWEEN_DRAWINGS = 60.0  # within a stage


class LivePage:
    """Draws the page of a run as the run goes on. A failure is printed once and stops nothing. writes: whether this rank draws;
    on others every method does nothing."""

    def __init__(self, folder: Path, writes: bool):
        self.folder = folder
        self._writes = writes
        self._running: Running | None = None
        self._finished: dict[int | None, Moment] = {}  # rounds that have been read
        self._drawn = self._cost = 0.0
        self._failed: set[str] = set()

    def begin_stage(self, line: str, place: int, stages: int) -> None:
        """A stage begins, and the one before has ended. line: its announcement. place: of the stage among all ``stages``,
        from 0."""
        self._running = Running(line, place, stages, datetime.now(timezone.utc))
        if not self._drawn or time.monotonic() - self._drawn >= SHARE * self._cost:
            self._draw()

    def step(self) -> None:
        """A step of training was taken."""
        if time.monotonic() - self._drawn >= max(SECONDS_BETWEEN_DRAWINGS, SHARE * self._cost):
            self._draw()

    def end(self, moments: Sequence[Moment]) -> Path | None:
        """The run has ended. moments: all of them. Returns the path of the page; None if it could not be drawn."""
        self._running = None
        return self._draw(moments)

    def write_cards(self, number: int) -> None:
        """The model cards of a round that has been evaluated."""
        if self._writes:
            with self._not_worth_a_run(CARD, f"of round {number} is not written"):
                write_cards(RunFolder(str(self.folder)), number, self._finished)

    def close(self) -> None:
        """If the run stops before its end, the page no longer says that it goes on."""
        if self._running:
            self._running = None
            self._draw()

    def _draw(self, moments: Sequence[Moment] | None = None) -> Path | None:
        if not self._writes:
            return None
        began, path = time.monotonic(), None
        with self._not_worth_a_run(REPORT, f"is not drawn; openrlhf-sgpo report {self.folder} tries again"):
            if moments is None:
                moments = moments_so_far(self.folder, self._finished)
            path = write_report(self.folder, moments, self._running)
        self._drawn = time.monotonic()
        self._cost = self._drawn - began
        return path

    @contextmanager
    def _not_worth_a_run(self, file: str, problem: str) -> Iterator[None]:
        """An error in the block is printed, the first about this file on stdout too, and does not end the run."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stderr)  # to the run's log
            if file not in self._failed:
                say(f"{file} {problem} ({type(error).__name__}: {error})")
            self._failed.add(file)
