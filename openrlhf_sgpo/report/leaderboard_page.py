"""The page of a leaderboard, from leaderboard.json and the stored answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from openrlhf_sgpo.intervals import NORMAL_95, half_of_result
from openrlhf_sgpo.report.figures import Series, bars, lines, plot, plots, radar
from openrlhf_sgpo.report.judged import judgements
from openrlhf_sgpo.report.markup import MISSING, details, html_table, number, tag, words
from openrlhf_sgpo.report.page import page
from openrlhf_sgpo.report.samples import SHOWN, Written, how_many, side_by_side
from openrlhf_sgpo.report.verdict import digits_of, leaderboard_verdict
from openrlhf_sgpo.run_folder import json_text, read_growing, read_json
from openrlhf_sgpo.table import ANCHOR, agreement_words, plus_minus

_LEAST_CATEGORIES = 3  # for a radar plot


def leaderboard_page(folder: Path) -> str:
    board = read_json(folder / "leaderboard.json")
    rows, agreements = board.get("rows") or [], board.get("agreement") or []
    models = list(dict.fromkeys(row["model"] for row in rows))
    items = {task: folder / "items" / f"{task}.jsonl" for task in dict.fromkeys(row["task"] for row in rows)}
    facts = {
        "Models": len(models),
        **{f"Items of {task}": number(len(read_growing(path)), 0) for task, path in items.items() if path.is_file()},
    }
    groups = _groups(rows)
    tasks = dict.fromkeys(row["task"] for row in rows)
    judges = Counter(task for task, _ in {(row["task"], _identity(row)) for row in rows})
    warnings = [
        f"{task} was judged by {count} judges, whose scores cannot be compared: each has its own table."
        for task, count in judges.items()
        if count > 1
    ]
    warnings += [
        f"{row['task']}, {row['model']}: rests on {row['n']:,} of {row['expected']:,} {_counted(row)}."
        for row in rows
        if row["n"] < row["expected"]
    ]
    trust = {
        title: [entry for entry in agreements if all(entry[key] == group[0].get(key) for key in ("task", "judge"))]
        for title, group in groups.items()
    }
    sections = {title: _group(group, trust[title]) for title, group in groups.items()}
    verdict = leaderboard_verdict(groups)
    verdict += [f"{title}: {agreement_words(entries[0])}." for title, entries in trust.items() if entries]
    answers = {f"Answers to {task}": _answers(folder, task, models) for task in tasks}
    return page("Leaderboard", folder.name, facts, verdict, warnings, {**sections, **answers})


def _groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by task, judge and number of items, under a heading that names them: scores of different judges, and of other
    items, cannot be compared."""
    comparable: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        comparable.setdefault((row["task"], _identity(row), row["expected"]), []).append(row)
    sizes = Counter(key[:2] for key in comparable)
    titles: Counter[str] = Counter()
    groups = {}
    for (task, identity, expected), group in comparable.items():
        judge = group[0].get("judge")
        title = f"{task}, " + (f"judged by {judge['model']}" if judge else "without a judge")
        if sizes[task, identity] > 1:
            title += f", {expected:,} {_counted(group[0])}"
        titles[title] += 1
        # Judges of the same name differ in their settings, shown below the table.
        groups[title if titles[title] == 1 else f"{title}, settings {titles[title]}"] = group
    return groups


def _identity(row: Mapping[str, Any]) -> str:
    """The judge of a row, with its settings."""
    return json.dumps(row.get("judge"), sort_keys=True)


def _counted(row: Mapping[str, Any]) -> str:
    """The unit of ``n`` and ``expected``: an item may have two judgements."""
    return "judgements" if row.get("judge") else "items"


