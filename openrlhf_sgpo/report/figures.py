"""Plotly figures without colours, which the page's script adds.

Each function builds a figure as plotly's script reads it, from plain lists, so the page's data can be read back from it.
plotly's own classes would check every value for as long as a tiny model trains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from openrlhf_sgpo.report.markup import tag

Figure = dict[str, Any]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


@dataclass(frozen=True)
class Series:
    """down, up: length of the error bars below and above y; None for a point without one. labels: of the points, shown when
    one is pointed at."""

    name: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    down: Sequence[float | None] | None = None
    up: Sequence[float | None] | None = None
    labels: Sequence[str] | None = None

    def bars(self) -> dict[str, object] | None:
        if self.down is None or self.up is None or not any(reach is not None for reach in [*self.down, *self.up]):
            return None
        return {"type": "data", "symmetric": False, "array": self.up, "arrayminus": self.down, "thickness": 1.2}


def plot(title: str, figure: Figure, note: str = "", height: int = 250) -> Markup:
    """A figure with its caption. height: in pixels; the width adapts to the page."""
    # Text in a figure must not close the script element around it.
    data = Markup(json.dumps(_readable(figure)).replace("<", "\\u003c"))
    return tag(
        "figure",
        tag("figcaption", tag("h3", title), *([tag("p", note)] if note else [])),
        tag("div", class_="plot", style=f"height: {height}px", role="img", aria_label=title),
        tag("script", data, type="application/json"),
    )


def _readable(value: Any) -> Any:
    """The same in JSON, which has no number that is not finite; what is None among a trace's properties is left out."""
    if isinstance(value, Mapping):
        return {key: _readable(part) for key, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_readable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plots(*figures: Markup) -> Markup:
    """Plots side by side where there is room."""
    return tag("div", *figures, class_="plots")


def lines(
    series: Sequence[Series],
    mode: str = "lines",
    x_title: str = "",
    level: float | None = None,
    breaks: Sequence[float] = (),
    share: bool = False,
) -> Figure:
    """mode: plotly's, such as lines+markers. level: height of a reference line. breaks: positions of vertical lines. share:
    values are shares, and the axis is [0, 1]; otherwise it includes 0, so a small change looks small."""
    figure = _figure(
        [
            {
                **{"type": "scatter", "name": line.name, "x": line.x, "y": line.y},
                **{"error_y": line.bars(), "mode": mode, "text": line.labels},
            }
            for line in series
        ],
        xaxis=_titled(x_title),
        yaxis={"range": [0, 1]} if share else {"rangemode": "tozero"},
        shapes=[
            {"type": "line", "x0": place, "x1": place, "y0": 0, "y1": 1, "xref": "x", "yref": "y domain"}
            for place in breaks
        ],
    )
    return figure if level is None else with_level(figure, level)


def with_level(figure: Figure, level: float) -> Figure:
    """The figure with a reference line at this height."""
    line = {"type": "line", "x0": 0, "x1": 1, "y0": level, "y1": level, "xref": "x domain", "yref": "y"}
    figure["layout"].setdefault("shapes", []).append(line)
    return figure


def whole_numbers(figure: Figure, axis: str, values: Sequence[float]) -> Figure:
    """Ticks at whole numbers only; for few values plotly would add halves."""
    if values and max(values) - min(values) < 8:
        figure["layout"].setdefault(f"{axis}axis", {}).update(dtick=1, tickformat="d")
    return figure


def bars(series: Sequence[Series], stacked: bool = False, x_title: str = "") -> Figure:
    """Horizontal bars, one row per name in the series' x, first at the top."""
    return _figure(
        [
            {"type": "bar", "name": group.name, "y": group.x, "x": group.y, "error_x": group.bars(), "orientation": "h"}
            for group in series
        ],
        xaxis=_titled(x_title),
        yaxis={"autorange": "reversed", "type": "category"},
        barmode="stack" if stacked else "group",
    )


def histogram(
    parts: Mapping[str, Sequence[float]],
    edges: Sequence[float],
    x_title: str,
    marks: Mapping[str, float] | None = None,
    hatched: str = "",
) -> Figure:
    """Stacked counts per bin, by name. edges: of bins of equal width. marks: vertical lines, position by name. hatched: the
    part that is."""
    width = edges[1] - edges[0]
    centres = [edge + width / 2 for edge in edges[:-1]]
    top = max(map(sum, zip(*parts.values(), strict=True)))
    pattern = {"pattern": {"shape": "/"}}
    columns = [
        {
            **{"type": "bar", "name": name, "x": centres, "y": counts, "width": width},
            "marker": pattern if name == hatched else None,
        }
        for name, counts in parts.items()
    ]
    dotted = {"type": "scatter", "y": [0, top], "mode": "lines", "line": {"dash": "dot"}}
    figure = _figure(
        [*columns, *({**dotted, "name": name, "x": [place, place]} for name, place in (marks or {}).items())],
        showlegend=len(parts) > 1,
        xaxis=_titled(x_title),
        yaxis=_titled("pairs"),
        barmode="stack",
        bargap=0,
    )
    return whole_numbers(figure, "y", [0, top])


def groups_with_seeds(
    names: Sequence[str], means: Series, seeds: Mapping[str, Sequence[float]], share: bool = False
) -> Figure:
    """One row per group: its mean with error bars and a small point for each seed. share: as in ``lines``."""
    rows = [(name, value) for name in names for value in seeds[name]]
    ys, xs = [name for name, _ in rows], [value for _, value in rows]
    points = {"type": "scatter", "mode": "markers"}
    mean = {"size": 10, "symbol": "diamond"}
    return _figure(
        [
            {**points, "name": means.name, "y": means.x, "x": means.y, "error_x": means.bars(), "marker": mean},
            {**points, "name": "a seed", "y": ys, "x": xs, "marker": {"size": 6}},
        ],
        showlegend=True,
        xaxis={"range": [0, 1]} if share else {"rangemode": "tozero"},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": list(names), "autorange": "reversed"},
    )


def heat_map(
    names: Sequence[str], values: list[list[float | None]], cells: list[list[str]], hover: list[list[str]]
) -> Figure:
    """values: probabilities, [row][column], coloured by their distance from 1/2; None leaves a cell empty."""
    reach = max([0.1, *(abs(value - 0.5) for row in values for value in row if value is not None)])
    return _figure(
        [
            {
                **{"type": "heatmap", "x": names, "y": names, "z": values, "zmin": 0.5 - reach, "zmax": 0.5 + reach},
                **{"showscale": False, "xgap": 2, "ygap": 2, "hoverongaps": False},
                **{"text": cells, "texttemplate": "%{text}"},
                **{"customdata": hover, "hovertemplate": "%{customdata}<extra></extra>"},
            }
        ],
        xaxis={"type": "category", "side": "top", "showgrid": False},
        yaxis={"type": "category", "autorange": "reversed", "showgrid": False},
    )


def radar(categories: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> Figure:
    return _figure(
        [
            # Repeat the first point to close the line.
            {
                **{"type": "scatterpolar", "name": name, "mode": "lines+markers"},
                **{"theta": [*categories, categories[0]], "r": [*values, values[0]]},
            }
            for name, values in series.items()
        ],
        # Category names surround the circle, so the legend goes below it.
        margin={"t": 32, "b": 32, "l": 84, "r": 84},
        legend={"y": -0.12, "yanchor": "top"},
        polar={"radialaxis": {"rangemode": "tozero", "nticks": 4, "tickangle": 0}},
    )


def points(series: Sequence[Series], x_errors: Sequence[float | None], x_title: str, y_title: str) -> Figure:
    """One point per series. x_errors: half length of its horizontal error bar."""
    return _figure(
        [
            {
                **{"type": "scatter", "name": point.name, "x": point.x, "y": point.y, "mode": "markers"},
                "error_x": None if error is None else {"type": "data", "array": [error], "thickness": 1.2},
                "error_y": point.bars(),
                "marker": {"size": 10, "symbol": SYMBOLS[place % len(SYMBOLS)]},
            }
            for place, (point, error) in enumerate(zip(series, x_errors, strict=True))
        ],
        showlegend=True,
        xaxis={**_titled(x_title), "rangemode": "tozero"},
        yaxis={**_titled(y_title), "range": [0, 1]},
    )


def _titled(text: str) -> dict[str, Any]:
    return {"title": {"text": text}} if text else {}


def _figure(traces: list[dict[str, Any]], **layout: Any) -> Figure:
    """layout: plotly's; several traces have a legend unless it says otherwise."""
    return {"data": traces, "layout": {"showlegend": len(traces) > 1, **layout}}
