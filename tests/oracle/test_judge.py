"""The oracle ``judge`` against a real server whose rule is known."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import BIAS, JudgeServer, shown, sigmoid
from running import free_port

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.content_cache import ContentCache
from openrlhf_sgpo.judge import client
from openrlhf_sgpo.judge.client import JudgeError
from openrlhf_sgpo.judge.reply import Reply, Unusable
from openrlhf_sgpo.oracle import Answer, Question
from openrlhf_sgpo.oracle.judge import Judge, letter_share, letter_written

SCRIPT = Path(__file__).with_name("ask_judge.py")
spec = importlib.util.spec_from_file_location("ask_judge", SCRIPT)
ask_judge = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ask_judge)
make_judge, questions = ask_judge.make_judge, ask_judge.questions


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def by_the_rule(first: Answer, second: Answer, temperature: float = 1.0) -> float:
    """Both orders of the server's rule, averaged; of a letter the server splits off a tenth for other words."""

    def of_order(a: str, b: str) -> float:
        share = sigmoid(a.count("good") - b.count("good") + BIAS)
        odds = math.log(0.9 * share) - math.log(0.9 * (1 - share))
        return sigmoid(odds / temperature)

    return (of_order(first.text, second.text) + 1 - of_order(second.text, first.text)) / 2


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_both_orders_of_every_pair_are_averaged(tmp_path, temperature):
    asked = questions(4)
    with JudgeServer() as server:
        judge = make_judge(tmp_path, server.url, temperature=temperature)
        matrices = judge.preferences(asked, "test")
        assert len(server.asked) == judge.calls == 4 * 3 * 2
        assert Counter(server.asked).most_common(1)[0][1] == 1
        assert all(
            (body["max_tokens"], body["temperature"], body["logprobs"], body["top_logprobs"]) == (1, 0, True, 20)
            for body in server.bodies
        )
        tokens = sum(len(text.split()) for text in server.asked)
    assert judge.usage() == {
        "judge_calls": 24, "judge_prompt_tokens": tokens, "judge_completion_tokens": 24, "judge_failures": 0
    }  # fmt: skip
    for question, matrix in zip(asked, matrices, strict=True):
        for i, j in combinations(range(3), 2):
            expected = by_the_rule(question.answers[i], question.answers[j], temperature)
            assert matrix[i][j] == pytest.approx(expected, abs=1e-12)
            assert matrix[i][j] + matrix[j][i] == pytest.approx(1, abs=1e-12)
        assert [matrix[i][i] for i in range(3)] == [0.5] * 3
    assert len({round(p, 6) for matrix in matrices for row in matrix for p in row}) > 4


def test_rewards_are_mean_preferences_over_the_other_answers(tmp_path):
    (question,) = questions(2)[1:]
    with JudgeServer() as server:
        (rewards,) = make_judge(tmp_path, server.url).rewards([question], "test")
    a, b, c = question.answers
    assert rewards[0] == pytest.approx((by_the_rule(a, b) + by_the_rule(a, c)) / 2, abs=1e-12)
    assert sum(rewards) == pytest.approx(3 / 2, abs=1e-12)


def test_what_was_judged_is_not_asked_again(tmp_path):
    asked = questions(3)
    with JudgeServer() as server:
        judge = make_judge(tmp_path, server.url)
        matrices = judge.preferences(asked, "test")
        count = len(server.asked)
        assert judge.preferences(asked, "test") == matrices and judge.calls == count
        turned = [Question("other", question.prompt, question.answers[::-1]) for question in asked]
        for matrix, other in zip(matrices, judge.preferences(turned, "test"), strict=True):
            assert [row[::-1] for row in other[::-1]] == [pytest.approx(row, abs=1e-12) for row in matrix]
        again = make_judge(tmp_path, server.url)  # as another process
        assert again.preferences(asked, "test") == matrices and again.calls == 0
        # Another temperature of the softmax reads the same log-probabilities.
        assert make_judge(tmp_path, server.url, temperature=2.0).preferences(asked, "test") != matrices
        assert len(server.asked) == count


def test_equal_texts_are_one_half_without_asking(tmp_path):
    same = Question("same", [{"role": "user", "content": "?"}], (Answer("good"), Answer("good", truncated=True)))
    with JudgeServer() as server:
        judge = make_judge(tmp_path, server.url)
        assert judge.preferences([same], "test") == [[[0.5, 0.5], [0.5, 0.5]]]
        assert server.asked == [] and judge.calls == 0


