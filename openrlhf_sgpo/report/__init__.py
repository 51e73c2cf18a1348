"""report.html: a run, a comparison or a leaderboard as one page with plotly figures, which needs no network.

``markup`` escapes text, ``page`` (with page.css and page.js) is the frame, ``figures`` makes plots, ``samples`` shows answers
side by side; ``moments`` reads the rounds of a run; ``run_page``, ``comparison_page`` and ``leaderboard_page`` compose the
three pages; ``live`` draws that of a run as it goes on, with ``running`` at its top.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from openrlhf_sgpo import extras
from openrlhf_sgpo.run_folder import write_text

if TYPE_CHECKING:
    from openrlhf_sgpo.report.moments import Moment
    from openrlhf_sgpo.report.running import Running

REPORT = "report.html"


def write_report(folder: Path, moments: Sequence[Moment] | None = None, running: Running | None = None) -> Path:
    """Write ``folder``/report.html for a run (resolved_config.yaml), comparison (comparison.json) or leaderboard
    (leaderboard.json). moments: of a run, where they have been read already. running: its stage, if it goes on. Raises
    ValueError if the folder is none of these, or plotly is not installed."""
    if problem := extras.missing("plotly"):
        raise ValueError(f"{REPORT}: {problem}")
    folder = folder.absolute()
    if (folder / "comparison.json").is_file():
        from openrlhf_sgpo.report.comparison_page import comparison_page as page
    elif (folder / "leaderboard.json").is_file():
        from openrlhf_sgpo.report.leaderboard_page import leaderboard_page as page
    elif (folder / "resolved_config.yaml").is_file():
        from openrlhf_sgpo.report.run_page import run_page

        page = partial(run_page, moments=moments, running=running)
    else:
        raise ValueError(
            f"{folder} has none of resolved_config.yaml, comparison.json and leaderboard.json: give the folder of a run, a "
            "comparison or a leaderboard"
        )
    path = folder / REPORT
    write_text(path, page(folder))
    return path


__all__ = ["REPORT", "write_report"]
