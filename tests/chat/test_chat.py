"""A conversation with real (tiny) models: the same tokens as rollouts see and sample, every turn with the ones before."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_sgpo import algorithms, flags
from openrlhf_sgpo.chat.columns import Columns, cells, wrapped
from openrlhf_sgpo.chat.conversation import questions
from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.integrity import signed
from openrlhf_sgpo.run_folder import RunFolder, write_text

NEW_TOKENS = 6
GREEDY = ("--rollout.temperature", "1e-6", "--rollout.max_new_tokens", str(NEW_TOKENS))


def answered(folder, messages):
    """The likeliest answer, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def said(role, *contents):
    return [{"role": role, "content": content} for content in contents]


def blocks(text):
    """Answers by their titles, in order."""
    parts = re.split(r"(?m)^\[([^]\n]+)\]\n", text)[1:]
    return [(title, answer.removesuffix("\n\n")) for title, answer in zip(parts[::2], parts[1::2], strict=True)]


def make_chat_run(folder, start, policy, algo="dpo", follower=None, **options):
    """The folder of a run after round 1."""
    config = Config(algo=algo)
    config.model.model_name_or_path, config.ds.param_dtype, config.rounds.count = str(start), "fp32", 1
    algorithm = algorithms.get(algo)
    write_text(folder / "resolved_config.yaml", signed(flags.dump({"": config, algo: algorithm.settings(**options)})))
    run = RunFolder(str(folder))
    run.keep_moment(type("Template", (), {"moment": run.moment()}), begun=False)
    for name, model in (("policy", policy), ("follower", follower)):
        if model:
            (folder / "round_1").mkdir(exist_ok=True)
            (folder / "round_1" / name).symlink_to(model)
    if policy:
        run.finish(1, "play" if algo == "slhf" else "train", {}, ["policy"])


@pytest.fixture
def read(monkeypatch):
    def lines(*texts):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{text}\n" for text in texts)))

    return lines


def test_a_model_answers_once(tiny_model, capsys):
    assert main(["chat", str(tiny_model), "--prompt", "Say yes", "--ds.param_dtype", "fp32", *GREEDY]) == 0
    ((title, text),) = blocks(capsys.readouterr().out)
    assert title == "tiny" and text == answered(tiny_model, said("user", "Say yes"))


def test_a_policy_answers_beside_the_start_and_each_goes_on_from_its_answers(
    tiny_model, other_tiny_model, tmp_path, read, capsys
):
    make_chat_run(tmp_path / "run", tiny_model, other_tiny_model)
    read("Say yes", "", "And no?", "/new", "Say yes")
    assert main(["chat", str(tmp_path / "run"), *GREEDY]) == 0
    answers = blocks(capsys.readouterr().out)
    assert [title for title, _ in answers] == ["start", "run-round-1"] * 3
    for place, model in enumerate((tiny_model, other_tiny_model)):
        first, second, again = (text for _, text in answers[place::2])
        assert first == again == answered(model, said("user", "Say yes"))
        history = [*said("user", "Say yes"), *said("assistant", first), *said("user", "And no?")]
        assert second == answered(model, history)
    read("Say yes")
    assert main(["chat", str(tmp_path / "run"), "--start", "false", *GREEDY]) == 0
    assert len(blocks(capsys.readouterr().out)) == 1


@pytest.mark.parametrize("own_weights", [False, True])
def test_a_follower_reads_the_leaders_answer(own_weights, tiny_model, other_tiny_model, tmp_path, capsys):
    follower = tiny_model if own_weights else None
    make_chat_run(tmp_path / "run", tiny_model, other_tiny_model, "slhf", follower, follower_prompt="Shorter.")
    assert main(["chat", str(tmp_path / "run"), "--prompt", "Say yes", *GREEDY]) == 0
    (_, start), (leader, draft), (_, revision) = blocks(capsys.readouterr().out)
    assert leader == "leader" and start == answered(tiny_model, said("user", "Say yes"))
    seen = [*said("user", "Say yes"), *said("assistant", draft.strip()), *said("user", "Shorter.")]
    assert revision == answered(follower or other_tiny_model, seen)


