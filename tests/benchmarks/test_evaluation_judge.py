"""The judge of benchmarks against a server on this machine. As a script, a process to kill: python FILE FOLDER URL."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from judge_server import JudgeServer

from openrlhf_sgpo import flags
from openrlhf_sgpo.benchmarks import judge as module
from openrlhf_sgpo.benchmarks.judge import EvaluationJudge, EvaluationJudgeSettings, judge_problems, with_preset
from openrlhf_sgpo.judge import client
from openrlhf_sgpo.judge.client import JudgeError, Request
from openrlhf_sgpo.judge.reply import Reply, Unusable

ROOT = Path(__file__).parents[2]
LETTERS = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 2}
WORDS = {"max_tokens": 8, "temperature": 0}
COUNT = 12


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def by_number(text: str) -> list[tuple[str, float]]:
    """The server's rule: the more, the rather m."""
    share = (1 + int(text.split()[-1])) / (COUNT + 2)
    return sorted([("m", math.log(share)), ("M", math.log(1 - share))], key=lambda item: -item[1])


def share_of_m(reply: Reply) -> float:
    log_probs = dict(reply.top)
    if "m" not in log_probs:
        raise Unusable("no m" if log_probs else "no log-probabilities")
    return math.exp(log_probs["m"])


def requests(count: int = COUNT) -> list[Request]:
    return [Request(f"item {i}", [{"role": "user", "content": f"m or M, item {i}"}]) for i in range(count)]


def make(folder: Path, url: str, partial: bool = False, **changes) -> EvaluationJudge:
    settings = {"base_url": url, "model": "org/rule", "timeout": 30.0, "concurrency": 4} | changes
    return EvaluationJudge(EvaluationJudgeSettings(**settings), folder, partial)


UNDISTURBED = [pytest.approx((1 + i) / (COUNT + 2), abs=1e-12) for i in range(COUNT)]


REASONS = {
    "429": "no luck with 429",
    "500": "no luck with 500",
    "401": "set --judge.api_key",
    "400": "the server will not answer this",
    "slow": "timed out",
    "half": "not a chat completion",
    "cut": "body",
    "bare": "no log-probabilities",
    "other": "no m",
}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "reason"), REASONS.items())
def test_a_failure_stops_and_a_rerun_asks_once_more_than_it_failed(mode, reason, tmp_path):
    failed: Counter[str] = Counter()

    def plan(text, times):
        if text.endswith((" 2", " 7")):
            failed[text] += 1
            return mode
        return None

    patience = 1.0 if mode == "slow" else 30.0
    with JudgeServer(plan, judge=by_number, delay=1.5) as server:
        first = make(tmp_path, server.url, max_retries=1, timeout=patience, concurrency=1)
        with pytest.raises(JudgeError, match=reason) as caught:
            first.ask("test", LETTERS, requests(), share_of_m, "test")
        # Only what the judge said, and could not be read, and what it refused to judge may be left out.
        assert ("--partial" in str(caught.value)) == (mode in ("bare", "other", "400"))
        assert failed == {"m or M, item 2": 1 if mode in ("401", "400") else 2}
        server.plan = lambda text, times: None
        assert make(tmp_path, server.url).ask("test", LETTERS, requests(), share_of_m, "test") == UNDISTURBED
        for request in requests():
            text = request.messages[0]["content"]
            assert server.times(text) == failed[text] + 1


def test_a_server_that_goes_down(tmp_path):
    with JudgeServer(judge=by_number) as server:
        make(tmp_path, server.url).ask("test", LETTERS, requests(5), share_of_m, "test")
    with pytest.raises(JudgeError, match="Connection error"):
        make(tmp_path, server.url, max_retries=1).ask("test", LETTERS, requests(), share_of_m, "test")
    with JudgeServer(judge=by_number) as elsewhere:
        assert make(tmp_path, elsewhere.url).ask("test", LETTERS, requests(), share_of_m, "test") == UNDISTURBED
        assert sorted(elsewhere.asked) == sorted(request.messages[0]["content"] for request in requests()[5:])


