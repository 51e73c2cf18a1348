"""What trackers get of a round besides its steps: the evaluation, the follower's certificate, and a picture of its margins."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openrlhf_sgpo import extras
from openrlhf_sgpo.output import say
from openrlhf_sgpo.run_folder import CERTIFICATE, read_json

if TYPE_CHECKING:
    from openrlhf_sgpo.metrics import Metrics

EVALUATED = ("accuracy", "margin", "kl", "response_length", "truncated", "win_rate")


def track_round(metrics: Metrics, path: Path, row: Mapping[str, Any]) -> None:
    """Log the evaluation ``row`` of the round in ``path``, as eval/NAME, and its certificate, as follower/NAME, if it has
    one."""
    if not metrics.trackers:
        return
    figures = {f"eval/{name}": row[name] for name in EVALUATED if row.get(name) is not None}
    certificate = read_json(path / CERTIFICATE) if (path / CERTIFICATE).exists() else {}
    images = {}
    if certificate:
        # These import torch and the solver, which a run has in memory and the settings have not.
        from openrlhf_sgpo.report.follower import FIGURES, follower_image

        figures |= {f"follower/{name}": certificate[name] for name in FIGURES if certificate.get(name) is not None}
        if problem := extras.missing("matplotlib"):
            _say_no_pictures(problem)
        else:
            images["follower/margins"] = follower_image(row["name"], certificate)
    metrics.track(figures, images)


@cache
def _say_no_pictures(problem: str) -> None:
    say(f"trackers get no pictures of margins: {problem}")
