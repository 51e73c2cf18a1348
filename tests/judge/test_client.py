"""The client against a real server on this machine that fails in every way it knows."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
from judge_server import JudgeServer

from openrlhf_sgpo.config import ServerSettings
from openrlhf_sgpo.content_cache import ContentCache, content_key
from openrlhf_sgpo.judge import client
from openrlhf_sgpo.judge.client import ChatClient, JudgeError, Request, Unanswered
from openrlhf_sgpo.judge.reply import Unusable

DECODING = {"max_tokens": 1, "temperature": 0}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def echo(text: str) -> list[tuple[str, float]]:
    return [(f"echo of {text}", 0.0)]


def settings(server: JudgeServer, **changes) -> ServerSettings:
    return ServerSettings(**{"base_url": server.url, "model": "echo", "max_retries": 3, "timeout": 30.0} | changes)


def requests(count: int) -> list[Request]:
    return [Request(f"text {i}", [{"role": "user", "content": f"text {i}"}]) for i in range(count)]


def text_of(reply):
    return reply.text


def test_replies_come_in_the_order_of_the_requests_and_equal_ones_are_asked_once():
    with JudgeServer(judge=echo) as server:
        chat = ChatClient(settings(server), DECODING)
        asked = requests(5)
        texts = chat.ask([*asked[::-1], *asked], "test", text_of)
        assert texts == [f"echo of text {i}" for i in (4, 3, 2, 1, 0, 0, 1, 2, 3, 4)]
        assert sorted(server.asked) == [f"text {i}" for i in range(5)]
        assert chat.counts == {"calls": 5, "prompt_tokens": 10, "completion_tokens": 5}
        assert all(body.items() >= (DECODING | {"model": "echo"}).items() for body in server.bodies)


def test_requests_at_a_time():
    with JudgeServer(judge=echo, pause=0.05) as server:
        ChatClient(settings(server, concurrency=4), DECODING).ask(requests(20), "test", text_of)
        assert server.busiest == 4


def test_what_was_asked_decides_what_is_kept(tmp_path):
    """Model, messages and decoding: another of one is another question; the address is not."""
    path = tmp_path / "judgements/cache.jsonl"
    with JudgeServer(judge=echo) as server, JudgeServer(judge=echo) as elsewhere:
        ChatClient(settings(server), DECODING, path).ask(requests(3), "test", text_of)
        again = ChatClient(settings(elsewhere, timeout=9.0), dict(reversed(DECODING.items())), path)
        assert again.ask(requests(3), "test", text_of) == [f"echo of text {i}" for i in range(3)]
        assert elsewhere.asked == [] and again.counts == {}
        ChatClient(settings(server), DECODING | {"seed": 1}, path).ask(requests(1), "test", text_of)
        ChatClient(settings(server, model="other"), DECODING, path).ask(requests(1), "test", text_of)
        ChatClient(settings(server), DECODING, path).ask(requests(4), "test", text_of)
        assert len(server.asked) == 3 + 1 + 1 + 1 and len(ContentCache(path)) == 6


def test_a_damaged_answer_is_asked_again(tmp_path, capsys):
    path = tmp_path / "cache.jsonl"
    with JudgeServer(judge=echo) as server:
        assert ChatClient(settings(server), DECODING, path).ask(requests(3), "test", text_of) == [
            f"echo of text {i}" for i in range(3)
        ]
        path.write_text(path.read_text().replace("echo of text 1", "echo of text 7"))
        again = ChatClient(settings(server), DECODING, path)
        assert f"{path}: damaged lines, which are computed again: 1, the first is line " in capsys.readouterr().out
        assert again.ask(requests(3), "test", text_of) == [f"echo of text {i}" for i in range(3)]
        assert [server.times(f"text {i}") for i in range(3)] == [1, 2, 1]
    assert len(ContentCache(path)) == 3


PASSING = {"500": "luck", "429": "luck", "slow": "timed out", "half": "JSON", "cut": "body", "nonsense": "completion"}


@pytest.mark.parametrize("mode", PASSING)
def test_a_failure_that_passes_is_asked_again(mode, tmp_path):
    with JudgeServer(lambda _, times: mode if times == 0 else None, judge=echo, delay=3.0) as server:
        patience = 1.0 if mode == "slow" else 30.0
        chat = ChatClient(settings(server, timeout=patience), DECODING, tmp_path / "cache.jsonl")
        start = time.perf_counter()
        assert chat.ask(requests(3), "test", text_of) == [f"echo of text {i}" for i in range(3)]
        seconds = time.perf_counter() - start
        assert chat.counts["calls"] == chat.counts["failures"] == chat.counts["retries"] == 3
        assert [server.times(f"text {i}") for i in range(3)] == [2, 2, 2]
    assert mode != "429" or seconds >= 1, "the server asked for a second"
    assert len(ContentCache(tmp_path / "cache.jsonl")) == 3


def test_a_limit_of_requests_ends_nothing_as_long_as_others_are_answered():
    """One request is turned away 15 times, more often than there are retries."""
    with JudgeServer(
        lambda text, times: "busy" if text == "text 0" and times < 15 else None, judge=echo, pause=0.05
    ) as server:
        chat = ChatClient(settings(server, max_retries=8, concurrency=2), DECODING)
        assert chat.ask(requests(60), "test", text_of) == [f"echo of text {i}" for i in range(60)]
        assert server.times("text 0") == 16
    with (
        JudgeServer(lambda *_: "busy", judge=echo) as server,
        pytest.raises(JudgeError, match="attempt 2 of 2, see --judge.max_retries"),
    ):
        ChatClient(settings(server, max_retries=1, concurrency=1), DECODING).ask(requests(1), "test", text_of)


@pytest.mark.parametrize("max_retries", [0, 2])
def test_a_reply_that_a_content_filter_cut_is_not_kept(max_retries, tmp_path):
    path = tmp_path / "cache.jsonl"
    with JudgeServer(lambda _, times: "filtered" if times == 0 else None, judge=echo) as server:
        chat = ChatClient(settings(server, max_retries=max_retries), DECODING, path)
        if max_retries:
            assert chat.ask(requests(1), "test", text_of) == ["echo of text 0"]
            return
        with pytest.raises(JudgeError, match="a content filter of the server has cut the reply"):
            chat.ask(requests(1), "test", text_of)
        assert len(ContentCache(path)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "reason"), PASSING.items())
def test_a_failure_that_stays_is_an_error_and_the_rest_is_kept(mode, reason, tmp_path):
    def plan(text, times):
        return mode if text == "text 7" else None

    path = tmp_path / "cache.jsonl"
    with JudgeServer(plan, judge=echo, delay=1.5) as server:
        patience = 1.0 if mode == "slow" else 30.0
        chat = ChatClient(settings(server, timeout=patience, max_retries=1, concurrency=1), DECODING, path)
        with pytest.raises(JudgeError) as caught:
            chat.ask(requests(10), "test", text_of)
        message = str(caught.value)
        assert f"--judge.base_url {server.url}, model echo: text 7 failed" in message and reason in message
        assert f"7 answers are kept in {path}" in message and "attempt 2 of 2" in message
        assert server.asked[-2:] == ["text 7", "text 7"] and len(server.asked) == 9
        # What failed is nowhere: with the server in order, it and what came after it is asked, and nothing else.
        server.plan = lambda text, times: None
        resumed = ChatClient(settings(server), DECODING, path)
        assert resumed.ask(requests(10), "test", text_of) == [f"echo of text {i}" for i in range(10)]
        assert sorted(server.asked[9:]) == ["text 7", "text 8", "text 9"] and resumed.counts["calls"] == 3


HOPELESS = {"401": "set --judge.api_key", "404": "is --judge.model a model", "400": "not answer", "quota": "not answer"}


@pytest.mark.parametrize(("mode", "advice"), HOPELESS.items())
def test_what_no_retry_can_mend_is_asked_once(mode, advice):
    with JudgeServer(lambda *_: mode) as server:
        with pytest.raises(JudgeError, match=advice) as caught:
            ChatClient(settings(server, concurrency=1), DECODING).ask(requests(5), "test", text_of)
        assert server.asked == ["text 0"] and f"no luck with {mode}" in str(caught.value)


def test_a_server_that_is_not_there():
    with JudgeServer() as server:
        gone = settings(server, max_retries=2)
    chat = ChatClient(gone, DECODING)
    with pytest.raises(
        JudgeError, match=r"text 0 failed: Connection error.*attempt 3 of 3, see --judge.max_retries\)$"
    ):
        chat.ask(requests(1), "test", text_of)
    assert chat.counts == {"failures": 3, "retries": 2}


def test_a_reply_that_is_not_accepted_is_never_kept(tmp_path):
    """It is asked for again; what it cost is counted."""

    def accept(reply):
        seen.append(reply.text)
        if len(seen) < 3:
            raise Unusable("not this one")
        return reply.text.upper()

    seen: list[str] = []
    with JudgeServer(judge=echo) as server:
        chat = ChatClient(settings(server), DECODING, tmp_path / "cache.jsonl")
        assert chat.ask(requests(1), "test", accept) == ["ECHO OF TEXT 0"]
        assert chat.counts == {
            "calls": 1, "failures": 2, "retries": 2, "prompt_tokens": 6, "completion_tokens": 3
        }  # fmt: skip
        with pytest.raises(JudgeError, match="text 1 failed: never"):
            chat.ask(requests(2), "test", lambda reply: reply.text if "0" in reply.text else refuse())
    assert len(ContentCache(tmp_path / "cache.jsonl")) == 1


def test_requests_without_a_usable_reply_can_be_left_out(tmp_path):
    """Those only: with a server that fails, even at the last attempt only, there is nothing to be left out."""

    def accept(reply):
        return reply.text if "1" not in reply.text else refuse()

    asked = requests(3)
    with JudgeServer(judge=echo) as server:
        chat = ChatClient(settings(server, max_retries=1), DECODING, tmp_path / "cache.jsonl")
        assert list(chat.missing([*asked, *asked]).values()) == asked
        assert chat.ask_partially([*asked, asked[1]], "test", accept) == [
            "echo of text 0",
            None,
            "echo of text 2",
            None,
        ]
        assert list(chat.missing(asked).values()) == [asked[1]] and server.times("text 1") == 2
        with pytest.raises(Unanswered, match=r"text 1 failed: never \(attempt 2 of 2"):
            chat.ask(asked, "test", accept)
        server.plan = lambda text, times: "500" if times % 2 else None
        with pytest.raises(JudgeError, match="no luck with 500"):
            chat.ask_partially(asked, "test", accept)


class Refusing(JudgeServer):
    """It says ``status`` instead of 400."""

    status = 400

    def _reply(self, request, body, text, mode):
        say = request.send_response
        request.send_response = lambda status: say(self.status if status == 400 else status)
        super()._reply(request, body, text, mode)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_the_server_refuses_is_asked_once_and_can_be_left_out(status):
    """A content filter, or a context that is too long: it says nothing about the other requests."""
    with Refusing(lambda text, _: "400" if text == "text 1" else None, judge=echo) as server:
        server.status = status
        chat = ChatClient(settings(server), DECODING)
        assert chat.ask_partially(requests(3), "test", text_of) == ["echo of text 0", None, "echo of text 2"]
        assert server.times("text 1") == 1 and chat.counts["failures"] == 1 and chat.counts["retries"] == 0
        with pytest.raises(Unanswered, match=f"text 1 failed: Error code: {status}.*will not answer this"):
            chat.ask(requests(3), "test", text_of)
        assert server.times("text 1") == 2


@pytest.mark.parametrize("mode", ["401", "404", "quota"])
def test_what_every_request_would_meet_leaves_nothing_out(mode):
    with JudgeServer(lambda text, _: mode if text == "text 1" else None, judge=echo) as server:
        with pytest.raises(JudgeError, match="text 1 failed") as caught:
            ChatClient(settings(server), DECODING).ask_partially(requests(3), "test", text_of)
        assert not isinstance(caught.value, Unanswered) and server.times("text 1") == 1


def test_no_credit_is_no_refusal_of_one_request():
    """Some servers say so with a 400."""

    class NoCredit(JudgeServer):
        def _reply(self, request, body, text, mode):
            say = request.send_response
            request.send_response = lambda status: say(400)
            super()._reply(request, body, text, mode)

    with NoCredit(lambda *_: "quota") as server, pytest.raises(JudgeError) as caught:
        ChatClient(settings(server), DECODING).ask_partially(requests(1), "test", text_of)
    assert not isinstance(caught.value, Unanswered)


@pytest.mark.slow
@pytest.mark.parametrize("partial", [False, True])
def test_what_is_under_way_at_a_failure_is_kept_and_no_more_is_asked(partial, tmp_path):
    path = tmp_path / "cache.jsonl"
    with JudgeServer(lambda text, _: "401" if text == "text 2" else "slow", judge=echo, delay=0.7) as server:
        chat = ChatClient(settings(server, concurrency=4), DECODING, path)
        with pytest.raises(JudgeError, match=f"text 2 failed.*set --judge.api_key. 3 answers are kept in {path}"):
            (chat.ask_partially if partial else chat.ask)(requests(12), "test", text_of)
        assert sorted(server.asked) == [f"text {i}" for i in range(4)] and chat.counts["calls"] == 3
        assert list(chat.missing(requests(12)).values()) == [requests(12)[i] for i in (2, *range(4, 12))]
        server.plan = lambda text, times: None
        again = ChatClient(settings(server), DECODING, path)
        assert again.ask(requests(12), "test", text_of) == [f"echo of text {i}" for i in range(12)]
        assert sorted(server.asked[4:]) == sorted(f"text {i}" for i in (2, *range(4, 12)))


@pytest.mark.parametrize("last", ["401", "500"])
def test_after_a_failure_nothing_is_asked_again(last, monkeypatch):
    """Neither by a worker that is in its pause, nor by one whose request fails later."""

    class Ordered(JudgeServer):
        def _reply(self, request, body, text, mode):
            time.sleep(0.5 if mode == last else 0)
            super()._reply(request, body, text, mode)

    monkeypatch.setattr(client, "FIRST_PAUSE", 60.0)
    with Ordered(lambda text, _: "401" if text == "text 0" else "500") as server:
        chat = ChatClient(settings(server, concurrency=3), DECODING)
        start = time.perf_counter()
        with pytest.raises(JudgeError, match="set --judge.api_key"):
            chat.ask(requests(9), "test", text_of)
        assert time.perf_counter() - start < 20
        assert sorted(server.asked) == ["text 0", "text 1", "text 2"]
        assert chat.counts == {"failures": 3}


def test_an_interrupt_waits_for_nothing():
    with JudgeServer(lambda *_: "slow", judge=echo, delay=10.0) as server:
        start = time.perf_counter()
        interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            ChatClient(settings(server), DECODING).ask(requests(3), "test", text_of)
        assert time.perf_counter() - start < 8


def test_clients_share_what_is_kept(tmp_path):
    cache = ContentCache(tmp_path / "cache.jsonl")
    with JudgeServer(judge=echo) as server:
        ChatClient(settings(server), DECODING, cache).ask(requests(2), "test", text_of)
        ChatClient(settings(server), DECODING, cache).ask(requests(3), "test", text_of)
        assert len(server.asked) == len(cache) == 3


def refuse():
    raise Unusable("never")


def test_a_date_as_retry_after():
    from datetime import datetime, timedelta, timezone
    from email.utils import format_datetime
    from types import SimpleNamespace

    def requested(value):
        return client._requested_pause(SimpleNamespace(response=SimpleNamespace(headers={"retry-after": value})))

    later = datetime.now(timezone.utc) + timedelta(seconds=30)
    assert 25 < requested(format_datetime(later)) <= 30
    assert requested(format_datetime(later - timedelta(hours=1))) == 0
    assert [requested(value) for value in ("2.5", "-1", "99999", "soon", "")] == [2.5, 0, 600, 0, 0]


def test_the_key_is_sent_and_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    monkeypatch.setenv("OTHER", "another-secret")
    file = tmp_path / "key"
    file.write_text("a-secret-in-a-file\n")
    sources = {
        "env:OTHER": "another-secret",
        f"file:{file}": "a-secret-in-a-file",
        "env": "from-the-environment",
        "": "none",
    }
    with JudgeServer(judge=echo) as server:
        for number, (key, sent) in enumerate(sources.items()):
            path = tmp_path / f"{number}.jsonl"
            ChatClient(settings(server, api_key=key), DECODING, path).ask(requests(1), "test", text_of)
            assert server.keys[-1] == f"Bearer {sent}"
            assert "secret" not in path.read_text() and "environment" not in path.read_text()


def test_a_killed_process_costs_the_line_that_it_was_writing(tmp_path):
    path = tmp_path / "cache.jsonl"
    cache = ContentCache(path)
    for number in range(3):
        cache[f"key {number}"] = {"text": "ä\u2028" * number, "value": number / 3}
    whole = path.read_bytes()
    for lost in range(1, len(json.dumps("ä") * 3)):
        path.write_bytes(whole[:-lost])
        again = ContentCache(path)
        assert len(again) == (3 if lost == 1 else 2)  # the end of the line itself may go
        again["key 2"] = cache["key 2"]
        assert [ContentCache(path)[f"key {i}"] for i in range(3)] == [cache[f"key {i}"] for i in range(3)]
    with pytest.raises(KeyError):
        ContentCache(path)["key 3"]


def test_keys_stand_for_contents():
    assert content_key("a", {"x": 1, "y": 2}) == content_key("a", {"y": 2, "x": 1})
    assert len({content_key("a", "b"), content_key("ab"), content_key("b", "a"), content_key(["a", "b"])}) == 4
