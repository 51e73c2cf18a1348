"""Small benchmarks in the real formats, and a judge that goes by a rule."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from tiny import write_jsonl

INSTRUCTIONS = [f"Name {count} things" for count in range(1, 7)]
CATEGORIES = ("writing", "math", "stem")


def alpaca_eval(folder: Path) -> Path:
    """Six instructions with a baseline of growing length."""
    rows = [
        {"dataset": "toy", "instruction": text, "output": "base " * number, "generator": "baseline"}
        for number, text in enumerate(INSTRUCTIONS, start=1)
    ]
    path = folder / "alpaca_eval.json"
    path.write_text(json.dumps(rows))
    return path


def mt_bench(folder: Path) -> Path:
    """Three questions of two turns; one has a reference answer."""
    folder = folder / "mt_bench"
    folder.mkdir()
    write_jsonl(
        folder / "question.jsonl",
        [
            {"question_id": 81 + number, "category": category, "turns": [f"Question {number}", f"More of {number}"]}
            for number, category in enumerate(CATEGORIES)
        ],
    )
    write_jsonl(
        folder / "reference_answer_gpt-4.jsonl",
        [{"question_id": 82, "choices": [{"index": 0, "turns": ["two", "three"]}]}],
    )
    templates = {
        "single-v1": "[Q] {question} [A] {answer} [End]",
        "single-math-v1": "[Q] {question} [R] {ref_answer_1} [A] {answer} [End]",
        "single-v1-multi-turn": "[Q] {question_1} {answer_1} {question_2} [A] {answer_2} [End]",
        "single-math-v1-multi-turn": "[Q] {question_1} {ref_answer_1} {answer_1} {question_2} [A] {answer_2} [End]",
    }
    write_jsonl(
        folder / "judge_prompts.jsonl",
        [
            {
                "name": name,
                "type": "single",
                "system_prompt": "Grade.",
                "prompt_template": text,
                "output_format": "[[rating]]",
            }
            for name, text in templates.items()
        ],
    )
    return folder


def log_odds(text: str) -> float:
    """Of m over M: the answer with fewer letters e is better, and the first place is worth a little."""
    first, second = re.findall(r'"output": """(.*?)"""', text, re.DOTALL)
    return (second.count("e") - first.count("e")) / 4 + 0.3


def grade(text: str) -> int:
    """From 1 to 10, by the length of the answer."""
    return 1 + len(re.search(r"\[A\] (.*) \[End\]", text, re.DOTALL)[1]) % 10


def rule(text: str) -> list[tuple[str, float]]:
    """Likeliest tokens of the judge's answer, the first of which it writes."""
    if "[End]" in text:
        return [(f"It is good. Rating: [[{grade(text)}]]", -0.1)]
    share = 1 / (1 + math.exp(-log_odds(text)))
    return sorted([("m", math.log(share)), ("M", math.log(1 - share))], key=lambda entry: -entry[1])