@pytest.mark.parametrize(("mode", "attempts"), [("bare", 3), ("other", 3), ("400", 1)])
def test_partial_leaves_out_what_stays_unreadable_or_is_refused_and_a_rerun_asks_for_it(mode, attempts, tmp_path):
    def plan(text, times):
        return mode if text.endswith((" 2", " 7")) else None

    with JudgeServer(plan, judge=by_number) as server:
        first = make(tmp_path, server.url, partial=True, max_retries=2)
        shares = first.ask("test", LETTERS, requests(), share_of_m, "test")
        assert shares == [None if i in (2, 7) else UNDISTURBED[i] for i in range(COUNT)]
        assert (first.usage()["judge_calls"], first.usage()["judge_failures"]) == (COUNT - 2, 2 * attempts)
        server.plan = lambda text, times: None
        again = make(tmp_path, server.url, partial=True)
        assert again.ask("test", LETTERS, requests(), share_of_m, "test") == UNDISTURBED
        assert [server.times(f"m or M, item {i}") for i in range(COUNT)] == [
            attempts + 1 if i in (2, 7) else 1 for i in range(COUNT)
        ]


@pytest.mark.parametrize("mode", ["500", "half", "401", "404", "quota"])
def test_partial_does_not_excuse_a_broken_server(mode, tmp_path):
    with JudgeServer(lambda text, times: mode if text.endswith(" 2") else None, judge=by_number) as server:
        judge = make(tmp_path, server.url, partial=True, max_retries=1)
        with pytest.raises(JudgeError, match="item 2 failed"):
            judge.ask("test", LETTERS, requests(), share_of_m, "test")


@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_asked(tmp_path):
    def start() -> subprocess.Popen:
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        command = [sys.executable, __file__, str(tmp_path), server.url]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **paths})

    with JudgeServer(judge=by_number, pause=0.2) as server:
        process = start()
        while len(server.asked) < 6:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.4)  # what was under way arrives at the server
        before = Counter(server.asked)
        kept = len(make(tmp_path, server.url).cache)
        assert 0 < kept < len(before) < COUNT
        server.pause = 0.0
        assert json.loads(start().communicate()[0].splitlines()[-1]) == UNDISTURBED
        after = Counter(server.asked)
    # Two were under way when it was killed; nothing else is asked twice.
    assert len(after) == COUNT and after.total() == COUNT + len(before) - kept and len(before) - kept <= 2


def test_benchmarks_share_what_is_kept(tmp_path):
    with JudgeServer(judge=by_number) as server:
        judge = make(tmp_path, server.url)
        assert judge.ask("one", LETTERS, requests(), share_of_m, "test") == UNDISTURBED
        assert judge.ask("other", dict(reversed(LETTERS.items())), requests(), share_of_m, "test") == UNDISTURBED
        assert len(server.asked) == COUNT
        words = judge.ask("words", WORDS, requests(3), lambda reply: reply.text, "test")
        assert words == ["M", "M", "M"] and len(server.asked) == COUNT + 3
        assert judge.usage()["judge_calls"] == judge.usage()["judge_completion_tokens"] == COUNT + 3
        other = make(tmp_path, server.url, model="org/other")
        other.ask("one", LETTERS, requests(1), share_of_m, "test")
        assert len(server.asked) == COUNT + 4
    kept = {path.name: path.read_text().count('"key"') for path in (tmp_path / "judgements").iterdir()}
    assert kept == {"org_rule.jsonl": COUNT + 3, "org_other.jsonl": 1}


def test_what_it_may_cost_is_said_before_and_what_it_did_after(tmp_path, capsys):
    prices = {"price_prompt": 3000.0, "price_completion": 5000.0}
    with JudgeServer(judge=by_number) as server:
        judge = make(tmp_path, server.url, **prices)
        judge.ask("quiet", LETTERS, requests(1), share_of_m, "")
        assert capsys.readouterr().out == ""
        judge.ask("loud", WORDS, requests(4), lambda reply: reply.text, "test")
        before, after = capsys.readouterr().out.splitlines()
        judge.ask("loud", WORDS, requests(4), lambda reply: reply.text, "test")
        assert capsys.readouterr().out == "judge org/rule, loud: all 4 answers are stored already\n"
    # "m or M, item 0" has 14 characters, and 5 words, which the server counts as tokens.
    assert before == (
        "judge org/rule, loud: 4 of 4 answers to judge; estimate: 14 prompt tokens (4 characters each), up to 32 completion "
        f"tokens, up to {14 * 0.003 + 32 * 0.005:.2f} USD"
    )
    assert after == (
        "judge org/rule, loud: 4 answers, 0 failed attempts, 20 prompt and 4 completion tokens, "
        f"{20 * 0.003 + 4 * 0.005:.2f} USD"
    )
    assert judge.usage()["judge_usd"] == pytest.approx(25 * 0.003 + 5 * 0.005)


