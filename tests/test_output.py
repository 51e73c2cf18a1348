"""What reaches people's terminals: this package's lines and nothing else; the rest is in the log."""

import io
import os
import subprocess
import sys

import pytest

from openrlhf_sgpo import output
from openrlhf_sgpo.output import Progress, stage_line

# Python, its warnings and loggers, C's own stream, and a child.
NOISE = """
import ctypes, logging, os, subprocess, sys, warnings
from pathlib import Path
from openrlhf_sgpo.output import Progress, log_to, other_packages_apart, say

logging.basicConfig()
def noise(what):
    print(f"{what} print")
    print(f"{what} error", file=sys.stderr)
    warnings.warn(f"{what} warning")
    logging.warning(f"{what} logger")
    ctypes.CDLL(None).puts(f"{what} C".encode())
    ctypes.CDLL(None).fflush(None)
    subprocess.run(["sh", "-c", f"echo {what} child; echo {what} child error >&2"])

"""
KINDS = ("print", "error", "warning", "logger", "C", "child", "child error")


def run(code, folder):
    return subprocess.run([sys.executable, "-c", NOISE + code, str(folder)], capture_output=True, text=True)


def test_a_terminal_that_has_no_such_character_gets_an_escape(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = run("with other_packages_apart():\n    say('0.5 ± 0.1')", tmp_path)
    assert (process.returncode, process.stdout) == (0, "0.5 \\xb1 0.1\n"), process.stderr


def test_other_packages_speak_to_the_log(tmp_path):
    process = run(
        """
say("before")
with other_packages_apart():
    noise("early")
    log_to(Path(sys.argv[1]))
    noise("late")
    say("said")
print("after")
print("after", file=sys.stderr)
""",
        tmp_path,
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "before\nsaid\nafter\n", "after\n")
    log = (tmp_path / "log.txt").read_text()
    for what in ("early", "late"):
        assert [kind for kind in KINDS if f"{what} {kind}" not in log] == []
    assert log.index("early child") < log.index("late print")


@pytest.mark.parametrize(("error", "code"), [("ValueError", 2), ("RuntimeError", 1)])
def test_a_failure_is_told_on_stderr_and_names_the_log(error, code, tmp_path):
    program = """
from openrlhf_sgpo.cli import ending, main

def train(argv):
    with other_packages_apart():
        {}
        noise("late")
        raise {}("it broke")

main.COMMANDS["train"] = train
(Path(sys.argv[1]) / "resolved_config.yaml").touch()
sys.exit(main.main(["train", "--ckpt.output_dir", sys.argv[1]]))
"""
    process = run(program.format("log_to(Path(sys.argv[1]))", error), tmp_path)
    assert (process.returncode, process.stdout) == (code, "")
    assert process.stderr.startswith("error: it broke (") and process.stderr.endswith(f": {tmp_path / 'log.txt'})\n")
    assert "late child" in (tmp_path / "log.txt").read_text()
    if code == 2:  # wrong settings, before there is a run
        assert run(program.format("pass", error), tmp_path).stderr == "error: it broke\n"


def test_a_sudden_death_is_told_on_stderr(tmp_path):
    process = run("with other_packages_apart():\n    os.abort()", tmp_path)
    assert process.returncode < 0 and "Fatal Python error: Aborted" in process.stderr


def test_several_processes_append_to_one_log(tmp_path):
    for number in range(2):
        code = f"with other_packages_apart():\n    log_to(Path(sys.argv[1]))\n    noise('process {number}')"
        assert run(code, tmp_path).returncode == 0
    log = (tmp_path / "log.txt").read_text()
    assert log.count("== process ") == 2 and log.index("process 0 child error") < log.index("process 1 print")


def test_a_stream_that_is_not_the_terminal_stays_what_it_is(tmp_path, capfd, monkeypatch):
    """In a notebook, or under a test runner, what is said goes where Python's stdout goes."""
    monkeypatch.setattr(sys, "stdout", notebook := io.StringIO())
    with output.other_packages_apart():
        output.log_to(tmp_path)
        os.write(1, b"noise\n")
        output.say("said")
    os.write(1, b"after\n")
    assert notebook.getvalue() == "said\n" and capfd.readouterr().out == "after\n"
    assert (tmp_path / "log.txt").read_text().endswith("noise\n")
    output.log_to(tmp_path / "nothing")  # outside it changes nothing
    assert not (tmp_path / "nothing").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("seconds", [0.0, 30.0])
def test_without_a_terminal_progress_is_a_line_from_time_to_time(seconds, monkeypatch):
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", seconds)
    progress = Progress(total=3, desc="round 1: train", unit="step", mininterval=0)
    for loss in (0.5, 0.25, 0.125):
        progress.update()
        progress.set_postfix(loss=loss)
    progress.close()
    text = file.getvalue()
    assert "\r" not in text and "\x1b" not in text
    if seconds:
        assert text == ""  # it was over before the first line was due
    else:
        assert text.endswith("\n") and "round 1: train: 3 of 3 step, 00:00 so far, 00:00 left, loss=0.125" in text


def test_on_a_terminal_a_bar_goes_when_it_is_done(monkeypatch):
    monkeypatch.setattr(sys, "stderr", file := Terminal())
    assert list(Progress(range(3), desc="round 1: train", unit="step", mininterval=0)) == [0, 1, 2]
    assert "3/3" in file.getvalue() and file.getvalue().endswith("\r")
    assert file.getvalue().split("\r")[-2].strip() == ""


ROUND = ("generate", "train", "evaluate")
PLAN = [
    "initial/evaluate",
    "round_0/train",
    "round_0/evaluate",
    *(f"round_{k}/{stage}" for k in (1, 2) for stage in ROUND),
]


def test_time_left_is_what_the_last_stages_of_the_same_kind_took():
    seconds = {"initial/evaluate": 20.0}
    assert stage_line("initial/evaluate", PLAN, {}) == "stage 1 of 9, start: evaluate"
    # Nobody knows yet how long training takes, nor how long samples take.
    assert stage_line("round_0/train", PLAN, seconds) == "stage 2 of 9, round 0: train"
    seconds |= {"round_0/train": 400.0, "round_0/evaluate": 60.0}
    assert stage_line("round_1/generate", PLAN, seconds) == "stage 4 of 9, round 1: generate"
    seconds["round_1/generate"] = 240.0
    left = (400 + 60 + 240 + 400 + 60) / 60
    assert stage_line("round_1/train", PLAN, seconds) == f"stage 5 of 9, round 1: train, about {left:.0f} min left"
    seconds |= {"round_1/train": 4000.0, "round_1/evaluate": 60.0}
    left = (240 + 4000 + 60) / 60
    assert (
        stage_line("round_2/generate", PLAN, seconds) == f"stage 7 of 9, round 2: generate, about {left:.0f} min left"
    )
    seconds |= {"round_2/generate": 240.0, "round_2/train": 7200.0}
    assert stage_line("round_2/evaluate", PLAN, seconds).endswith("round 2: evaluate, about 1 min left")


def test_durations():
    assert [output.duration(seconds) for seconds in (0, 59, 61, 3600, 3 * 3600)] == [
        *("less than a minute", "less than a minute", "about 1 min", "about 60 min", "about 3.0 h")
    ]
