"""A whole run whose answers a judge ranks, through a server that breaks off in the middle."""

from __future__ import annotations

import json
import math

import pytest
from judge_server import JudgeServer, shown, sigmoid
from running import arguments, read_jsonl, train


def worth(text: str) -> float:
    """Some figure in which answers differ, whatever the tiny model says."""
    return sum(map(ord, text)) % 97 / 30


def by_worth(text: str) -> list[tuple[str, float]]:
    first, second = map(worth, shown(text))
    share = sigmoid(first - second + 1)
    return sorted([("A", math.log(share)), ("B", math.log(1 - share))], key=lambda item: -item[1])


@pytest.mark.slow
def test_a_run_whose_judge_breaks_off_goes_on_where_it_was(tiny_model, tiny_data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    def argv(server, *more):
        base = arguments(tiny_model, tiny_data, folder, *more, "--oracle", "judge", "--judge.model", "rule")
        base[base.index("--rounds.count") + 1] = "1"
        return [*base, "--judge.base_url", server.url, "--judge.api_key", "env", "--judge.concurrency", "1"]

    with JudgeServer(lambda *_: "404") as server:
        early = train(*argv(server))
    assert early.returncode == 2 and "is --judge.model a model of that server" in early.stderr
    assert not folder.exists(), "the trial comes before the run folder"

    def of_rounds(server):
        """What was asked about the round's prompts; the trial and evaluations ask about others."""
        return [text for text in server.asked if "User: What is" in text]

    with JudgeServer(judge=by_worth) as server:
        server.plan = lambda *_: "500" if len(of_rounds(server)) >= 10 else None
        broken = train(*argv(server, "--judge.max_retries", "1"))
        assert broken.returncode == 2, broken.stderr[-3000:]
        assert "failed: Error code: 500 - no luck with 500 (attempt 2 of 2" in broken.stderr
        assert "Traceback" not in broken.stderr
        assert len(of_rounds(server)) == 10 + 2
        assert not (folder / "round_1/pairs.jsonl").exists(), "no failure became a preference"
        answered = set(of_rounds(server)[:10])

    with JudgeServer(judge=by_worth) as server:  # at another address
        resumed = train(*argv(server, "--resume"))
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        asked = of_rounds(server)
        assert len(set(asked)) == len(asked) and not answered & set(asked)
        assert set(server.keys) == {"Bearer sk-secret"}

    pairs = read_jsonl(folder / "round_1/pairs.jsonl")
    assert len(pairs) >= 12 and {pair["source"] for pair in pairs} == {"judge"}
    questions = len(answered | set(asked)) // 2
    for pair in pairs:
        chosen, rejected = (worth(pair[side][0]["content"]) for side in ("chosen", "rejected"))
        gain = chosen - rejected
        expected = (sigmoid(gain + 1) + 1 - sigmoid(1 - gain)) / 2
        assert chosen > rejected and pair["scores"]["chosen"] == pytest.approx(expected, abs=1e-9)
        assert pair["scores"]["chosen"] + pair["scores"]["rejected"] == pytest.approx(1)
    facts = json.loads((folder / "round_1/manifest.json").read_text())["stages"]["pairs"]
    assert facts["oracle"] == "judge" and facts["pairs"] + facts["prompts_with_equal_rewards"] == questions
    cost = json.loads((folder / "ledger.json").read_text())["stages"]["round_1/annotate"]
    assert cost["judge_calls"] == len(asked) and cost["judge_failures"] == 0
    assert cost["judge_prompt_tokens"] == sum(len(text.split()) for text in asked)
    for path in folder.rglob("*"):
        assert path.is_dir() or b"sk-secret" not in path.read_bytes(), path
