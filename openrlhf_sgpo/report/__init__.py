"""report.html: a run, a comparison or a leaderboard as one page that needs no network, made with plotly.

The modules: ``markup`` escapes, ``page`` is the frame, with page.css and page.js, ``figures`` the plots, ``samples`` answers
side by side; ``run_page``, ``comparison_page`` and ``leaderboard_page`` say what stands on their pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from openrlhf_sgpo import extras
from openrlhf_sgpo.run_folder import write_text

REPORT = "report.html"
USAGE = """usage: openrlhf-sgpo report FOLDER...

Writes report.html into each folder, which is that of a run, a comparison or a leaderboard.
"""


def write_report(folder: Path) -> Path:
    """The page of a run (resolved_config.yaml), a comparison (comparison.json) or a leaderboard (leaderboard.json), written to
    ``folder``/report.html. Raises ValueError if the folder is none of them, or plotly is not installed."""
    if problem := extras.missing("plotly"):
        raise ValueError(f"{REPORT}: {problem}")
    folder = folder.absolute()
    if (folder / "comparison.json").is_file():
        from openrlhf_sgpo.report.comparison_page import comparison_page as page
    elif (folder / "leaderboard.json").is_file():
        from openrlhf_sgpo.report.leaderboard_page import leaderboard_page as page
    elif (folder / "resolved_config.yaml").is_file():
        from openrlhf_sgpo.report.run_page import run_page as page
    else:
        raise ValueError(
            f"{folder} has none of resolved_config.yaml, comparison.json and leaderboard.json: give the folder of a run, a "
            "comparison or a leaderboard"
        )
    path = folder / REPORT
    write_text(path, page(folder))
    return path


def main(argv: Sequence[str]) -> int:
    """The command ``openrlhf-sgpo report``: the page of every folder. Raises ValueError as ``write_report`` does."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE, end="")
        return 0 if argv else 2
    for word in argv:
        print(write_report(Path(word)))
    return 0


__all__ = ["REPORT", "main", "write_report"]
