"""Plots of policies with three actions: paths on the simplex and the points they should reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openrlhf_sgpo.games.tabular import Array

# Okabe and Ito's colours, distinct under all common forms of colour vision; paths also differ by dashes, targets by shape.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (1, 1)))
SHAPES = ("*", "s", "D", "^", "v", "P", "X", "h", "<", ">")
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])  # first action bottom left, third on top
GREY = "#8c8c8c"
NO_METADATA = {"Date": None, "Creator": None}  # these would differ between runs


def to_plane(policies: Any) -> Array:
    """Maps policies of shape (..., 3) to points of the triangle ``CORNERS``, coordinates of shape (..., 2)."""
    return np.asarray(policies, np.float64) @ CORNERS


def draw_paths(
    paths: Mapping[str, Any],
    targets: Mapping[str, Any],
    path: str | Path,
    *,
    actions: Sequence[str] = ("A", "B", "C"),
    title: str = "",
) -> Path:
    """Draws ``paths`` of policies on the triangle and marks ``targets``, in an SVG file; returns its path.

    paths: by name, arrays of shape (steps, 3), at least one step; a small dot marks the start, a large one the end.
    targets: by name, arrays of shape (3,), drawn as hollow shapes so paths stay visible beneath. actions: names of the
    corners, as in ``Game.actions``. Under one version of Matplotlib the same input gives the same bytes, whatever the user's
    Matplotlib settings. The file is written under another name first. Raises ValueError for wrong shapes or values that are
    not probabilities, and ImportError if Matplotlib is not installed.
    """
    drawn = {name: _checked(values, f"paths[{name!r}]", 2) for name, values in paths.items()}
    marked = {name: _checked(values, f"targets[{name!r}]", 1) for name, values in targets.items()}
    if len(actions) != 3:
        raise ValueError(f"actions are {tuple(actions)}; a triangle has three corners")
    if len(marked) > len(SHAPES):
        raise ValueError(f"there are {len(marked)} targets but only {len(SHAPES)} shapes to mark them with")
    path = Path(path)
    if path.suffix != ".svg":
        raise ValueError(f"the path of the plot is {path}; it must end in .svg")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "simplex", "font.size": 10})
        figure = Figure(figsize=(6.0, 5.2))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        _draw_frame(axes, actions, title)
        for index, (name, points) in enumerate(drawn.items()):
            colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
            x, y = to_plane(points).T
            axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.6, label=name, zorder=2)
            axes.plot(x[:1], y[:1], "o", color=colour, markersize=3.5, zorder=3)
            axes.plot(x[-1:], y[-1:], "o", color=colour, markersize=6.5, zorder=3)
        for shape, (name, point) in zip(SHAPES, marked.items(), strict=False):
            x, y = to_plane(point)
            size = 190 if shape == "*" else 90
            axes.scatter(
                [x],
                [y],
                marker=shape,
                s=size,
                facecolors="none",
                edgecolors="black",
                linewidths=1.3,
                label=name,
                zorder=4,
            )
        if drawn or marked:
            axes.legend(
                loc="center left", bbox_to_anchor=(1.06, 0.5), frameon=False, handlelength=3.2, labelspacing=0.7
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        figure.savefig(unfinished, format="svg", metadata=NO_METADATA, bbox_inches="tight")
    unfinished.replace(path)
    return path


def _checked(values: Any, what: str, dimensions: int) -> Array:
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions or array.shape[-1] != 3 or not array.size:
        expected = "(steps, 3)" if dimensions == 2 else "(3,)"
        raise ValueError(f"{what} has shape {array.shape}; it must be {expected}")
    if not (array >= -1e-6).all() or not (np.abs(array.sum(axis=-1) - 1) <= 1e-5).all():
        raise ValueError(f"{what} has values that are not probabilities of three actions")
    return array


def _draw_frame(axes: Any, actions: Sequence[str], title: str) -> None:
    """Draws the triangle, thin lines at probabilities of 1/4, 1/2 and 3/4, the centre, and the names of the corners."""
    axes.set_aspect("equal")
    axes.axis("off")
    for action in range(3):
        other_corners = [corner for corner in range(3) if corner != action]
        for level in (0.25, 0.5, 0.75):
            ends = np.zeros((2, 3))
            ends[:, action] = level
            ends[[0, 1], other_corners] = 1 - level
            axes.plot(*to_plane(ends).T, color="#dddddd", linewidth=0.7, zorder=0)
    axes.plot(*CORNERS[[0, 1, 2, 0]].T, color=GREY, linewidth=1.0, zorder=1)
    axes.plot(*to_plane([1 / 3] * 3), "+", color=GREY, markersize=7, zorder=1)
    for (x, y), name, side, shift in zip(
        CORNERS, actions, ("top", "top", "bottom"), (-0.03, -0.03, 0.025), strict=True
    ):
        axes.text(x, y + shift, name, ha="center", va=side, fontsize=12, fontweight="bold")
    if title:
        axes.set_title(title, fontsize=11, pad=16)


__all__ = ["COLOURS", "CORNERS", "SHAPES", "draw_paths", "to_plane"]
