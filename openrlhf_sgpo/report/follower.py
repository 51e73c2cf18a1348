"""The margins that a round's follower saw and how it moved them, solved again from the stored certificate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from openrlhf_sgpo.dro import solve_best_case, solve_worst_case
from openrlhf_sgpo.report.figures import histogram, plot
from openrlhf_sgpo.report.markup import tiny, with_minus_sign

# Figures of the certificate, in the order of docs/algorithms/sgpo.md.
FIGURES = (
    *("value", "dual_value", "gap", "empirical", "bound", "slope", "edge", "level", "threshold"),
    *(
        "fraction_moved",
        "budget_used",
        "radius",
        "delta_K",
        "value_before",
        "value_after",
        "grouping_loss",
        "groups",
        "pairs",
    ),
)
BINS = 40


@dataclass(frozen=True)
class Moved:
    """The follower's answer in its space, margin or probability.

    places: (N,) values of the pairs. share: (N,) of each pair's mass that moves. target: where the mass goes. threshold: value
    of the pair on the verge of moving."""

    places: np.ndarray
    share: np.ndarray
    target: float
    threshold: float


def solve_again(certificate: dict[str, Any]) -> Moved | None:
    """The follower's answer at the start of the round; None at radius 0, and for a follower solved in groups, whose members
    are not stored."""
    if certificate.get("groups", 1) != 1 or not certificate.get("radius"):
        return None
    margins = torch.tensor(certificate["margins"], dtype=torch.float32)  # as the follower had them
    space = certificate["space"]
    places = (torch.sigmoid(margins.double()) if space == "probability" else margins.double()).numpy()
    if certificate["ball"] == "best":
        best = solve_best_case(margins, certificate["radius"], space=space)
        return Moved(places, (best.raised > 0).double().numpy(), best.level, best.level)
    worst = solve_worst_case(
        margins,
        certificate["radius"],
        space=space,
        pieces=certificate["pieces"],
        window=tuple(certificate["window"]),
    )
    threshold = torch.tensor(worst.threshold, dtype=torch.float64)
    return Moved(
        places,
        worst.moved.double().numpy(),
        worst.edge,
        float(torch.sigmoid(threshold) if space == "probability" else threshold),
    )


@dataclass(frozen=True)
class Counts:
    """A histogram of margins, or of win probabilities, in parts that are stacked. edges: of the bins. moved: what the follower
    moves, None if that cannot be computed, and then ``parts`` is the pairs alone."""

    parts: dict[str, list[float]]
    edges: np.ndarray
    moved: Moved | None


def count_margins(certificate: dict[str, Any]) -> Counts:
    """The margins of a round at its start: what stays, what the follower moves away, and where it arrives."""
    moved = solve_again(certificate)
    if moved is None:
        values = np.array(certificate["margins"])
        edges = _bins(values, "margin")
        return Counts({"pairs": np.histogram(values, edges)[0].tolist()}, edges, None)
    edges = _bins(np.append(moved.places, moved.target), certificate["space"])
    parts = {
        "stays": np.histogram(moved.places, edges, weights=1 - moved.share)[0].tolist(),
        "leaves": np.histogram(moved.places, edges, weights=moved.share)[0].tolist(),
        "arrives": np.histogram([moved.target], edges, weights=[moved.share.sum()])[0].tolist(),
    }
    return Counts(parts, edges, moved)


def follower_plot(name: str, certificate: dict[str, Any]) -> Markup:
    """The histogram of a round's margins at its start, with the mass that moves and its target if they can be computed."""
    counts = count_margins(certificate)
    moved, edges = counts.moved, counts.edges.tolist()
    if moved is None:
        still = certificate.get("radius") == 0
        note = "at radius 0 nothing moves" if still else "the moves cannot be computed from the stored figures"
        figure = histogram(counts.parts, edges, "margin")
        return plot(f"Margins at the start of {name}", figure, note, height=300)
    marks = {"threshold": moved.threshold}
    figure = histogram(counts.parts, edges, certificate["space"], marks, hatched="leaves")
    note = (
        f"{moved.share.mean():.1%} of the mass goes to {with_minus_sign(moved.target, 3)}: loss "
        f"{certificate['empirical']:.4f} without the follower, {certificate['value']:.4f} with it, duality gap "
        f"{tiny(certificate['gap'])}"
    )
    return plot(f"Margins at the start of {name}, and what the follower moves", figure, note, height=300)


def follower_image(name: str, certificate: dict[str, Any]) -> np.ndarray:
    """The same histogram as a picture, (400, 640, 3) of uint8, drawn by matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = count_margins(certificate)
    figure = Figure(figsize=(6.4, 4.0), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    centres, below = (counts.edges[1:] + counts.edges[:-1]) / 2, np.zeros(len(counts.edges) - 1)
    for part, heights in counts.parts.items():
        hatch = "//" if part == "leaves" else None
        axes.bar(centres, heights, np.diff(counts.edges), bottom=below, label=part, hatch=hatch)
        below += heights
    if counts.moved:
        axes.axvline(counts.moved.threshold, color="black", linestyle=":", label="threshold")
        axes.legend()
    axes.set(title=f"Margins at the start of {name}", xlabel=certificate["space"], ylabel="pairs")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _bins(values: np.ndarray, space: str) -> np.ndarray:
    """Edges of bins of equal width that cover all values; in probability space, [0, 1]."""
    low, high = (0.0, 1.0) if space == "probability" else (values.min(), values.max())
    return np.linspace(low, high if high > low else low + 1.0, BINS + 1)
