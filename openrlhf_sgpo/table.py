"""The table at the end of a run: one row for the start and one per round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any

NORMAL_95 = 1.96  # standard errors to both sides that hold 95% of a normal law
# The same of Student's law, by degrees of freedom from 1; beyond, it is close to 1.96 + 2.7 / degrees.
_STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
PLUS_MINUS = "\N{PLUS-MINUS SIGN} is half of a 95% interval"  # wherever it stands in a table, a text or a page
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


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def student_95(count: int) -> float:
    """Standard errors to both sides of a mean of ``count`` values, at least 2, that make a 95% interval."""
    degrees = count - 1
    return _STUDENT_95[degrees - 1] if degrees <= len(_STUDENT_95) else NORMAL_95 + 2.7 / degrees


def scores(margins: Sequence[float]) -> list[float]:
    """Of each held-out pair: 1 if its margin is positive; at a tie one half, so that an untrained policy has accuracy 0.5."""
    return [(margin > 0) + 0.5 * (margin == 0) for margin in margins]


def share_error(values: Sequence[float]) -> float | None:
    """Standard error of a share, of which ``values`` in [0, 1] are the parts; None if all are ties or there are none.

    Of Agresti and Coull (The American Statistician 52, 1998): as if two more had been of either kind. It is not 0 where all
    are right.
    """
    if all(value == 0.5 for value in values):
        return None
    n = len(values) + NORMAL_95**2
    share = (sum(values) + NORMAL_95**2 / 2) / n
    return (share * (1 - share) / n) ** 0.5


def change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of after - before over the same pairs, in [-1, 1], and half of its 95% interval.

    Of Agresti and Min (Biometrics 61, 2005): as if one more pair had changed half to either side.
    """
    moved = [two - one for one, two in zip(before, after, strict=True)]
    n, total = len(moved) + 2, sum(moved)
    return total / len(moved), NORMAL_95 * (sum(one * one for one in moved) + 1 - total**2 / n) ** 0.5 / n


def plus_minus(value: float | None, half: float | None, digits: int, missing: str = "-") -> str:
    """A figure with half of its 95% interval, where that is known."""
    if value is None:
        return missing
    return f"{value:,.{digits}f}" + ("" if half is None else f" \N{PLUS-MINUS SIGN} {half:,.{digits}f}")


def half_of(row: Mapping[str, Any], key: str) -> float | None:
    """Half of the 95% interval of row[key], from the standard error that stands under the same name and _error."""
    error = row.get(f"{key}_error")
    return None if error is None else NORMAL_95 * error


def half_width(row: Mapping[str, Any], name: str) -> float | None:
    """Half of the 95% interval of a figure of a row of leaderboard.json; None if the row says nothing of it."""
    interval, error = (row.get("intervals") or {}).get(name), (row.get("errors") or {}).get(name)
    if interval:
        return (interval[1] - interval[0]) / 2
    return None if error is None else NORMAL_95 * error


def half_width_over_seeds(figure: Mapping[str, Any]) -> float | None:
    """Half of the 95% interval of a mean ``over_seeds``; by Student's law, for seeds are few. None for one seed."""
    return None if figure.get("error") is None else student_95(len(figure["values"])) * figure["error"]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns of cells with a rule under the header; the first column is flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [text[0], "  ".join("-" * width for width in widths), *text[1:]]


def measured_differently(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the numbers of held-out pairs and of prompts, where a resumed run was told others and evaluation rows
    differ in them; else empty."""
    parts = []
    for key, what in (("pairs", "held-out pairs"), ("prompts", "prompts")):
        names: dict[int, list[str]] = {}
        for row in rows:
            if key in row:
                names.setdefault(row[key], []).append(row["name"])
        if len(names) > 1:
            parts.append(f"{what}: " + ", ".join(f"{count} ({', '.join(some)})" for count, some in names.items()))
    if not parts:
        return ""
    return f"rows were measured on different numbers of {'; of '.join(parts)}; wins: of the prompts that the start answered"


def results_table(rows: list[dict[str, Any]], stages: dict[str, dict[str, float]]) -> str:
    """rows: evaluation rows with ``name``, and what was measured of accuracy, margin, kl, response_length, label_accuracy and
    value; stages: the ledger's entries, from which the seconds of each stage are taken. Missing figures are a dash."""
    found = [_seconds(row["name"], stages) for row in rows]
    # Rounds of pairs and rounds of plays have different stages.
    shown = [stage for stage in STAGES if any(seconds.get(stage) is not None for seconds in found)]
    header = ["", *(title for title, _, _ in FIGURES), *shown]
    lines = [header]
    for row, seconds in zip(rows, found, strict=True):
        figures = [plus_minus(row.get(key), half_of(row, key), digits) for _, key, digits in FIGURES]
        lines.append([row["name"], *figures, *(_figure(seconds.get(stage), 1) for stage in shown)])
    text = aligned(lines)
    note = (
        "accuracy, margin: held-out pairs against the initial reference; kl: nats per sampled response, to the same\n"
        "length: tokens per response; wins: the oracle's mean preference for such a response over the start's\n"
        "labels: agreement of the oracle with human pairs of the round's prompts\n"
        f"value: the follower's problem before the round's steps; the rest: seconds; {PLUS_MINUS}"
    )
    return "\n".join([*text, note, *filter(None, [measured_differently(rows)])]) + "\n"


def _seconds(name: str, stages: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """Seconds by stage, or by part of every step where a round consists of plays."""
    folder = "initial" if name == "start" else name.replace(" ", "_")
    parts = {key.removeprefix("seconds_"): value for key, value in stages.get(f"{folder}/play", {}).items()}
    return {
        **parts,
        **{stage: stages[key].get("seconds") for stage in STAGES if (key := f"{folder}/{stage}") in stages},
    }


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