def _group(rows: Sequence[dict[str, Any]], agreements: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """The section of one task and judge: table, notes, plots and settings. agreements: with the published leaderboard."""
    figures = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    published = [
        name
        for name in figures
        if any(name in (row.get("published") or {}) and row["figures"].get(name) is not None for row in rows)
    ]
    digits = {name: digits_of([row["figures"].get(name) for row in rows]) for name in figures}
    cells = [
        [
            row["model"] + ANCHOR * bool(row.get("published")),
            *(_figure(row, name, digits[name]) for name in figures),
            *(number((row.get("published") or {}).get(name), 2) for name in published),
            f"{row['n']:,} of {row['expected']:,}",
            number(row.get("parse_failures"), 0),
            number(row.get("average_length"), 0),
        ]
        for row in rows
    ]
    header = [
        "",
        *map(words, figures),
        *(f"published {words(name)}" for name in published),
        _counted(rows[0]),
        "parse failures",
        "characters per answer",
    ]
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.get("notes") or []:
            notes.setdefault(note, []).append(row["model"])
    return [
        html_table(header, cells),
        *([tag("ul", *(tag("li", agreement_words(entry)) for entry in agreements))] if agreements else []),
        *([tag("ul", *(_note(*note, rows) for note in notes.items()), class_="quiet")] if notes else []),
        plots(*_anchors(rows, agreements), *_bars(rows, figures), *_radar(rows)),
        details("How the answers were made and judged", *_made(rows)),
    ]


def _note(text: str, models: Sequence[str], rows: Sequence[dict[str, Any]]) -> Markup:
    who = "all models" if len(models) == len(rows) > 1 else ", ".join(models)
    return tag("li", tag("strong", who), ": ", text)


def _figure(row: Mapping[str, Any], name: str, digits: int) -> str:
    return plus_minus(row["figures"].get(name), half_of_result(row, name), digits, MISSING)


def _anchors(rows: Sequence[dict[str, Any]], agreements: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """The anchors' figures over the published ones."""
    series = []
    for name in (entry["figure"] for entry in agreements):
        anchors = [row for row in rows if name in (row.get("published") or {}) and row["figures"].get(name) is not None]
        reach = [_reach(row, name) for row in anchors]
        series.append(
            Series(
                words(name),
                [row["published"][name] for row in anchors],
                [row["figures"][name] for row in anchors],
                [down for down, _ in reach],
                [up for _, up in reach],
                [row["model"] for row in anchors],
            )
        )
    figure = lines(series, mode="markers", x_title="published")
    return [plot("Anchors", figure, "this judge's figures over the published ones", 320)] if series else []


def _bars(rows: Sequence[dict[str, Any]], figures: Sequence[str]) -> list[Markup]:
    series = []
    for name in figures:
        measured = [row for row in rows if row["figures"].get(name) is not None]
        reach = [_reach(row, name) for row in measured]
        if measured:
            series.append(
                Series(
                    words(name),
                    [row["model"] for row in measured],
                    [row["figures"][name] for row in measured],
                    [down for down, _ in reach],
                    [up for _, up in reach],
                )
            )
    note = "with 95% intervals"
    height = 90 + 22 * len(rows) * max(1, len(series))
    return [plot("Figures", bars(series), note, height)] if series else []


def _reach(row: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    """Length of the error bar below and above the value."""
    value = row["figures"][name]
    interval, error = (row.get("intervals") or {}).get(name), (row.get("errors") or {}).get(name)
    if interval:
        return value - interval[0], interval[1] - value
    return (None, None) if error is None else (NORMAL_95 * error, NORMAL_95 * error)


def _radar(rows: Sequence[dict[str, Any]]) -> list[Markup]:
    categories = list(dict.fromkeys(name for row in rows for name in row.get("categories") or {}))
    if len(categories) < _LEAST_CATEGORIES:
        return []
    series = {
        row["model"]: [row["categories"].get(name) for name in categories] for row in rows if row.get("categories")
    }
    return [plot("By category", radar(categories, series), height=420)]


def _made(rows: Sequence[dict[str, Any]]) -> list[Markup]:
    keys = list(dict.fromkeys(key for row in rows for key in row.get("decoding") or {}))
    decodings = [[row["model"], *((row.get("decoding") or {}).get(key, MISSING) for key in keys)] for row in rows]
    judge = rows[0].get("judge")
    return [
        *([html_table(["", *map(words, keys)], decodings)] if keys else [tag("p", "The decoding was not recorded.")]),
        *([tag("pre", json_text(judge, indent=2))] if judge else []),
    ]


def _answers(folder: Path, task: str, models: Sequence[str]) -> list[Markup]:
    """The first items with all stored answers."""
    items = _by_id(folder / "items" / f"{task}.jsonl")
    answers = {model: _by_id(folder / model / "answers" / f"{task}.jsonl") for model in models}
    judged = {model: judgements(folder / model / task, task) for model in models}
    common = [key for key in items if any(key in rows for rows in answers.values())]
    articles = [
        side_by_side(
            [{"role": items[key].get("category") or "user", "content": turn} for turn in items[key]["turns"]],
            [
                Written(
                    model, rows[key]["turns"], judged[model].get(key) or judged[model].get(items[key]["turns"][0], "")
                )
                for model, rows in answers.items()
                if key in rows
            ],
        )
        for key in common[:SHOWN]
    ]
    files = [f"{model}/answers/{task}.jsonl" for model, rows in answers.items() if rows]
    links = [part for file in files for part in (tag("a", file, href=quote(file)), " ")]
    where = tag("p", "All answers: ", *links, class_="quiet")
    return [how_many(len(articles), len(common), "items"), where, *articles] if articles else []


def _by_id(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_growing(path)} if path.is_file() else {}
