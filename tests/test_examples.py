"""What the repository ships beside the package: the quickstart's data, and the benchmark."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from openrlhf_sgpo.data import load_pairs, load_prompts

ROOT = Path(__file__).parent.parent
DATA = ROOT / "examples" / "quickstart"
CATEGORIES = {"explanation", "advice", "writing", "code", "summary", "safety"}


@pytest.fixture(scope="module")
def shipped():
    return {
        "seed": load_pairs(str(DATA / "seed.jsonl")),
        "held_out": load_pairs(str(DATA / "held_out.jsonl")),
        "prompts": load_prompts(str(DATA / "prompts.jsonl")),
    }


def text(record) -> str:
    return (getattr(record, "prompt", None) or record.messages)[-1]["content"]


def test_there_is_enough_of_every_category(shipped):
    assert len(shipped["seed"]) >= 96
    assert len(shipped["held_out"]) >= 48
    assert len(shipped["prompts"]) >= 160
    for records in shipped.values():
        counts = Counter(record.id.split("-")[0] for record in records)
        assert set(counts) == CATEGORIES
        assert max(counts.values()) == min(counts.values())


def test_no_question_is_asked_twice(shipped):
    asked = Counter(re.sub(r"\W+", " ", text(record).lower()) for records in shipped.values() for record in records)
    assert max(asked.values()) == 1


@pytest.mark.parametrize("name", ["seed", "held_out"])
def test_length_does_not_tell_the_better_answer(shipped, name):
    longer = sum(len(pair.chosen.split()) > len(pair.rejected.split()) for pair in shipped[name])
    assert 0.4 <= longer / len(shipped[name]) <= 0.6


@pytest.mark.slow
def test_the_benchmark_agrees_before_it_times():
    process = subprocess.run(
        [sys.executable, ROOT / "measurements" / "worst_case.py", "--sizes", "20", "100", "--seconds", "20"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    rows = [line.split() for line in process.stdout.splitlines() if re.match(r"(margin|probability) +\d", line)]
    values = {(space, size, method): value for space, size, method, value, *_ in rows}
    for space in ("margin", "probability"):
        for size in ("20", "100"):
            assert float(values[space, size, "exact"]) == pytest.approx(float(values[space, size, "program"]), abs=1e-8)


def test_the_oracles_of_the_plays(monkeypatch):
    """Loaded by name, as --oracle does it; TheCount's optimum, and the circle of Paradox."""
    from openrlhf_sgpo import games, oracle
    from openrlhf_sgpo.oracle import Answer, Question

    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def asked(name, *texts):
        question = Question("q", [{"role": "user", "content": "?"}], tuple(map(Answer, texts)))
        return oracle.get(f"plays.oracles:{name}")(), [question]

    count, question = asked("TheCount", "the " * 6, "the the", "the " * 21, "")
    assert count.rewards(question, "") == [[6.0, 2.0, 0.0, 0.0]]
    paradox, question = asked("Paradox", "It is", "Maybe so", "Certainly not")
    (matrix,) = paradox.preferences(question, "")
    for row, expected in zip(matrix, games.GAMES["condorcet"]().preferences, strict=True):
        assert row == pytest.approx(expected)