def test_what_cannot_be_is_said_before_a_model_is_loaded(tiny_model, tmp_path, read, capsys):
    assert main(["chat"]) == 2 and "--model: missing, give who answers" in capsys.readouterr().err
    assert main(["chat", str(tiny_model), "--round", "1"]) == 2 and "is not a run folder" in capsys.readouterr().err
    make_chat_run(tmp_path / "run", tiny_model, None)
    assert main(["chat", str(tmp_path / "run")]) == 2 and "has not finished any round" in capsys.readouterr().err
    read("x" * 200, "Say yes")
    short = ("--data.max_len", "128", "--ds.param_dtype", "fp32")
    assert main(["chat", str(tiny_model), *GREEDY, *short]) == 0
    assert "leaves no room for an answer. /new begins another one.\n[tiny]" in capsys.readouterr().out


def test_bytes_that_are_no_text_are_asked_as_such(monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xc3\xa9\n\xff\xfe?\n"), "utf-8", "surrogateescape")
    )
    assert list(questions()) == ["café", "\ufffd\ufffd?"]


@given(st.text(alphabet="ab \n語é", max_size=60), st.integers(4, 20))
def test_only_the_last_line_of_a_growing_text_changes(text, width):
    before = []
    for end in range(len(text) + 1):
        lines = list(wrapped(text[:end], width))
        assert all(cells(line) <= width for line in lines)
        assert lines[: len(before) - 1] == before[:-1]
        before = lines
    letters = text.replace(" ", "").replace("\n", "")
    assert "".join(before).replace(" ", "") == letters


def test_a_model_cannot_steer_the_terminal():
    assert list(wrapped("a\x1b[2Jb\rc\td\u202e", 20)) == ["a\ufffd[2Jb\ufffdc   d\ufffd"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_columns_print_a_row_when_all_have_filled_it(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "59")
    monkeypatch.setenv("LINES", "20")
    columns = Columns(["start", "policy"])  # 28 characters each
    long = "one two three four five six seven eight nine ten"
    for words in range(11):
        columns.show([" ".join(long.split()[:words]), "short"], [False, words > 0])
    columns.show([long, "short"], [True, True])
    rows = [line.split("\r")[-1].replace("\x1b[K", "") for line in screen.getvalue().split("\n")]
    assert rows[:2] == ["start" + " " * 25 + "policy", "-----" + " " * 25 + "------"]
    assert rows[2:4] == ["one two three four five six" + " " * 3 + "short", "seven eight nine ten"]
    assert screen.getvalue().count("\n") == 5


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_on_a_terminal(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    # Special tokens, which would end the answer, are never the likeliest here, and 1,900 tokens take seconds.
    command = [sys.executable, "-m", "openrlhf_sgpo", "chat", str(model), "--ds.param_dtype", "fp32"]
    screen, terminal = pty.openpty()
    with subprocess.Popen(
        [*command, "--rollout.temperature", "1e-6", "--rollout.max_new_tokens", "1900"],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        env=os.environ | {"COLUMNS": "80", "LINES": "24"},
    ) as process:
        shown = b""

        def wait_for(text):
            nonlocal shown
            deadline = time.monotonic() + 120
            while text not in shown:
                assert time.monotonic() < deadline and process.poll() is None, shown
                if select.select([screen], [], [], 0.1)[0]:
                    shown += os.read(screen, 65536)

        wait_for(b"> ")
        os.write(screen, b"Say yes\n")
        wait_for(b"-----\x1b[K\r\n")
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read().decode()
    os.close(screen)
    os.close(terminal)
    assert process.returncode == 130, errors
    assert errors.startswith("stopped: openrlhf-sgpo chat") and "Traceback" not in errors
