"""V over the radius: what a follower of any strength would cost the policies of a run, or of a comparison, and which of them it
costs less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from markupsafe import Markup

from openrlhf_sgpo.dro import saving, support_of, worst_case_curve
from openrlhf_sgpo.dro.curve import certified_curve
from openrlhf_sgpo.intervals import NORMAL_95
from openrlhf_sgpo.report.figures import Series, lines, plot, plots
from openrlhf_sgpo.report.markup import MISSING, html_table, number, tag, with_minus_sign
from openrlhf_sgpo.report.moments import Moment
from openrlhf_sgpo.table import plus_minus

# Curves reach this many times the run's radius, or this far at radius 0.
REACH, REACH_AT_0 = 10, 0.1
POINTS = 41
_UNITS = {"margin": "mean distance of margins", "probability": "mean distance of win probabilities"}


def robustness(moments: Sequence[Moment]) -> list[Markup]:
    """V of the policies on the held-out pairs, and of each round's own pairs before and after it; empty for a run without a
    follower that looks for the worst case."""
    rounds = [moment for moment in moments if moment.certificate.get("ball") == "worst"]
    if not rounds:
        return []
    game = rounds[-1].certificate
    radii = radii_up_to(game["radius"])
    trained = [
        value_plot(
            f"Worst-case loss in {moment.name}",
            radii,
            dict(zip(("before", "after"), _before_and_after(moment.certificate, radii), strict=True)),
            moment.certificate["radius"],
            f"{len(moment.certificate['after']['pairs'])} of its pairs, before and after",
            game["space"],
        )
        for moment in rounds
        if "after" in moment.certificate
    ]
    held_out = _held_out(moments, game, radii)
    return [plots(*held_out[:2], *trained), *held_out[2:]] if held_out or trained else []


def compared_robustness(worst_case: Mapping[str, Any]) -> list[Markup]:
    """V of the groups of a comparison on their held-out pairs, and how much more of it than each SGPO group the others have.
    worst_case: of comparison.json, empty if it has none."""
    if not worst_case:
        return []
    radii, curves, differences = (worst_case[name] for name in ("radii", "curves", "differences"))
    by_pair: dict[tuple[str, str], dict[float, str]] = {}
    for row in differences:
        cell = plus_minus(row["difference"], (row["high"] - row["low"]) / 2, 4)
        by_pair.setdefault((row["first"], row["second"]), {})[row["radius"]] = cell
    rows = [
        [f"{first}, compared with {second}", by_radius[0.0], f"{max(by_radius):g}", by_radius[max(by_radius)]]
        for (first, second), by_radius in by_pair.items()
    ]
    note = (
        f"V, the mean of DPO's loss on the {worst_case['pairs']} held-out pairs if a follower may move their margins by the "
        f"radius on average, but not below {with_minus_sign(worst_case['edge'], 3)}; mean over seeds. The table has V of the "
        "first group minus that of the second. Below 0 at radius 0: what robustness costs the second; above 0 at its own "
        "radius: what it buys."
    )
    plotted = [
        value_plot("Worst-case loss of the held-out pairs", radii, curves, 0.0, "mean over seeds"),
        *(
            value_plot(
                f"Worst-case loss, compared with {robust}",
                radii,
                {name: np.subtract(curve, curves[robust]) for name, curve in curves.items()},
                max(row["radius"] for row in differences if row["second"] == robust),
                f"above 0: more loss than {robust}",
            )
            for robust in dict.fromkeys(second for _, second in by_pair)
        ),
    ]
    header = ["", "at radius 0", "radius", "at this radius"]
    return [plots(*plotted), html_table(header, rows), tag("p", note, class_="quiet")]


def radii_up_to(radius: float) -> list[float]:
    """Where curves are drawn for a run of this radius."""
    return np.linspace(0.0, REACH * radius or REACH_AT_0, POINTS).tolist()


def value_plot(
    title: str,
    radii: Sequence[float],
    curves: Mapping[str, npt.ArrayLike],
    radius: float,
    note: str,
    space: str = "margin",
) -> Markup:
    """Curves by name over ``radii``, with a mark at the ``radius`` of the run."""
    series = [Series(name, radii, np.asarray(values).tolist()) for name, values in curves.items()]
    figure = lines(series, x_title=f"radius, {_UNITS[space]}", breaks=[radius] if radius else [])
    return plot(title, figure, note, height=300)


def _before_and_after(certificate: Mapping[str, Any], radii: Sequence[float]) -> list[npt.NDArray[np.float64]]:
    after = certificate["after"]
    before = [certificate["margins"][pair] for pair in after["pairs"]]
    return [certified_curve(certificate, margins, radii) for margins in (before, after["margins"])]


def _held_out(moments: Sequence[Moment], game: Mapping[str, Any], radii: Sequence[float]) -> list[Markup]:
    """Plot of V, plot of what is saved since the base, table and note; empty without held-out pairs."""
    measured = [moment for moment in moments if moment.margins]
    ids = [key for key in measured[0].margins if all(key in moment.margins for moment in measured)] if measured else []
    if len(measured) < 2 or not ids:
        return []
    margins = {
        moment.name: torch.tensor([moment.margins[key] for key in ids], dtype=torch.float64) for moment in measured
    }
    # The seed stage of a run with rounds is DPO on the human pairs.
    base = "round 0" if {"round 0", "round 1"} <= margins.keys() else measured[0].name
    window = support_of(margins.values(), game["space"])
    problem: dict[str, Any] = {"space": game["space"], "pieces": game["pieces"], "window": window}
    curves = {name: worst_case_curve(values, radii, **problem) for name, values in margins.items()}
    saved = {name: curves[base] - curve for name, curve in curves.items()}
    radius = game["radius"]
    loss = f"of {game['pieces']} tangents of the loss" if game["pieces"] else "of DPO's loss"
    header = ["", "radius 0", f"saved against {base}", f"radius {radius:g}", f"saved against {base}"]
    rows = []
    for name, values in margins.items():
        cells = [name]
        for place in dict.fromkeys((0.0, radius)):
            figures = saving(values, margins[base], place, **problem)
            half = None if figures.error is None else NORMAL_95 * figures.error
            cells += [number(figures.value, 4), MISSING if name == base else plus_minus(figures.saved, half, 4)]
        rows.append(cells)
    unit = "win probabilities" if game["space"] == "probability" else "margins"
    note = (
        f"V, the mean {loss} on the {len(ids)} held-out pairs, if a follower may move their {unit} by the radius on average, "
        f"but not below {with_minus_sign(window[0], 3)}. A policy that gives up loss at radius 0 and saves some at the run's "
        "radius has bought robustness; one that saves as much at both is better with or without a follower. "
        + ("Round 0 is DPO on the human pairs. " if base == "round 0" else "")
        + "To compare with DPO on the same rounds: openrlhf-sgpo compare."
    )
    return [
        value_plot("Worst-case loss of the held-out pairs", radii, curves, radius, "by policy", game["space"]),
        value_plot(
            f"Saved against {base}",
            radii,
            saved,
            radius,
            f"above 0: less worst-case loss than {base}",
            game["space"],
        ),
        html_table(header[: len(rows[0])], rows),
        tag("p", note, class_="quiet"),
    ]
