"""The page of a comparison, from comparison.json. Sections whose data is missing are left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from openrlhf_sgpo.intervals import half_of, half_over_seeds
from openrlhf_sgpo.report.figures import Series, groups_with_seeds, heat_map, plot, plots, points, with_level
from openrlhf_sgpo.report.markup import MISSING, details, html_table, number, tag, words
from openrlhf_sgpo.report.page import page
from openrlhf_sgpo.report.robustness import compared_robustness
from openrlhf_sgpo.report.samples import SHOWN, Written, how_many, side_by_side
from openrlhf_sgpo.report.verdict import SIGNIFICANT, comparison_verdict, is_significant
from openrlhf_sgpo.run_folder import read_json
from openrlhf_sgpo.table import plus_minus, plus_minus_rate

# Title, note, key and digits.
_FIGURES = (
    ("Held-out accuracy", "share of held-out pairs with a positive margin", "accuracy", 3),
    ("Margin", "mean of the held-out pairs", "margin", 4),
    ("Divergence from the reference", "nats per fresh answer", "kl", 2),
    ("Response length", "tokens per fresh answer", "response_length", 1),
)


def comparison_page(folder: Path) -> str:
    comparison = {key: value for key, value in read_json(folder / "comparison.json").items() if value is not None}
    groups, cross_play = comparison.get("groups", []), comparison.get("cross_play", [])
    runs = sum(len(group.get("runs") or []) for group in groups)
    facts = {
        "Compared": f"{len(groups)} groups, {runs} runs",
        "Prompts": number(comparison.get("prompts"), 0),
        "Oracle": comparison.get("oracle", {}).get("name") or MISSING,
    }
    return page(
        *("Comparison", folder.name, facts, comparison_verdict(cross_play, comparison.get("prompts"))),
        comparison.get("warnings", []),
        {
            "Cross-play": _cross_play([group["name"] for group in groups], cross_play),
            "Win rate against divergence": _versus_start(comparison.get("versus_start", [])),
            "Figures": _figures(groups),
            "Robustness": compared_robustness(comparison.get("worst_case", {})),
            "Cost": _cost(groups),
            "Answers": _answers(comparison.get("samples", [])),
            "Runs": _runs(groups, comparison.get("oracle", {})),
        },
    )


def _cross_play(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[Markup]:
    if not rows:
        return []
    names = list(dict.fromkeys([*names, *(row[side] for row in rows for side in ("first", "second"))]))
    position = {name: place for place, name in enumerate(names)}
    values: list[list[float | None]] = [[None] * len(names) for _ in names]
    cells, hover = ([[""] * len(names) for _ in names] for _ in range(2))
    for row in rows:
        reverse = {"win_rate": 1 - row["win_rate"], "low": 1 - row["high"], "high": 1 - row["low"]}
        for row_name, column_name, result in (
            (row["first"], row["second"], row),
            (row["second"], row["first"], reverse),
        ):
            i, j = position[row_name], position[column_name]
            values[i][j] = result["win_rate"]
            cells[i][j] = f"{result['win_rate']:.3f}" if is_significant(row) else f"({result['win_rate']:.3f})"
            hover[i][j] = (
                f"{row_name} over {column_name}: {result['win_rate']:.3f}, 95% interval {result['low']:.3f} to "
                f"{result['high']:.3f}, p {_p_value(row.get('p_holm'))} after Holm"
            )
    table_rows = [
        [
            f"{row['first']} over {row['second']}",
            plus_minus_rate(row),
            _p_value(row.get("p_value")),
            _p_value(row.get("p_holm")),
            number(row.get("comparisons"), 0),
        ]
        for row in rows
    ]
    note = f"of the row over the column; in brackets if p is {SIGNIFICANT} or more after Holm's correction"
    figure = heat_map(names, values, cells, hover)
    return [
        plot("Win rate", figure, note, height=120 + 64 * len(names)),
        html_table(["", "win rate", "p", "p (Holm)", "comparisons"], table_rows),
    ]


def _p_value(value: float | None) -> str:
    return "<0.0001" if value is not None and value < 0.0001 else number(value, 4)


def _versus_start(rows: Sequence[dict[str, Any]]) -> list[Markup]:
    if not rows:
        return []
    placed = [row for row in rows if row.get("kl") is not None]
    shown = [
        Series(
            row["name"], [row["kl"]], [row["win_rate"]], [row["win_rate"] - row["low"]], [row["high"] - row["win_rate"]]
        )
        for row in placed
    ]
    errors = [half_of(row, "kl") for row in placed]
    note = "bars: 95% intervals"
    header = ["", "win rate over the start", "divergence, nats per answer"]
    cells = [
        [row["name"], plus_minus_rate(row), plus_minus(row.get("kl"), half_of(row, "kl"), 2, MISSING)] for row in rows
    ]
    figure = points(shown, errors, "nats per answer from the reference", "win rate over the start")
    return [
        *([plot("Win rate over the start", with_level(figure, 0.5), note, height=380)] if placed else []),
        html_table(header, cells),
    ]


def _figures(groups: Sequence[dict[str, Any]]) -> list[Markup]:
    shown, columns = [], []
    for title, note, key, digits in _FIGURES:
        measured = {group["name"]: figure for group in groups if (figure := (group.get("figures") or {}).get(key))}
        if not measured:
            continue
        names = list(measured)
        errors = [half_over_seeds(figure) for figure in measured.values()]
        means = Series("mean, 95% interval", names, [figure["mean"] for figure in measured.values()], errors, errors)
        seeds = {name: figure.get("values") or [] for name, figure in measured.items()}
        figure = groups_with_seeds(names, means, seeds, share=key == "accuracy")
        shown.append(plot(title, figure, note, height=110 + 34 * len(names)))
        columns.append((title.lower(), key, digits))
    if not shown:
        return []
    rows = [[group["name"], *(_mean(group, key, digits) for _, key, digits in columns)] for group in groups]
    note = "Means over seeds, with Student's t intervals, because seeds are few."
    return [plots(*shown), html_table(["", *(title for title, _, _ in columns)], rows), tag("p", note, class_="quiet")]


def _mean(group: dict[str, Any], key: str, digits: int) -> str:
    figure = (group.get("figures") or {}).get(key)
    if not figure:
        return MISSING
    return plus_minus(figure["mean"], half_over_seeds(figure), digits, MISSING)


def _cost(groups: Sequence[dict[str, Any]]) -> list[Markup]:
    ledgers = {group["name"]: group["ledger"] for group in groups if group.get("ledger")}
    if not ledgers:
        return []
    kinds = list(dict.fromkeys(kind for ledger in ledgers.values() for kind in ledger))
    rows = [[words(kind), *(number(ledger.get(kind), 0) for ledger in ledgers.values())] for kind in kinds]
    note = "Means over the seeds of each group."
    return [html_table(["", *ledgers], rows), tag("p", note, class_="quiet")]


def _answers(samples: Sequence[dict[str, Any]]) -> list[Markup]:
    if not samples:
        return []
    articles = [
        side_by_side(sample["prompt"], [Written(name, [text]) for name, text in sample["answers"].items()])
        for sample in samples[:SHOWN]
    ]
    return [how_many(len(articles), len(samples), "prompts"), *articles]


def _runs(groups: Sequence[dict[str, Any]], oracle: dict[str, Any]) -> list[Markup]:
    runs = [(group["name"], run) for group in groups for run in group.get("runs") or []]
    rows = [[name, MISSING if run.get("seed") is None else run["seed"], run["folder"]] for name, run in runs]
    parts = [details("Folders and seeds", html_table(["group", "seed", "folder"], rows))] if rows else []
    if oracle:
        parts.append(
            details("The oracle", html_table(["", "value"], [[words(key), value] for key, value in oracle.items()]))
        )
    return parts
