"""Runs that are killed at every durable write, resumed, and end with the bytes of a run that nothing disturbed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import test_plays
from running import ROOT, arguments, inherited, killed_at_every_write, train

pytestmark = pytest.mark.timeout(1200)


def flags(tiny_model, tiny_data, folder: Path) -> list[str]:
    """Adapters, dropout and a follower that is refreshed: what is random and what has a state is there."""
    given = dict(zip(*[iter(arguments(tiny_model, tiny_data, folder))] * 2, strict=True))
    given |= {"--rounds.count": "1", "--seed.size": "12", "--eval.max_samples": "4", "--eval.max_prompts": "2"}
    given |= {"--ckpt.save_steps": "1", "--sgpo.refresh_steps": "2", "--rollout.batch_size": "16"}
    given |= {"--ds.lora.rank": "4", "--ds.lora.dropout": "0.2", "--train.max_steps": "3"}
    return [word for pair in given.items() for word in pair]


def play_flags(tiny_model, tiny_data, folder: Path) -> list[str]:
    """Adapters, dropout, a mixture, a running figure that the loss reads, and a checkpoint in the middle of rounds."""
    more = ("--rounds.steps", "2", "--ckpt.save_steps", "3", "--ds.lora.rank", "4", "--ds.lora.dropout", "0.2")
    less = ("--eval.max_samples", "4", "--eval.max_prompts", "2", "--train.batch_size", "2")
    return test_plays.flags(tiny_model, tiny_data, folder, "toy_states:RunningBaseline", *more, *less)


@pytest.mark.slow
@pytest.mark.parametrize("argv", [flags, play_flags], ids=["pairs", "fresh answers"])
def test_killed_at_every_write(argv, tiny_model, tiny_data, tmp_path):
    killed_at_every_write(tmp_path, lambda folder: ["train", *argv(tiny_model, tiny_data, folder)])


def processes_with(mark: str) -> list[str]:
    """Titles of the processes that have inherited this environment variable."""
    titles = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                title = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ")
                titles.append(title.decode(errors="replace").strip())
        except OSError:  # it has ended meanwhile
            continue
    return titles


def engines_of(number: int) -> list[psutil.Process]:
    engines = []
    for child in psutil.Process(number).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            engines += [child] if child.name() == "VLLM::EngineCore" else []
    return engines


@pytest.mark.slow
def test_killed_while_vllm_engines_generate(tiny_model, tiny_data, tmp_path):
    """The engines are processes of their own: none may survive the run, and the resumed run samples the same answers.

    Merged adapters reach them: the run's own probe stops it otherwise, and its figures say how well."""

    def argv(folder: Path) -> list[str]:
        given = dict(zip(*[iter(flags(tiny_model, tiny_data, folder))] * 2, strict=True))
        given |= {"--rollout.engine": "vllm", "--rollout.max_new_tokens": "32", "--adam.lr": "1e-2"}
        given["--rollout.n_samples_per_prompt"] = "32"  # there is time to kill the run before they are drawn
        del given["--rollout.batch_size"]
        return [word for pair in given.items() for word in pair]

    undisturbed = train(*argv(tmp_path / "whole"))
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    assert (tmp_path / "whole/round_1/policy/adapter/adapter_model.safetensors").exists()
    probe = json.loads((tmp_path / "whole/round_1/evaluation.json").read_text())["probe"]
    assert probe["engine_to_trainer"] < 1e-3 < probe["moved_by_training"]
    assert probe["followed"] == pytest.approx(1.0, abs=0.01)
    mark = f"OPENRLHF_SGPO_TEST={tmp_path}"
    command = [sys.executable, "-m", "openrlhf_sgpo", "train", *argv(tmp_path / "killed")]
    environment = inherited() | {"OMP_NUM_THREADS": "1"} | dict([mark.split("=")])  # as many threads as the others have
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and any("round 1: generate" in line for line in process.stdout), "it ended before"
        (engine,) = engines_of(process.pid)
        engine.suspend()  # so that it has not answered when the run dies
        time.sleep(0.1)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 120  # agents of Ray look for its head from time to time only
    while left := processes_with(mark):
        assert time.monotonic() < deadline, f"these outlive the run that started them: {left}"
        time.sleep(0.5)
    assert (tmp_path / "killed/round_0/policy").exists() and not (tmp_path / "killed/round_1/responses.jsonl").exists()
    resumed = train(*argv(tmp_path / "killed"), "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    for name in ("round_1/responses.jsonl", "round_1/policy/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
