"""What robustness costs and buys: V of the groups of a comparison, on the held-out pairs that they share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from openrlhf_sgpo.comparison.compared_runs import RunGroup
from openrlhf_sgpo.comparison.head_to_head import Row
from openrlhf_sgpo.dro import influences, support_of, worst_case_curve
from openrlhf_sgpo.intervals import two_level_mean
from openrlhf_sgpo.report.robustness import radii_up_to

# Algorithms whose radius is that of a Wasserstein ball on margins.
_ALGORITHMS = ("sgpo", "sgpo_transport")


def worst_cases(groups: Sequence[RunGroup]) -> Row | None:
    """V over the radius of each group, in margin space with the exact loss and one support for all, and for each SGPO group how
    much more loss than it every other group has: at radius 0, where V is DPO's loss, and at its own radius.

    Differences are V(other) - V(SGPO), with intervals over seeds and pairs. None without an SGPO group in margin space with a
    radius, or where margins cannot be compared: other pairs, none, or another beta.
    """
    radii = {group.name: radius for group in groups if (radius := _radius(group))}
    margins = {group.name: [run.margins() for run in group.runs] for group in groups}
    ids = list(margins[groups[0].name][0])
    betas = {run.settings["model"]["beta"] for group in groups for run in group.runs}
    same = all(run.keys() == set(ids) for runs in margins.values() for run in runs)
    if not radii or not ids or not same or len(betas) > 1:
        return None
    tables = {
        name: [torch.tensor([run[key] for key in ids], dtype=torch.float64) for run in runs]
        for name, runs in margins.items()
    }
    window = support_of(run for runs in tables.values() for run in runs)
    places = radii_up_to(max(radii.values()))
    curves = {
        name: np.mean([worst_case_curve(run, places, window=window) for run in runs], axis=0).tolist()
        for name, runs in tables.items()
    }
    differences = []
    for robust, radius in radii.items():
        for place in (0.0, radius):
            shares = {
                name: np.stack([influences(run, place, window=window).numpy() for run in runs])
                for name, runs in tables.items()
            }
            for other in tables:
                if other != robust:
                    estimate = two_level_mean(shares[other][:, None, :] - shares[robust][None, :, :])
                    low, high = estimate.interval()
                    figures = {"radius": place, "difference": estimate.mean, "low": low, "high": high}
                    differences.append({"first": other, "second": robust, **figures})
    return {"pairs": len(ids), "edge": window[0], "radii": places, "curves": curves, "differences": differences}


def _radius(group: RunGroup) -> float:
    settings = group.runs[0].settings
    options = settings.get(settings["algo"], {})
    in_margins = settings["algo"] in _ALGORITHMS and options.get("space", "margin") == "margin"
    return options["radius"] if in_margins else 0.0
