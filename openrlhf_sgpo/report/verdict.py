"""The verdict at the top of a page: one to three sentences, from the figures and their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from openrlhf_sgpo.intervals import NORMAL_95, change, half_of, half_of_result, scores, share_error
from openrlhf_sgpo.report.markup import words
from openrlhf_sgpo.table import plus_minus, plus_minus_rate

SIGNIFICANT = 0.05


def run_verdict(
    names: Sequence[str], margins: Sequence[Mapping[str, float]], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The verdict on a run. names: of the start and the rounds. margins: of held-out pairs, by id. rows: evaluations, as in
    the table of a run. Accuracies are compared over the pairs that both moments have."""
    measured = [(name, values) for name, values in zip(names, margins, strict=True) if values]
    sentences = []
    if len(measured) > 1:
        (_, start), (first, after), (last, end) = measured[0], measured[1], measured[-1]
        where = "in the seed stage" if first == "round 0" else f"in {first}"
        before, now, pairs = _paired_scores(start, after)
        moved, half = change(before, now)
        if share_error(before) is None:  # the start equals the reference, so only the new accuracy is uncertain
            half = _half(now) or half
        verb = "rose" if moved > half else "fell" if moved < -half else "went"
        sentences.append(
            f"Held-out accuracy {verb} from {fmean(before):.3f} to {_accuracy(now)} {where}{_doubt(moved, half, pairs)}."
        )
        if last != first:
            before, now, pairs = _paired_scores(after, end)
            moved, half = change(before, now)
            which = "the round after it" if len(measured) == 3 else f"the {len(measured) - 2} rounds after it"
            by = f"changed it by {plus_minus(moved, half, 3)}".replace("-", "\N{MINUS SIGN}")
            if abs(moved) > half:
                by = f"{'raised' if moved > 0 else 'lowered'} it by {plus_minus(abs(moved), half, 3)}"
            sentences.append(f"{which.capitalize()} {by}, to {_accuracy(now)}{_doubt(moved, half, pairs)}.")
    if len(rows) > 1 and rows[-1].get("win_rate") is not None:
        rate, error = rows[-1]["win_rate"], half_of(rows[-1], "win_rate")
        doubt = ", not distinguishable from one half" if error is not None and abs(rate - 0.5) <= error else ""
        sentences.append(
            f"The oracle prefers the answers of {names[-1]} to those of the start with probability "
            f"{plus_minus(rate, error, 3)}{doubt}."
        )
    if not sentences:
        reason = "neither held-out pairs (--eval.dataset) nor a fixed oracle measured the policy"
        return [f"It is unknown whether the policy improved: {reason}."] if len(rows) > 1 else []
    return sentences


def comparison_verdict(pairs: Sequence[dict[str, Any]], prompts: int | None) -> list[str]:
    """The verdict on cross-play: who is preferred to whom, after Holm's correction."""
    if not pairs:
        return []
    wins = []
    for row in pairs:
        if is_significant(row):
            ahead = row["win_rate"] > 0.5
            better, worse = (row["first"], row["second"]) if ahead else (row["second"], row["first"])
            rate = row if ahead else row | {"win_rate": 1 - row["win_rate"]}
            wins.append(f"{better} over {worse} ({plus_minus_rate(rate)})")
    open_pairs, on = len(pairs) - len(wins), f" on {prompts:,} prompts" if prompts else ""
    level = f"p is below {SIGNIFICANT} after Holm's correction"
    if not wins:
        return [f"No group is preferred to another{on}: for no pair of groups {level}."]
    sentences = [f"Preferred{on}: {', '.join(wins)}; {level}."]
    if open_pairs:
        sentences.append(
            f"The {'other pair' if open_pairs == 1 else f'{open_pairs} other pairs'} cannot be told apart."
        )
    return sentences


def is_significant(row: Mapping[str, Any]) -> bool:
    """Whether the groups of a row of cross-play differ significantly."""
    return row.get("p_holm") is not None and row["p_holm"] < SIGNIFICANT


def leaderboard_verdict(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """One sentence per table: who leads in its first figure, and whether the lead is more than chance; in a table with anchors,
    which do not compete, how many of them the leader surpasses."""
    return [sentence for title, rows in groups.items() if (sentence := _leader(title, rows))]


def _leader(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name, value in row["figures"].items() if value is not None))
    if not names:
        return ""
    name = names[0]
    everyone = sorted(
        (row for row in rows if row["figures"].get(name) is not None), key=lambda row: -row["figures"][name]
    )
    placed = [row for row in everyone if not row.get("published")]
    if not placed:
        return ""
    first, digits = placed[0], digits_of([row["figures"][name] for row in placed])
    figure = f"{plus_minus(first['figures'][name], half_of_result(first, name), digits)} ({words(name)})"
    if anchors := [row for row in everyone if row.get("published")]:
        surpassed = sum(first["figures"][name] > row["figures"][name] for row in anchors)
        return f"{title}: {first['model']} has {figure}, more than {surpassed} of {len(anchors)} anchors."
    if len(placed) == 1:
        return f"{title}: {first['model']} has {figure}."
    second = placed[1]
    lead = first["figures"][name] - second["figures"][name]
    halves = [half_of_result(row, name) for row in (first, second)]
    if None in halves:
        return f"{title}: {first['model']} leads with {figure}, {second['model']} follows; the uncertainty is unknown."
    half = sum(half**2 for half in halves if half is not None) ** 0.5
    by = plus_minus(lead, half, digits)
    doubt = ", a lead not distinguishable from zero" if lead <= half else ""
    return f"{title}: {first['model']} leads with {figure}, {by} ahead of {second['model']}{doubt}."


def digits_of(values: Sequence[float | None]) -> int:
    """Decimals: three for shares, two for percentages and scores."""
    return 3 if all(abs(value) <= 1 for value in values if value is not None) else 2


def _paired_scores(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[list[float], list[float], str]:
    """Scores of the pairs that both have, and their count in words."""
    ids = [key for key in before if key in after]
    return scores([before[key] for key in ids]), scores([after[key] for key in ids]), f"{len(ids):,} held-out pairs"


def _half(values: Sequence[float]) -> float | None:
    error = share_error(values)
    return None if error is None else NORMAL_95 * error


def _accuracy(values: Sequence[float]) -> str:
    return plus_minus(fmean(values), _half(values), 3)


def _doubt(moved: float, half: float, pairs: str) -> str:
    return f", not distinguishable from no change on {pairs}" if abs(moved) <= half else f" ({pairs})"
