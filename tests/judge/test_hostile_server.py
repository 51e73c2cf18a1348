"""Servers that mean harm, or are out of order: real ones on this machine."""

from __future__ import annotations

import gzip
import json
import math
import socket
import threading
import time
import tracemalloc
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import JudgeServer

from openrlhf_sgpo.config import ServerSettings
from openrlhf_sgpo.content_cache import ContentCache
from openrlhf_sgpo.judge import client
from openrlhf_sgpo.judge.client import ChatClient, JudgeError, Request, Unanswered
from openrlhf_sgpo.judge.reply import Reply, Unusable, kept_reply, read_completion, read_reply, spent, written_text
from openrlhf_sgpo.oracle.judge import letter_share, letter_written

pytestmark = pytest.mark.slow

DECODING = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 2}
QUESTION = Request("a question", [{"role": "user", "content": "?"}])


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


@contextmanager
def serving(answer):
    """The address of a server whose replies ``answer`` writes, and what it was asked: headers and bodies."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            asked.append((dict(self.headers), self.rfile.read(int(self.headers.get("Content-Length", 0)))))
            with suppress(BrokenPipeError, ConnectionResetError):
                answer(self)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def send(handler, content: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def chat(url: str, path=None, **changes) -> ChatClient:
    return ChatClient(
        ServerSettings(**{"base_url": url, "model": "m", "max_retries": 1, "timeout": 20.0} | changes), DECODING, path
    )


def completion(content="A", top=(("A", -0.1), ("B", -2.0))) -> dict:
    listed = [{"token": token, "logprob": value} for token, value in top]
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return {"choices": [choice | {"logprobs": {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": listed}]}}]}


def text_of(reply):
    return reply.text


@pytest.mark.parametrize("api_version", ["", "2024-10-21"])
def test_a_redirect_to_another_host_is_refused_and_takes_no_key_along(api_version, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-never-elsewhere")
    with serving(lambda handler: send(handler, json.dumps(completion()).encode())) as (elsewhere, asked_elsewhere):
        target = elsewhere.replace("127.0.0.1", "localhost") + "/chat/completions"
        for status in (301, 302, 307, 308):
            with serving(lambda handler, status=status: send(handler, b"", status, Location=target)) as (url, asked):
                settings = ServerSettings(base_url=url, model="m", api_key="env", max_retries=3)
                with pytest.raises(
                    JudgeError, match="redirects to localhost, .* give that address as --judge.base_url"
                ):
                    ChatClient(settings, DECODING, api_version=api_version).ask([QUESTION], "", text_of)
                assert len(asked) == 1, "it is not asked again"
        assert asked_elsewhere == []


def test_a_redirect_on_the_same_server_is_followed():
    def answer(handler):
        if handler.path == "/moved":
            send(handler, json.dumps(completion()).encode())
        else:
            send(handler, b"", 307, Location="/moved")

    with serving(answer) as (url, asked):
        assert chat(url).ask([QUESTION], "", text_of) == ["A"]
        assert len(asked) == 2 and asked[0][1] == asked[1][1]


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("kind", ["gzip", "plain"])
def test_a_reply_has_a_size_limit_packed_or_not(kind, status):
    large = b" " * 150_000_000 if kind == "gzip" else b" " * 20_000_000
    content = gzip.compress(large, 1) if kind == "gzip" else large
    del large
    headers = {"Content_Encoding": "gzip"} if kind == "gzip" else {}
    with serving(lambda handler: send(handler, content, status, **headers)) as (url, asked):
        tracemalloc.start()
        with pytest.raises(Unanswered, match=r"the server's reply has more than 8 MiB \(attempt 2 of 2"):
            chat(url).ask([QUESTION], "", text_of)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64e6 and asked[0][0]["Accept-Encoding"] == "identity"


def test_a_packed_reply_is_read_where_a_server_cannot_do_without():
    content = gzip.compress(json.dumps(completion()).encode())
    with serving(lambda handler: send(handler, content, Content_Encoding="gzip")) as (url, _):
        assert chat(url).ask([QUESTION], "", text_of) == ["A"]
    for packing, reason in {
        "br": "compressed with br",
        "gzip, gzip": "compressed with gzip, gzip",
        "gzip": "cannot be decompressed",
    }.items():
        packed = serving(lambda handler, packing=packing: send(handler, b"\0" * 99, Content_Encoding=packing))
        with packed as (url, _), pytest.raises(Unanswered, match=reason):
            chat(url).ask([QUESTION], "", text_of)


@pytest.mark.parametrize("part", ["headers", "body"])
def test_the_time_limit_is_that_of_the_whole_attempt(part):
    def drip(handler):
        text = b"HTTP/1.1 200 OK\r\n" + (
            b"X: y\r\n" * 500 if part == "headers" else b"Content-Length: 500\r\n\r\n" + b" " * 500
        )
        for start in range(0, len(text), 5):
            handler.wfile.write(text[start : start + 5])
            handler.wfile.flush()
            time.sleep(0.05)

    with serving(drip) as (url, _):
        start = time.perf_counter()
        with pytest.raises(JudgeError, match="timed out after 0.5 seconds, see --judge.timeout") as caught:
            chat(url, timeout=0.5).ask([QUESTION], "", text_of)
        assert time.perf_counter() - start < 4 and not isinstance(caught.value, Unanswered)


MALFORMED = {
    "null_logprob": completion(top=[("A", None), ("B", -1.0)]),
    "nan": completion(top=[("A", math.nan), ("B", -1.0)]),
    "infinite": completion(top=[("A", -math.inf), ("B", -1.0)]),
    "positive": completion(top=[("A", 1000.0), ("B", -1.0)]),
    "text_logprob": completion(top=[("A", "-1"), ("B", -1.0)]),
    "true_logprob": completion(top=[("A", True), ("B", -1.0)]),
    "token_null": completion(top=[(None, -1.0)]),
    "content_number": completion(content=7),
    "content_null": completion(content=None),
    "content_list": completion(content=["A"]),
    "half_surrogate": completion(content="\ud800"),
    "choices_empty": {"choices": []},
    "choices_object": {"choices": {"0": 1}},
    "choice_list": {"choices": [[1]]},
    "message_list": {"choices": [{"message": ["A"]}]},
    "logprobs_list": {"choices": [{"message": {"content": "A"}, "logprobs": [1]}]},
    "top_object": {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": {"A": 1}}]}}]},
    "reason_number": {"choices": [{"message": {"content": "A"}, "finish_reason": 3}]},
    "a_list": [1, 2],
    "null": None,
}
BROKEN = {
    "deep": b"[" * 200_000,
    "deep_object": b'{"a":' * 200_000,
    "not_utf8": b'{"choices": "\xff\xfe"}',
    "empty": b"",
    "html": b"<html>",
    "long_number": b"9" * 10_000,
}


@pytest.mark.parametrize("name", [*MALFORMED, *BROKEN])
def test_a_malformed_reply_is_asked_again_and_at_last_reported(name, tmp_path):
    content = BROKEN[name] if name in BROKEN else json.dumps(MALFORMED[name]).encode()
    bad = [content, content]

    def answer(handler):
        send(handler, bad.pop() if bad else json.dumps(completion()).encode())

    path = tmp_path / "kept.jsonl"
    with serving(answer) as (url, asked):
        client_of = chat(url, path)
        with pytest.raises(JudgeError, match=r"a question failed: the server's reply is .*\(attempt 2 of 2") as caught:
            client_of.ask([QUESTION], "", text_of)
        assert isinstance(caught.value, Unanswered) == (name in MALFORMED), (
            "a broken server is none that --partial excuses"
        )
        assert len(asked) == 2 and client_of.counts["failures"] == 2 and len(ContentCache(path)) == 0
        bad.append(content)
        assert client_of.ask([QUESTION], "", lambda reply: letter_share(reply, 1.0)) == [pytest.approx(0.87, abs=0.01)]
        assert len(asked) == 4


def test_a_reply_that_was_kept_but_is_none_is_asked_again(tmp_path):
    """Earlier versions kept log-probabilities that are no numbers."""
    path = tmp_path / "kept.jsonl"
    with JudgeServer(judge=lambda text: [("A", -0.5)]) as server:
        chat(server.url, path).ask([QUESTION], "", text_of)
        kept = json.loads(path.read_text())
        kept["value"]["top"] = [["A", None]]
        lines = [json.dumps(kept), "7", "[]", "{}", '{"key": {}}', '{"key": [], "value": 1}', "[" * 10_000]
        path.write_text("\n".join(lines))
        again = chat(server.url, path)
        assert again.ask([QUESTION], "", lambda reply: reply.top) == [(("A", -0.5),)]
        assert len(server.asked) == 2
        assert chat(server.url, path).ask([QUESTION], "", text_of) == ["A"] and len(server.asked) == 2


def test_a_letter_of_which_nothing_is_left_in_floating_point():
    assert letter_share(Reply("", top=(("A", -9999.0), ("B", -9999.0))), 1.0) == pytest.approx(0.5)
    assert letter_share(Reply("", top=(("A", -2000.0), ("B", -2001.0))), 1.0) == pytest.approx(1 / (1 + math.exp(-1)))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["A", "B", "[[7]]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob", "usage", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@st.composite
def replies(draw) -> bytes:
    """Bytes, JSON, or a good reply with one value put in place of another."""
    if draw(st.booleans()):
        return draw(
            st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))
        )
    reply = completion() | {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    whole = {"": reply}
    holder, place = whole, ""
    while isinstance(holder[place], (dict, list)) and holder[place] and draw(st.integers(0, 5)):
        holder = holder[place]
        place = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    holder[place] = draw(VALUES)
    return json.dumps(whole[""]).encode()


@given(replies())
@settings(max_examples=300)
def test_any_reply_is_an_answer_or_unusable(content):
    try:
        read = read_completion(content)
        assert all(type(count) is int for count in spent(read).values())
        reply = read_reply(read)
    except Unusable:
        return
    reply.text.encode(), json.dumps(reply.top, allow_nan=False)
    assert (
        kept_reply(json.loads(json.dumps({"text": reply.text, "finish_reason": reply.finish_reason, "top": reply.top})))
        == reply
    )
    for accept in (lambda reply: letter_share(reply, 0.5), letter_written, written_text):
        with suppress(Unusable):
            assert isinstance(accept(reply), (float, str))


@given(
    st.binary(max_size=200),
    st.sampled_from([200, 204, 304, 400, 401, 429, 500]),
    st.text("0123456789.-einfa :", max_size=8),
)
@settings(max_examples=20)
def test_any_bytes_of_any_status_end_in_our_own_errors(content, status, after):
    def answer(handler):
        send(
            handler,
            b"" if status in (204, 304) else content,
            status,
            Retry_After="0" if after.strip() > "0" else after.strip(),
        )

    with serving(answer) as (url, _), pytest.raises(JudgeError):
        chat(url, max_retries=0).ask([QUESTION], "", text_of)


@given(st.binary(max_size=300))
@settings(max_examples=12)
def test_what_is_no_http_ends_in_our_own_errors(content):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(content)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        with pytest.raises(JudgeError):
            chat(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", max_retries=0).ask([QUESTION], "", text_of)
        thread.join(5)
