"""One run that is killed at every moment, resumed each time, and ends with the bytes of a run that nothing disturbed."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from killed_run import MOMENTS
from running import ROOT, arguments, killed, launch, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
# Costs are wall time, the lock has the process's number, and an adapter's configuration the path of its base model.
NOT_COMPARED = {
    "ledger.json",
    "log.txt",
    "report.html",
    "table.txt",
    "lock",
    "resolved_config.yaml",
    "adapter_config.json",
}


def flags(tiny_model, tiny_data, folder: Path) -> list[str]:
    """Adapters, dropout and a follower that is refreshed: what is random and what has a state is there."""
    argv = arguments(tiny_model, tiny_data, folder, "--ckpt.save_steps", "2", "--rollout.batch_size", "16")
    argv += ["--ds.lora.rank", "4", "--ds.lora.dropout", "0.2", "--sgpo.refresh_steps", "2"]
    argv[argv.index("--rounds.count") + 1] = "1"
    return argv


def contents(folder: Path) -> dict[str, object]:
    """Every file by its path; scores by what they say, because the order of a file that was appended to is no result."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name in NOT_COMPARED:
            continue
        if name.startswith("log_probs/"):
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            found[name] = {key: value for line in lines for key, value in line.items()}
        else:
            found[name] = path.read_bytes()
    return found


def test_killed_at_every_moment(tiny_model, tiny_data, tmp_path):
    undisturbed = train(*flags(tiny_model, tiny_data, tmp_path / "whole"))
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    expected = contents(tmp_path / "whole")
    assert {"round_0/pairs.jsonl", "round_1/worst_case.json", "round_1/policy/model.safetensors"} <= expected.keys()

    folder = tmp_path / "killed"
    argv = flags(tiny_model, tiny_data, folder)
    matrix = []
    for moment in MOMENTS:
        dead = killed(moment, argv)
        assert dead.returncode == -signal.SIGKILL, f"{moment}: {dead.stderr[-3000:]}"
        # What has its final name is whole, whatever the moment, and already what it will be at the end.
        there = {
            name: text
            for name, text in contents(folder).items()
            if not any(part in name for part in (".partial", "checkpoints/", "manifest", "metrics", "log_probs"))
        }
        assert {name: expected.get(name) == text for name, text in there.items()} == dict.fromkeys(there, True)
        matrix.append((moment, len(there)))
        argv = [*flags(tiny_model, tiny_data, folder), "--resume"]
    resumed = train(*argv)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert contents(folder) == expected
    assert "Traceback" not in resumed.stderr
    for moment, files in matrix:
        print(f"{moment:28} killed, {files:2} whole files there, resumed; at the end all {len(expected)} files equal")


def processes_with(mark: str) -> list[str]:
    """Titles of the processes that have inherited this environment variable."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(
                    (path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                )
        except OSError:  # it has ended meanwhile
            continue
    return found


def test_killed_while_vllm_engines_generate(tiny_model, tiny_data, tmp_path):
    """The engines are processes of their own: none may survive the run, and the resumed run samples the same answers."""

    def argv(folder: Path) -> list[str]:
        found = flags(tiny_model, tiny_data, folder)
        found[found.index("hf")] = "vllm"
        batch = found.index("--rollout.batch_size")
        return found[:batch] + found[batch + 2 :]

    undisturbed = train(*argv(tmp_path / "whole"))
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    mark = {"OPENRLHF_SGPO_TEST": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests/killed_run.py"), "generation by vLLM", *argv(tmp_path / "killed")]
    dead = launch(command, **mark)
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-3000:]
    deadline = time.monotonic() + 60
    while left := processes_with(f"OPENRLHF_SGPO_TEST={tmp_path}"):
        assert time.monotonic() < deadline, f"these outlive the run that started them: {left}"
        time.sleep(0.5)
    assert not (tmp_path / "killed/round_1/responses.jsonl").exists()
    resumed = train(*argv(tmp_path / "killed"), "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    name = "round_1/responses.jsonl"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    name = "round_1/policy/model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
