"""The launcher of ranks on one machine: signals, lost ranks, and what people see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from running import ROOT, SCRIPT, arguments, free_port, inherited

RANK = """
import os, sys, time
folder, how = sys.argv[1:]
with open(f"{folder}/{os.environ['RANK']}.partial", "w") as file:
    file.write(str(os.getpid()))
os.rename(file.name, f"{folder}/{os.environ['RANK']}")
while not all(os.path.exists(f"{folder}/{rank}") for rank in "01"):
    time.sleep(0.01)
if how == "rank 1 fails" and os.environ["RANK"] == "1":
    sys.exit(3)
if how == "rank 1 is killed" and os.environ["RANK"] == "1":
    os.kill(os.getpid(), 9)
if how != "well":
    time.sleep(60)
"""


def start(folder: Path, how: str, **environment: str) -> subprocess.Popen:
    script = folder / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "openrlhf_sgpo.launch", "2", str(script), str(folder), how]
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return subprocess.Popen(command, cwd=ROOT, env=inherited | environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("4,5", "4,5"), ("4,5,6,7", "4,5"), ("", ""), ("-1", "-1"), (None, "0,1"), ("4", "error: --num_gpus 2, but")],
)
def test_ranks_take_gpus_among_those_that_are_visible(visible, expected, tmp_path):
    """On a machine that is shared, CUDA_VISIBLE_DEVICES says which ones are free."""
    rank = tmp_path / "rank.py"
    rank.write_text("import os; os.write(1, os.environ['CUDA_VISIBLE_DEVICES'].encode() + bytes([10]))")
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = [sys.executable, "-m", "openrlhf_sgpo.launch", "2", str(rank)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    said = done.stderr if expected.startswith("error") else done.stdout
    assert said.startswith(expected) and set(done.stdout.splitlines()) <= {expected}


@pytest.mark.parametrize("count", ["0", "-1", "two", "--algo"])
def test_ranks_are_a_number(count):
    command = ["bash", str(SCRIPT), "--num_gpus", count, "--algo", "dpo"]
    environment = {**inherited(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == f"error: --num_gpus {count}: give a number of at least 1\n"


def ranks_of(folder: Path) -> list[int]:
    deadline = time.monotonic() + 60
    while not all((folder / rank).exists() for rank in "01"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int((folder / rank).read_text()) for rank in "01"]


def lives(number: int) -> bool:
    try:
        return psutil.Process(number).status() != "zombie"
    except psutil.NoSuchProcess:
        return False


def gone(numbers: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(map(lives, numbers)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_ranks_that_end_well_end_the_launcher_well(tmp_path):
    process = start(tmp_path, "well")
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0


@pytest.mark.parametrize(
    ("how", "said", "code"),
    [
        ("rank 1 is killed", "error: rank 1 was ended by SIGKILL; SIGKILL may mean that memory ran out\n", 128 + 9),
        pytest.param("rank 1 fails", "", 3, marks=pytest.mark.slow),  # the others have some time to end
    ],
)
def test_the_others_end_with_a_rank_that_is_lost(how, said, code, tmp_path):
    process = start(tmp_path, how)
    numbers = ranks_of(tmp_path)
    assert process.communicate(timeout=60)[1] == said and process.returncode == code
    assert gone(numbers)


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_openmp_waits_passively_in_ranks_unless_told_otherwise(given, expected, tmp_path):
    process = start(tmp_path, "wait", **given)
    assert {psutil.Process(rank).environ()["OMP_WAIT_POLICY"] for rank in ranks_of(tmp_path)} == {expected}
    process.kill()
    process.communicate(timeout=60)


def test_a_run_on_a_cpu_says_that_openmp_waits_actively(monkeypatch, capsys):
    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.openrlhf import build_strategy

    for policy, said in (("PASSIVE", 0), ("active", 1)):
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        build_strategy(Config())
        assert capsys.readouterr().out.count("OMP_WAIT_POLICY=ACTIVE: beside other busy processes") == said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_launcher(number, tmp_path):
    process = start(tmp_path, "wait")
    numbers = ranks_of(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert gone(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["bash", "deepspeed"])
def test_sigterm_to_the_script_reaches_the_ranks(by, tiny_model, tiny_data, tmp_path):
    folder = tmp_path / "run"
    argv = arguments(tiny_model, tiny_data, folder, "--train.max_epochs", "500", algo="dpo")
    command = {
        "bash": ["bash", str(SCRIPT), "--num_gpus", "2"],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), str(SCRIPT)],
    }[by]
    process = subprocess.Popen(
        [*command, *argv],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.1)
    ranks = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(ranks) >= 2
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]  # the ranks hold the other end too
    assert gone(ranks)
    lines = [line for line in said.splitlines() if line.startswith(("stopped: ", "to continue: "))]
    # Of deepspeed's own flags a rank knows no more than the number of GPUs.
    typed = " ".join(command if by == "bash" else ["deepspeed", "--num_gpus", "2", str(SCRIPT)])
    assert [
        line.startswith(start + typed) for line, start in zip(lines, ("stopped: ", "to continue: "), strict=True)
    ] == [True] * 2
    assert lines[1].endswith(" --resume") and "Traceback" not in said
    if by == "bash":
        assert process.returncode == 143 and len(said.splitlines()) == 2, said