def test_one_seeded_order_costs_half(tmp_path):
    asked = questions(16, answers=2)

    def orders(server):
        """By question, whether its first answer was shown first."""
        said = {shown(text) for text in server.asked}
        texts = {question.id: tuple(answer.text for answer in question.answers) for question in asked}
        return {name: pair in said for name, pair in texts.items()}

    with JudgeServer() as server:
        judge = make_judge(tmp_path / "one", server.url, swap="random")
        matrices = judge.preferences(asked, "test")
        assert judge.calls == len(server.asked) == 16
        first = orders(server)
        assert 2 < sum(first.values()) < 14, "both orders occur"
        for question, matrix in zip(asked, matrices, strict=True):
            a, b = (answer.text.count("good") for answer in question.answers)
            expected = sigmoid(a - b + BIAS) if first[question.id] else 1 - sigmoid(b - a + BIAS)
            assert matrix[0][1] == pytest.approx(expected, abs=1e-12)
        # The pair decides, not its place in the question.
        turned = [Question(question.id, question.prompt, question.answers[::-1]) for question in asked]
        for matrix, other in zip(matrices, judge.preferences(turned, "test"), strict=True):
            assert other[1][0] == pytest.approx(matrix[0][1], abs=1e-12)
        assert judge.calls == 16
    with JudgeServer() as server:
        other_seed = make_judge(tmp_path / "two", server.url, swap="random")
        other_seed.config.train.seed += 1
        other_seed.preferences(asked, "test")
        assert orders(server) != first


def test_without_log_probabilities_the_letter_is_read(tmp_path):
    asked = questions(4)
    with JudgeServer() as server:
        judge = make_judge(tmp_path, server.url, logprobs=False)
        matrices = judge.preferences(asked, "test")
        assert not any("logprobs" in body for body in server.bodies)
    for question, matrix in zip(asked, matrices, strict=True):
        for i, j in combinations(range(3), 2):
            a, b = (question.answers[k].text.count("good") for k in (i, j))
            # Where the rule cannot tell, its first place wins in both orders: an honest one half.
            assert matrix[i][j] == (a > b) + 0.5 * (a == b)


def test_a_judge_may_go_round_in_a_circle(tmp_path):
    """Rock beats scissors beats paper beats rock: the rewards of all three are one half."""
    beats = {("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")}

    def judge_of(text):
        winner = "A" if shown(text) in beats else "B"
        return [(winner, math.log(0.9)), ({"A": "B", "B": "A"}[winner], math.log(0.1))]

    game = Question("game", [{"role": "user", "content": "?"}], tuple(map(Answer, ("rock", "paper", "scissors"))))
    with JudgeServer(judge=judge_of) as server:
        judge = make_judge(tmp_path, server.url)
        (matrix,) = judge.preferences([game], "test")
        assert [matrix[0][2], matrix[2][1], matrix[1][0]] == pytest.approx([0.9] * 3)
        assert judge.rewards([game], "test")[0] == pytest.approx([0.5] * 3)


LOGPROBS = st.floats(-12, -0.01)


@given(LOGPROBS, LOGPROBS, st.floats(0.1, 10))
def test_the_share_of_a_letter_is_a_softmax(a, b, temperature):
    share = letter_share(Reply("", top=(("A", a), ("x", -0.5), ("B", b))), temperature)
    assert share == pytest.approx(math.exp(a / temperature) / (math.exp(a / temperature) + math.exp(b / temperature)))
    assert letter_share(Reply("", top=(("B", a), ("A", b))), temperature) == pytest.approx(1 - share, abs=1e-12)
    # Split over variants with white space, a letter has the same probability.
    split = (("A", a - math.log(2)), (" A", a - math.log(2)), (" B", b - math.log(4)), ("\nB", b + math.log(3 / 4)))
    assert letter_share(Reply("", top=split), temperature) == pytest.approx(share, abs=1e-9)


def test_letters_that_are_not_among_the_likeliest():
    assert letter_share(Reply("", top=(("A", -3.0), ("Both", -0.1))), 1.0) == 1
    assert letter_share(Reply("", top=((" B", -3.0),)), 1.0) == 0
    with pytest.raises(Unusable, match=r"neither A nor B is among the most likely tokens \('a', 'Answer'\)"):
        letter_share(Reply("A", top=(("a", -0.1), ("Answer", -3.0))), 1.0)
    with pytest.raises(Unusable, match=r"no log-probabilities; --judge.logprobs false"):
        letter_share(Reply("A"), 1.0)


def test_written_letters():
    assert [letter_written(Reply(text)) for text in ("A", " A", "(A)", "**B**", "B.", "\nB\n")] == [1, 1, 1, 0, 0, 0]
    for text in ("", "a", "AB", "A or B", "Answer", "A good", "Both", "C"):
        with pytest.raises(Unusable, match="neither A nor B"):
            letter_written(Reply(text))


@pytest.mark.parametrize("mode", ["500", "half", "bare", "other"])
def test_a_failure_that_passes_leaves_no_trace_in_the_preferences(mode, tmp_path):
    asked = questions(2)
    with JudgeServer() as server:
        undisturbed = make_judge(tmp_path / "undisturbed", server.url).preferences(asked, "test")
    with JudgeServer(lambda _, times: mode if times == 0 else None) as server:
        judge = make_judge(tmp_path / "disturbed", server.url)
        assert judge.preferences(asked, "test") == undisturbed
        assert len(server.asked) == 24 and judge.usage()["judge_failures"] == judge.calls == 12


