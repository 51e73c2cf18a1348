"""Runs that are resumed with other settings: what nothing depends on goes on, what changes results is refused by name."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from statistics import fmean

import pytest
from running import ROOT, arguments, killed, read_jsonl, train
from toy_oracles import Letters


def begin(tiny_model, tiny_data, folder: Path, **changes: str) -> list[str]:
    """One round of 12 prompts, evaluated with 4 pairs and 3 prompts, unless ``changes`` says otherwise."""
    argv = arguments(tiny_model, tiny_data, folder)
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    given |= {"--rounds.count": "1", "--rounds.prompts": "12", "--eval.max_samples": "4", "--eval.max_prompts": "3"}
    given |= {f"--{name}": value for name, value in changes.items()}
    return [word for pair in given.items() for word in pair[:1] + tuple(pair[1].split())]


@pytest.mark.slow
def test_other_evaluation_sizes_are_compared_where_both_were_measured(tiny_model, tiny_data, tmp_path):
    """Wins are those over the answers of the start, which are fewer; table and page say so."""
    oracle = {"oracle": "toy_oracles:Letters"}
    argv = begin(tiny_model, tiny_data, tmp_path / "run", **oracle)
    dead = killed("seed training", argv, PYTHONPATH=str(ROOT / "tests"))
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-3000:]
    more = oracle | {"eval.max_samples": "8", "eval.max_prompts": "6"}
    argv = begin(tiny_model, tiny_data, tmp_path / "run", **more)
    process = train(*argv, "--resume", PYTHONPATH=str(ROOT / "tests"))
    assert process.returncode == 0, process.stderr[-3000:]
    start, now = (read_jsonl(tmp_path / "run" / name / "samples.jsonl") for name in ("initial", "round_1"))
    assert (len(start), len(now)) == (3, 6) and [row["id"] for row in start] == [row["id"] for row in now[:3]]
    scores = [[Letters().score(None, row["text"]) for row in rows] for rows in (now[:3], start)]
    wins = fmean(1 / (1 + math.exp(theirs - ours)) for ours, theirs in zip(*scores, strict=True))
    row = json.loads((tmp_path / "run/round_1/evaluation.json").read_text())
    assert (row["pairs"], row["prompts"], row["win_rate"]) == (8, 6, pytest.approx(wins))
    note = "of held-out pairs: 4 (start), 8 (round 0, round 1); of prompts: 3 (start), 6 (round 0, round 1); wins"
    assert note in (tmp_path / "run/table.txt").read_text() and note in (tmp_path / "run/report.html").read_text()