def test_what_may_cost_too_much_is_not_asked(tmp_path):
    """Four answers may cost 4 * (14 / 4 + 1) = 18 dollars at a dollar per token, and cost 4 * (5 + 1) = 24."""
    prices = {"price_prompt": 1e6, "price_completion": 1e6}
    with JudgeServer(judge=by_number) as server:
        with pytest.raises(JudgeError, match=r"--judge.max_cost 17.99: 4 missing answers may cost 18.00 USD"):
            make(tmp_path, server.url, **prices, max_cost=17.99).ask("t", LETTERS, requests(4), share_of_m, "")
        assert server.asked == []
        judge = make(tmp_path, server.url, **prices, max_cost=18.0)
        judge.ask("t", LETTERS, requests(4), share_of_m, "")
        judge.ask("t", LETTERS, requests(4), share_of_m, "")  # what is kept is free
        with pytest.raises(JudgeError, match=r"1 missing answers may cost .* 24.00 USD have been spent"):
            judge.ask("t", LETTERS, requests(5), share_of_m, "")
        assert len(server.asked) == 4


def parsed(*argv: str) -> EvaluationJudgeSettings:
    instances, given, _ = flags.parse(argv, {"judge": EvaluationJudgeSettings})
    return with_preset(instances["judge"], given)


def test_the_command_line_wins_over_the_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: theirs\nbase_url: http://localhost:1/v1\nlogprobs: false\nconcurrency: 3\n")
    settings = parsed("--judge.preset", str(path), "--judge.model", "mine", "--judge.concurrency", "16")
    # 16 is the default, but it was given.
    assert (settings.model, settings.concurrency) == ("mine", 16)
    assert (settings.base_url, settings.logprobs) == ("http://localhost:1/v1", False)
    assert EvaluationJudge(settings, tmp_path).identity == {
        "model": "mine", "preset": "mine", "logprobs": False, "local": False, "endpoint": "localhost", "api_version": ""
    }  # fmt: skip
    assert parsed("--judge.model", "alone") == EvaluationJudgeSettings(model="alone")


def test_a_preset_with_mistakes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\nmodle: m\ntimeout: soon\n")
    with pytest.raises(flags.SettingsError) as caught:
        parsed("--judge.preset", str(path))
    assert f"modle is unknown; did you mean --model? ({path}:2)" in str(caught.value)
    assert f"timeout got 'soon', expected a number ({path}:3)" in str(caught.value)
    path.write_text("preset: gpt-4.1\n")
    with pytest.raises(flags.SettingsError, match="a preset cannot name a preset"):
        parsed("--judge.preset", str(path))
    with pytest.raises(
        flags.SettingsError, match="--judge.preset: gpt-5000 is neither a file nor one of the presets .*gpt-4.1"
    ):
        parsed("--judge.preset", "gpt-5000")


FURTHER = {
    "azure": ["--judge.base_url", "https://resource.openai.azure.com", "--judge.model", "deployment"],
    "without-logprobs": ["--judge.base_url", "http://localhost:8000/v1", "--judge.model", "m"],
}