@pytest.mark.parametrize(
    ("mode", "reason"), [("other", "neither A nor B is among"), ("bare", "no log-probabilities"), ("500", "500")]
)
def test_a_failure_that_stays_is_no_preference(mode, reason, tmp_path):
    def plan(text, times):
        return mode if "Question 1?" in text else None

    asked = questions(2)
    with JudgeServer(plan) as server:
        judge = make_judge(tmp_path, server.url, max_retries=1, concurrency=1)
        with pytest.raises(
            JudgeError, match=f"the comparison of two answers to q-1 failed: .*{reason}.*6 answers are kept"
        ):
            judge.preferences(asked, "test")
        server.plan = lambda text, times: None
        matrices = make_judge(tmp_path, server.url).preferences(asked, "test")
        assert len(server.asked) == 6 + 2 + 6
    with JudgeServer() as server:
        assert matrices == make_judge(tmp_path / "undisturbed", server.url).preferences(asked, "test")


def test_a_written_text_that_is_no_letter_is_a_failure(tmp_path):
    with JudgeServer(lambda *_: "other") as server:
        judge = make_judge(tmp_path, server.url, logprobs=False, max_retries=1)
        with pytest.raises(JudgeError, match="the judge wrote 'The', neither A nor B"):
            judge.preferences(questions(1), "test")


def run_script(folder: Path, url: str, **environment: str) -> subprocess.Popen:
    # Tests that build a strategy in this process leave its rank in the environment.
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**inherited, "PYTHONPATH": str(SCRIPT.parents[2]), **environment},
    )


@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_asked(tmp_path):
    """SIGKILL in the middle: what had arrived is not asked again, what was under way once more, the rest once; and the
    figures are those of a run that nothing disturbed."""
    with JudgeServer() as server:
        expected = make_judge(tmp_path / "undisturbed", server.url).preferences(questions(8), "test")
    with JudgeServer(pause=0.1) as server:
        process = run_script(tmp_path / "killed", server.url)
        while len(server.asked) < 18:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.3)  # what was under way arrives at the server
        before = Counter(server.asked)
        kept = len(ContentCache(tmp_path / "killed/judgements/judge.jsonl"))
        assert 0 < kept < len(before) < 48 and set(before.values()) == {1}
        server.pause = 0.0
        again = run_script(tmp_path / "killed", server.url)
        result = json.loads(again.communicate()[0])
        after = Counter(server.asked)
    assert result["preferences"] == expected
    assert result["usage"]["judge_calls"] == 48 - kept
    assert len(after) == 48 and after.total() == 48 + (len(before) - kept)
    assert max(after.values()) <= 2 and all(text in before for text, times in after.items() if times == 2)


@pytest.mark.slow
def test_two_ranks_ask_once_and_fail_together(tmp_path):
    def ranks(name: str) -> list[tuple[int, bytes, bytes]]:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        processes = [run_script(tmp_path / name, server.url, RANK=rank, **shared) for rank in "01"]
        outputs = [process.communicate(timeout=120) for process in processes]
        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]

    with JudgeServer() as server:
        (code, first, _), (other_code, other, _) = ranks("whole")
        assert code == other_code == 0 and json.loads(first) == json.loads(other)
        assert len(server.asked) == 48 and json.loads(first)["usage"]["judge_calls"] == 48
        server.plan = lambda text, times: "500" if len(server.asked) > 60 else None
        for code, _, error in ranks("broken"):
            assert code == 1 and b"JudgeError: --judge.base_url" in error


def test_settings_that_lack_something(monkeypatch):
    config = Config()
    assert [problem.split(":")[0] for problem in Judge.problems(config)] == ["--judge.base_url", "--judge.model"]
    config.judge.base_url, config.judge.model, config.judge.api_key = "localhost:8000", "m", "env"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert [problem.split(":")[0] for problem in Judge.problems(config)] == ["--judge.base_url", "--judge.api_key"]
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    config.judge.base_url = "http://localhost:8000/v1"
    assert Judge.problems(config) == []


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("401", "set --judge.api_key"),
        ("404", "is --judge.model a model"),
        ("bare", "--judge.logprobs false"),
        (None, None),
    ],
)
def test_a_trial_shows_before_anything_is_loaded_what_is_wrong(mode, message):
    with JudgeServer(lambda *_: mode) as server:
        config = make_judge(Path("unused"), server.url, max_retries=0).config
        if message is None:
            Judge.check(config)
        else:
            with pytest.raises(JudgeError, match=message):
                Judge.check(config)
        assert len(server.asked) == 1 and not Path("unused").exists()
