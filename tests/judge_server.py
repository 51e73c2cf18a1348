"""An OpenAI-compatible server on this machine that judges by a rule and fails as it is told."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "rule"
BIAS = 0.5  # what the first place is worth to the judge, in nats


def shown(text: str) -> tuple[str, str]:
    """The two answers in a comparison."""
    code = re.search(r"that has the code (\w+)\.", text)[1]
    return tuple(
        text.split(f"[Answer {letter} {code}]\n")[1].split(f"\n[End of answer {letter} {code}]")[0] for letter in "AB"
    )


def log_odds(first: str, second: str) -> float:
    """More of the word good is better."""
    return first.count("good") - second.count("good") + BIAS


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def letters(text: str) -> list[tuple[str, float]]:
    """Likeliest tokens of the rule's answer: each letter with and without a space, and a word."""
    a = sigmoid(log_odds(*shown(text)))
    shares = {"A": 0.6 * a, " A": 0.3 * a, "B": 0.7 * (1 - a), " B": 0.2 * (1 - a), "Both": 0.1}
    return [(token, math.log(share)) for token, share in sorted(shares.items(), key=lambda item: -item[1])]


class JudgeServer:
    """plan: what goes wrong with a request, by its text and how often that text was asked before; None: nothing.

    500, 429 (with Retry-After: 1), busy (429 without), 401, 404, 400, quota; filtered (cut by a content filter); slow (answers
    after ``delay``); half (half of the JSON), cut (the connection ends within it), nonsense (JSON of something else), bare (no
    log-probabilities), other (other tokens).
    """

    def __init__(
        self,
        plan: Callable[[str, int], str | None] = lambda text, times: None,
        judge: Callable[[str], list[tuple[str, float]]] = letters,
        pause: float = 0.0,
        delay: float = 2.0,
    ):
        self.plan, self.judge, self.pause, self.delay = plan, judge, pause, delay
        self.asked: list[str] = []  # every text, in the order of arrival
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.busy = self.busiest = 0
        self._times: Counter[str] = Counter()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer._handle(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def times(self, text: str) -> int:
        return self._times[text]

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self._lock:
            mode = self.plan(text, self._times[text])
            self._times[text] += 1
            self.asked.append(text)
            self.bodies.append(body)
            self.keys.append(request.headers.get("Authorization"))
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        try:
            time.sleep(self.delay if mode == "slow" else self.pause)
            self._reply(request, body, text, mode)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client did not wait
        finally:
            with self._lock:
                self.busy -= 1

    def _reply(self, request: BaseHTTPRequestHandler, body: dict, text: str, mode: str | None) -> None:
        status, headers = 200, {}
        if mode in ("500", "429", "401", "404", "400", "quota", "busy"):
            status = 429 if mode in ("quota", "busy") else int(mode)
            headers = {"Retry-After": "1"} if mode == "429" else {}
            code = "insufficient_quota" if mode == "quota" else None
            reply = {"error": {"message": f"no luck with {mode}", "code": code, "type": "test", "param": None}}
        elif mode == "nonsense":
            reply = {"object": "list", "data": []}
        else:
            top = [("The", -0.1), ("I", -2.0)] if mode == "other" else self.judge(text)
            top = top[: body.get("top_logprobs", 0)]
            listed = [{"token": token, "logprob": value, "bytes": None} for token, value in top]
            content = [{**listed[0], "top_logprobs": listed}] if listed and mode != "bare" else None
            written = "The" if mode == "other" else self.judge(text)[0][0]
            reply = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "content_filter" if mode == "filtered" else "length",
                        "message": {"role": "assistant", "content": written},
                        "logprobs": {"content": content},
                    }
                ],
                "usage": {"prompt_tokens": len(text.split()), "completion_tokens": 1, "total_tokens": 0},
            }
        data = json.dumps(reply).encode()
        sent = data[: len(data) // 2] if mode in ("half", "cut") else data
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data) if mode == "cut" else len(sent)))
        request.end_headers()
        request.wfile.write(sent)
        if mode == "cut":
            request.wfile.flush()
            request.connection.close()
            request.close_connection = True
