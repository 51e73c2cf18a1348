"""Plotly figures without colours, which the page's script adds.

Each function builds a figure from plain lists, so the page's data can be read back from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from markupsafe import Markup

from openrlhf_sgpo.report.markup import tag

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


@dataclass(frozen=True)
class Series:
    """down, up: length of the error bars below and above y; None for a point without one."""

    name: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    down: Sequence[float | None] | None = None
    up: Sequence[float | None] | None = None

    def bars(self) -> dict[str, object] | None:
        if self.down is None or self.up is None or not any(reach is not None for reach in [*self.down, *self.up]):
            return None
        return {"type": "data", "symmetric": False, "array": self.up, "arrayminus": self.down, "thickness": 1.2}


def plot(title: str, figure: go.Figure, note: str = "", height: int = 250) -> Markup:
    """A figure with its caption. height: in pixels; the width adapts to the page."""
    # Text in a figure must not close the script element around it.
    data = Markup(figure.to_json().replace("<", "\\u003c"))
    return tag(
        "figure",
        tag("figcaption", tag("h3", title), *([tag("p", note)] if note else [])),
        tag("div", class_="plot", style=f"height: {height}px", role="img", aria_label=title),
        tag("script", data, type="application/json"),
    )


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
) -> go.Figure:
    """mode: plotly's, such as lines+markers. level: height of a reference line. breaks: positions of vertical lines. share:
    values are shares, and the axis is [0, 1]; otherwise it includes 0, so a small change looks small."""
    figure = _figure(len(series) > 1)
    for line in series:
        figure.add_scatter(name=line.name, x=line.x, y=line.y, error_y=line.bars(), mode=mode)
    figure.update_layout(xaxis_title=x_title or None, yaxis={"range": [0, 1]} if share else {"rangemode": "tozero"})
    if level is not None:
        figure.add_hline(y=level)
    for place in breaks:
        figure.add_vline(x=place)
    return figure


def whole_numbers(figure: go.Figure, axis: str, values: Sequence[float]) -> go.Figure:
    """Ticks at whole numbers only; for few values plotly would add halves."""
    if values and max(values) - min(values) < 8:
        figure.update_layout({f"{axis}axis": {"dtick": 1, "tickformat": "d"}})
    return figure


def bars(series: Sequence[Series], stacked: bool = False, x_title: str = "") -> go.Figure:
    """Horizontal bars, one row per name in the series' x, first at the top."""
    figure = _figure(len(series) > 1)
    for group in series:
        figure.add_bar(name=group.name, y=group.x, x=group.y, error_x=group.bars(), orientation="h")
    figure.update_layout(xaxis_title=x_title or None)
    figure.update_layout(barmode="stack" if stacked else "group", yaxis={"autorange": "reversed", "type": "category"})
    return figure


def histogram(
    parts: Mapping[str, Sequence[float]], edges: Sequence[float], x_title: str, marks: Mapping[str, float] | None = None
) -> go.Figure:
    """Stacked counts per bin, by name. edges: of bins of equal width. marks: vertical lines, position by name."""
    width = edges[1] - edges[0]
    centres = [edge + width / 2 for edge in edges[:-1]]
    figure = _figure(len(parts) > 1)
    for name, counts in parts.items():
        figure.add_bar(name=name, x=centres, y=counts, width=width)
    top = max(map(sum, zip(*parts.values(), strict=True)))
    for name, place in (marks or {}).items():
        figure.add_scatter(name=name, x=[place, place], y=[0, top], mode="lines", line_dash="dot")
    figure.update_layout(barmode="stack", bargap=0, xaxis_title=x_title, yaxis_title="pairs")
    return whole_numbers(figure, "y", [0, top])


def groups_with_seeds(
    names: Sequence[str], means: Series, seeds: Mapping[str, Sequence[float]], share: bool = False
) -> go.Figure:
    """One row per group: its mean with error bars and a small point for each seed. share: as in ``lines``."""
    figure = _figure(legend=True)
    mean, seed = {"size": 10, "symbol": "diamond"}, {"size": 6}
    figure.add_scatter(name=means.name, y=means.x, x=means.y, error_x=means.bars(), mode="markers", marker=mean)
    rows = [(name, value) for name in names for value in seeds[name]]
    figure.add_scatter(name="a seed", y=[name for name, _ in rows], x=[x for _, x in rows], mode="markers", marker=seed)
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=list(names), autorange="reversed")
    figure.update_xaxes(**({"range": [0, 1]} if share else {"rangemode": "tozero"}))
    return figure


def heat_map(
    names: Sequence[str], values: list[list[float | None]], cells: list[list[str]], hover: list[list[str]]
) -> go.Figure:
    """values: probabilities, [row][column], coloured by their distance from 1/2; None leaves a cell empty."""
    reach = max([0.1, *(abs(value - 0.5) for row in values for value in row if value is not None)])
    figure = _figure(legend=False)
    figure.add_heatmap(
        x=names,
        y=names,
        z=values,
        zmin=0.5 - reach,
        zmax=0.5 + reach,
        showscale=False,
        xgap=2,
        ygap=2,
        hoverongaps=False,
        text=cells,
        texttemplate="%{text}",
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure.update_xaxes(type="category", side="top", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def radar(categories: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> go.Figure:
    figure = _figure(len(series) > 1)
    for name, values in series.items():
        # Repeat the first point to close the line.
        figure.add_scatterpolar(
            name=name, theta=[*categories, categories[0]], r=[*values, values[0]], mode="lines+markers"
        )
    # Category names surround the circle, so the legend goes below it.
    around = {"t": 32, "b": 32, "l": 84, "r": 84}
    figure.update_layout(margin=around, legend={"y": -0.12, "yanchor": "top"})
    figure.update_layout(polar_radialaxis={"rangemode": "tozero", "nticks": 4, "tickangle": 0})
    return figure


def points(series: Sequence[Series], x_errors: Sequence[float | None], x_title: str, y_title: str) -> go.Figure:
    """One point per series. x_errors: half length of its horizontal error bar."""
    figure = _figure(legend=True)
    for place, (point, error) in enumerate(zip(series, x_errors, strict=True)):
        figure.add_scatter(
            name=point.name,
            x=point.x,
            y=point.y,
            error_x=None if error is None else {"type": "data", "array": [error], "thickness": 1.2},
            error_y=point.bars(),
            mode="markers",
            marker={"size": 10, "symbol": SYMBOLS[place % len(SYMBOLS)]},
        )
    figure.update_layout(xaxis={"title": x_title, "rangemode": "tozero"}, yaxis={"title": y_title, "range": [0, 1]})
    return figure


def _figure(legend: bool) -> go.Figure:
    """An empty figure without plotly's template, which has colours."""
    return go.Figure(layout={"template": {}, "showlegend": legend})
