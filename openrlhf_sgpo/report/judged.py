"""Judgements of the answers to a benchmark, from the files in its own format that docs/evaluation.md lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from openrlhf_sgpo.run_folder import read_json, read_jsonl

Row = Mapping[str, Any]


def _preference(row: Row) -> str:
    value = row["preference"]
    return "" if value is None else f"preferred to the baseline's with probability {value - 1:.2f}"


def _score(row: Row) -> str:
    return "" if row["score"] < 0 else f"turn {row['turn']} scored {row['score']:g} of 10"


def _verdicts(row: Row) -> str:
    labels = [game["score"] for game in row["games"] if game and game["score"]]
    if len(labels) < 2:
        return ""
    # A is the baseline in the first game and the model in the second.
    return f"against the baseline, as B: {labels[0]}, as A: {labels[1]}"


def _followed(row: Row) -> str:
    followed = row["follow_instruction_list"]
    return f"follows {sum(followed)} of {len(followed)} instructions"


# By benchmark: file, field with the item (id or text of the first turn), and the row's judgement in words.
_FILES: dict[str, tuple[str, str, Callable[[Row], str]]] = {
    "alpaca_eval": ("annotations.json", "index", _preference),
    "mt_bench": ("judgments.jsonl", "question_id", _score),
    "arena_hard": ("model_judgment.jsonl", "uid", _verdicts),
    "ifeval": ("eval_results_strict.jsonl", "prompt", _followed),
    "ifbench": ("eval_results_loose.jsonl", "prompt", _followed),
}


def judgements(folder: Path, task: str) -> dict[str, str]:
    """Judgements by item in ``folder`` (MODEL/TASK) and its judges' folders; several judges are named."""
    if task not in _FILES:
        return {}
    file, key, note_of = _FILES[task]
    paths = sorted(folder.glob(f"**/{file}"))
    notes: dict[str, list[str]] = {}
    for path in paths:
        rows: Iterable[Row] = read_json(path) if path.suffix == ".json" else read_jsonl(path)
        judge = f"{path.parent.name}: " if len(paths) > 1 else ""
        for row in rows:
            if text := note_of(row):
                notes.setdefault(str(row[key]), []).append(judge + text)
    return {item: "; ".join(texts) for item, texts in notes.items()}
