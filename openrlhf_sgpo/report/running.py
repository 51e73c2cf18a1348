"""What a run is doing, at the top of its page."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone

from markupsafe import Markup

from openrlhf_sgpo.report.markup import tag


@dataclass(frozen=True)
class Running:
    """The stage of a run that goes on. line: its announcement. place: among the ``stages`` of the run, from 0. began: when."""

    line: str
    place: int
    stages: int
    began: datetime


def running_banner(running: Running) -> Markup:
    """The stage with a progress bar over all stages, and when it began and the page was drawn. The page's script turns the
    times into ages, and loads the page again while it shows this."""
    bar = tag("progress", max=str(running.stages), value=str(running.place), aria_label="stages that are done")
    times = [
        "The stage began ",
        _time(running.began),
        "; the page was drawn ",
        _time(datetime.now(timezone.utc)),
        ", and loads itself again while the run goes on.",
    ]
    line = running.line[0].upper() + running.line[1:] + "."
    return tag("div", tag("strong", line), bar, tag("p", *times, class_="quiet"), class_="running")


def _time(moment: datetime) -> Markup:
    return tag("time", f"at {moment:%H:%M} UTC", datetime=moment.isoformat(timespec="seconds"))