@pytest.mark.parametrize("path", sorted(module.PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_of_this_checkout(path, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setenv("GEMINI_API_KEY", "key")
    name = path.stem
    settings = parsed("--judge.preset", name, *FURTHER.get(name, []))
    assert judge_problems(settings) == []
    assert EvaluationJudge(settings, tmp_path).identity["preset"] == name
    if name in FURTHER:
        assert judge_problems(parsed("--judge.preset", name)) != [], "it says itself what has to be added"


def test_presets_of_local_judges_are_pinned(tmp_path):
    judges = [parsed("--judge.preset", path.stem) for path in module.PRESETS.glob("*.yaml")]
    local = [settings for settings in judges if settings.model and not settings.base_url]
    assert len(local) == 2
    for settings in local:
        assert len(settings.revision) == 40
        assert EvaluationJudge(settings, tmp_path).identity["model"] == f"{settings.model}@{settings.revision[:8]}"


def test_a_judge_that_thinks_has_room_for_it(tmp_path, capsys):
    prices = {"price_prompt": 1.0, "price_completion": 1e6}
    with JudgeServer(judge=by_number) as server:
        judge = make(tmp_path, server.url, thinking_tokens=100, **prices)
        judge.state_cost([(LETTERS, requests(3))])
        (line,) = capsys.readouterr().out.splitlines()
        assert (
            "3 of 3 answers to judge in all" in line and f"up to {3 * (LETTERS['max_tokens'] + 100)} completion" in line
        )
        judge.ask("test", LETTERS, requests(3), share_of_m, "")
        assert {body["max_tokens"] for body in server.bodies} == {LETTERS["max_tokens"] + 100}
        judge.state_cost([(LETTERS, requests(3))])
        assert not capsys.readouterr().out  # nothing is missing
        other = make(tmp_path, server.url, max_cost=1.0, **prices)
        with pytest.raises(JudgeError, match=r"--judge.max_cost 1.0: 5 missing answers"):
            other.state_cost([(LETTERS, requests(3)), (LETTERS | {"seed": 1}, requests(2))])
        assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ("", "--judge.model: missing, there is no default judge"),
        ("--judge.model gpt-4.1", "--judge.base_url: missing, and --judge.model gpt-4.1 is neither a folder nor a hub name"),
        ("--judge.model m --judge.base_url localhost:8000", "--judge.base_url: not an address such as"),
        ("--judge.model m --judge.base_url http://x/v1 --judge.max_len 9", "--judge.max_len: only for a model served locally"),
        ("--judge.model org/m --judge.api_version 2024-10-21", "--judge.base_url: missing, --judge.api_version needs"),
        ("--judge.model org/m --judge.max_cost 3", "--judge.max_cost: needs --judge.price_prompt"),
        ("--judge.model org/m --judge.api_key env", "the variable OPENAI_API_KEY is not set"),
        ("--judge.model org/m --judge.concurrency 0", "--judge.concurrency: 0 is out of range, use at least 1"),
        ("--judge.model org/m --judge.timeout 0", "--judge.timeout: 0.0 is out of range"),
        ("--judge.model org/m --judge.gpu_memory_utilization 2", "--judge.gpu_memory_utilization: 2.0 is out of range"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(argv, problem, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (problem_text,) = judge_problems(parsed(*argv.split()))
    assert problem in problem_text


def test_the_key_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with JudgeServer(judge=by_number) as server:
        judge = make(tmp_path, server.url, api_key="env:JUDGE_KEY")
        judge.ask("test", LETTERS, requests(1), share_of_m, "")
        assert server.keys == ["Bearer sk-secret"]
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert written and "sk-" not in json.dumps([written, judge.identity])
    assert "sk-secret" not in flags.dump({"judge": judge.settings})
    assert make(tmp_path, "https://user:sk-address@host.example:8000/v1").identity["endpoint"] == "host.example"


class AzureServer(JudgeServer):
    """Notes the path and the header with the key, too."""

    def _handle(self, request):
        self.path, self.api_key = request.path, request.headers.get("api-key")
        super()._handle(request)


def test_azure_is_asked_in_its_own_way(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "azure-key")
    with AzureServer(judge=by_number) as server:
        endpoint = server.url.removesuffix("/v1")
        judge = make(tmp_path, endpoint, model="deployment", api_version="2024-10-21", api_key="env")
        assert judge.ask("test", LETTERS, requests(1), share_of_m, "") == UNDISTURBED[:1]
        assert server.path == "/openai/deployments/deployment/chat/completions?api-version=2024-10-21"
        assert server.api_key == "azure-key" and server.keys == [None]
    assert judge.identity["api_version"] == "2024-10-21"


if __name__ == "__main__":
    killable = make(Path(sys.argv[1]), sys.argv[2], concurrency=2)
    print(json.dumps(killable.ask("test", LETTERS, requests(), share_of_m, "test")))
