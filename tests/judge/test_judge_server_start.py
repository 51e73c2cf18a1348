"""A server of a model that judges: what it is called, that it ends with whoever started it, and vLLM's own."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from openrlhf_sgpo.benchmarks.judge import EvaluationJudge, EvaluationJudgeSettings
from openrlhf_sgpo.judge.client import JudgeError, Request
from openrlhf_sgpo.judge.reply import Reply, Unusable
from openrlhf_sgpo.judge.server import LocalServer, served_name

ROOT = Path(__file__).parents[2]


def folder_with(path: Path, weights: bytes) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_a_folder_is_called_by_its_contents(tmp_path, monkeypatch):
    first = folder_with(tmp_path / "one/judge", b"weights")
    name = served_name(str(first))
    assert name.startswith("judge-") and "/" not in name
    assert served_name(str(folder_with(tmp_path / "two/judge", b"weights"))) == name
    assert served_name(str(folder_with(tmp_path / "three/judge", b"weightz"))) != name
    monkeypatch.chdir(first)
    assert served_name(".") == name
    assert served_name("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    assert served_name("Qwen/Qwen2.5-7B-Instruct", "a09a35458c70") == "Qwen/Qwen2.5-7B-Instruct@a09a3545"


OWNER = """
import subprocess, sys, time
keeper = subprocess.Popen(
    [sys.executable, "-m", "openrlhf_sgpo.judge.server", "sh", "-c", "sleep 300 & echo up; wait"],
    stdin=subprocess.PIPE, start_new_session=True,
)
time.sleep(300)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_owner_dies(how):
    """Everybody holds the other end of this pipe, which ends when the last one has gone."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    owner.send_signal(how)
    said, _ = owner.communicate(timeout=60)
    assert b"the server ended with" in said


def test_what_a_server_leaves_behind_ends_with_it():
    command = [sys.executable, "-m", "openrlhf_sgpo.judge.server", "sh", "-c", "sleep 300 & exit 3"]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    assert keeper.stdout is not None and keeper.stdout.read() == b"the server ended with 3\n"
    assert keeper.wait() == -signal.SIGKILL


TOP = 5
DECODING = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP}


def likeliest(reply: Reply) -> list[list]:
    if len(reply.top) != TOP:
        raise Unusable(f"{len(reply.top)} tokens")
    return [list(entry) for entry in reply.top]


def refuse(reply: Reply) -> None:
    raise Unusable("never")


def requests(*texts: str) -> list[Request]:
    return [Request(text, [{"role": "user", "content": text}]) for text in texts]


@pytest.mark.slow
def test_a_model_is_served_asked_and_gone(tiny_model, tmp_path):
    settings = EvaluationJudgeSettings(model=str(tiny_model), timeout=60.0, max_retries=0, max_len=512)
    texts = ("A or B?", "m or M?", "Which?")
    judge = EvaluationJudge(settings, tmp_path, partial=True)
    assert judge.local and judge.identity["local"] and judge.identity["model"] == served_name(str(tiny_model))
    try:
        tops = judge.ask("letters", DECODING, requests(*texts), likeliest, "test")
        assert judge.ask("verdicts", DECODING | {"max_tokens": 2}, requests(*texts), refuse, "test") == [None] * 3
        with pytest.raises(urllib.error.HTTPError, match="401"):  # a stranger, without the key
            urllib.request.urlopen(f"{judge.server.base_url}/models", timeout=10)
        group = judge.server._keeper.pid
        assert len(living(group)) >= 2
    finally:
        judge.close()
    deadline = time.monotonic() + 10
    while living(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert living(group) == []
    assert "Application startup complete" in (tmp_path / "judge_server.log").read_text()
    assert judge.usage()["judge_calls"] == 3 and judge.usage()["judge_failures"] == 3
    for text, top in zip(texts, tops, strict=True):
        # The server computes in half precision, and some bytes are no text.
        expected = sorted(first_token(tiny_model, text), reverse=True)
        assert [logprob for _, logprob in top] == pytest.approx(expected[:TOP], abs=0.15)

    rerun = EvaluationJudge(settings, tmp_path)
    assert rerun.ask("letters", DECODING, requests(*texts), likeliest, "test") == tops
    assert rerun.server._keeper is None, "nothing was missing, so that no server was started"


def living(group: int) -> list[str]:
    """States of the processes of a group that have not ended."""
    rows = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout.splitlines()
    states = [state for number, state in map(str.split, rows) if int(number) == group]
    return [state for state in states if not state.startswith("Z")]


def first_token(model: Path, text: str) -> list[float]:
    """Log-probabilities of all tokens that may come first."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = [{"role": "user", "content": text}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits[0, -1]
    return torch.log_softmax(logits, -1).tolist()


@pytest.mark.slow
def test_a_model_that_cannot_be_served_shows_why(tiny_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"], "model_type": "none"}))
    log = tmp_path / "server.log"
    server = LocalServer(str(broken), {}, log)
    with pytest.raises(JudgeError) as caught:
        server.start()
    message = str(caught.value)
    assert f"--judge.model {broken}" in message and str(log) in message and "--judge.base_url" in message
    assert "the server ended with 1" in message and server.base_url == ""
