"""Tables as text: columns of cells, figures with their uncertainty, and the table at the end of a run."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from openrlhf_sgpo.intervals import half_of

PLUS_MINUS = "\N{PLUS-MINUS SIGN} is half of a 95% interval"  # in every table, text and page
ANCHOR = " (anchor)"  # follows the name of a model of the published leaderboard
FIGURES = (  # title, key, digits
    ("accuracy", "accuracy", 3),
    ("margin", "margin", 4),
    ("kl", "kl", 2),
    ("length", "response_length", 1),
    ("wins", "win_rate", 3),
    ("labels", "label_accuracy", 3),
    ("value", "value", 4),
)
STAGES = ("generate", "annotate", "oracle", "score", "follower", "log_probs", "train", "sync", "evaluate")


def plus_minus(value: float | None, half: float | None, digits: int, missing: str = "-") -> str:
    """A figure with half of its 95% interval, if known."""
    if value is None:
        return missing
    return f"{value:,.{digits}f}" + ("" if half is None else f" \N{PLUS-MINUS SIGN} {half:,.{digits}f}")


def plus_minus_rate(row: Mapping[str, Any]) -> str:
    """The win rate in a row of a comparison, with half of its interval."""
    return plus_minus(row["win_rate"], (row["high"] - row["low"]) / 2, 3)


def agreement_words(entry: Mapping[str, Any]) -> str:
    """How far a judge orders anchors as the published leaderboard does. entry: of "agreement" in leaderboard.json."""
    correlations = [
        f"{name.capitalize()} {entry[name]['value']:.2f} [{entry[name]['low']:.2f}, {entry[name]['high']:.2f}]"
        for name in ("spearman", "kendall")
    ]
    return (
        f"rank correlation of {entry['anchors']} anchors with the published leaderboard, by "
        f"{entry['figure'].replace('_', ' ')}: {', '.join(correlations)}"
    )


def aligned(lines: Sequence[Sequence[str]], left: Container[int] = (0,), rule: bool = True) -> list[str]:
    """Rows of cells as aligned columns. left: indices of the columns that are flush left. rule: whether to underline the
    header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [text[0], "  ".join("-" * width for width in widths), *text[1:]] if rule else text


def measured_differently(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence if evaluation rows differ in their numbers of held-out pairs or prompts, which a resumed run may change; else
    empty."""
    parts = []
    for key, what in (("pairs", "held-out pairs"), ("prompts", "prompts")):
        names: dict[int, list[str]] = {}
        for row in rows:
            if key in row:
                names.setdefault(row[key], []).append(row["name"])
        if len(names) > 1:
            parts.append(f"{what}: " + ", ".join(f"{count} ({', '.join(listed)})" for count, listed in names.items()))
    if not parts:
        return ""
    return f"rows were measured on different numbers of {'; of '.join(parts)}; wins: of the prompts that the start answered"


def results_table(rows: list[dict[str, Any]], stages: dict[str, dict[str, float]]) -> str:
    """The table at the end of a run. rows: evaluation rows with ``name`` and any of the figures of ``FIGURES``; stages: the
    ledger's entries, which hold the seconds of each stage. Missing figures are a dash."""
    by_round = seconds_by_stage(stages)
    times = [by_round.get(row["name"], {}) for row in rows]
    # Rounds of pairs and rounds of plays have different stages.
    shown = [stage for stage in STAGES if any(stage in seconds for seconds in times)]
    lines = [["", *(title for title, _, _ in FIGURES), *shown]]
    for row, seconds in zip(rows, times, strict=True):
        figures = [plus_minus(row.get(key), half_of(row, key), digits) for _, key, digits in FIGURES]
        lines.append(
            [row["name"], *figures, *(f"{seconds[stage]:.1f}" if stage in seconds else "-" for stage in shown)]
        )
    text = aligned(lines)
    note = (
        "accuracy, margin: held-out pairs against the initial reference; kl: nats per sampled response, to the same\n"
        "length: tokens per response; wins: the oracle's mean preference for such a response over the start's\n"
        "labels: agreement of the oracle with human pairs of the round's prompts\n"
        f"value: the follower's problem before the round's steps; the rest: seconds; {PLUS_MINUS}"
    )
    return "\n".join([*text, note, *filter(None, [measured_differently(rows)])]) + "\n"


def seconds_by_stage(stages: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Seconds per stage, or in rounds of plays per part of a step, by round name. stages: of the ledger."""
    seconds: dict[str, dict[str, float]] = {}
    for key, entry in stages.items():
        folder, _, stage = key.partition("/")
        name = "start" if folder == "initial" else folder.replace("_", " ")
        parts = {kind.removeprefix("seconds_"): value for kind, value in entry.items() if kind.startswith("seconds_")}
        seconds.setdefault(name, {}).update(parts if stage == "play" else {stage: entry["seconds"]})
    return seconds
