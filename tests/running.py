"""Whole runs through the command line, for the tests that need them."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TESTS = str(ROOT / "tests")
SCRIPT = ROOT / "examples" / "train_ssapo.sh"


def arguments(tiny_model, tiny_data, folder, *more: str, algo: str = "sgpo") -> list[str]:
    """A run of two rounds of 12 prompts in fp32."""
    common = [
        *("--algo", algo, "--model.model_name_or_path", str(tiny_model), "--data.dataset", str(tiny_data["pairs"])),
        *("--eval.dataset", str(tiny_data["held_out"]), "--data.max_len", "128", "--ckpt.output_dir", str(folder)),
        *("--train.batch_size", "4", "--train.micro_batch_size", "2", "--adam.lr", "1e-3", "--ds.zero_stage", "2"),
        *("--ds.param_dtype", "fp32"),
    ]
    rounds = [
        *("--data.prompt_dataset", str(tiny_data["prompts"]), "--rounds.count", "2", "--rollout.engine", "hf"),
        *("--rollout.max_new_tokens", "8", "--rollout.temperature", "1.0"),
    ]
    return common + (rounds if algo != "dpo" else []) + list(more)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def inherited() -> dict[str, str]:
    """The environment, without the rank and port that tests leave in it when they build a strategy in this process."""
    return {name: value for name, value in os.environ.items() if name not in OF_RANKS}


def launch(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    folder = os.path.dirname(sys.executable)
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited(), "PATH": f"{folder}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


@cache
def _zygote() -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "zygote.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a pool of threads does not survive a fork
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(process.kill)
    return process


def forked(script: Path | None, *argv: str, ranks: int = 1, **environment: str) -> subprocess.CompletedProcess:
    """``openrlhf-sgpo``, or another script, in a process of its own that need not import everything first, or in as many as
    there are ranks, which meet as a launcher's do."""
    zygote, meeting = _zygote(), dict[str, str]()
    if ranks > 1:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        meeting |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "script": None if script is None else str(script),
            "arguments": argv,
            "environment": {**inherited(), "OMP_NUM_THREADS": "1", **meeting, **environment},
            "ranks": [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if meeting else {} for rank in range(ranks)],
            "folder": str(ROOT),
            "stdout": f"{folder}/stdout",
            "stderr": f"{folder}/stderr",
        }
        assert zygote.stdin and zygote.stdout
        zygote.stdin.write(json.dumps(request) + "\n")
        zygote.stdin.flush()
        code = int(zygote.stdout.readline())
        stdout, stderr = (Path(folder, name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(argv, code, stdout, stderr)


def killed(write: int | str, folder: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    """``openrlhf-sgpo`` that ends itself at this durable write in ``folder``, see killed_run.py."""
    script, record = ROOT / "tests" / "killed_run.py", f"{folder}.writes"
    return forked(script, str(write), str(folder), record, *argv, **{"PYTHONPATH": TESTS, **environment})


def undisturbed(folder: Path, argv: Callable[[Path], list[str]]) -> tuple[dict[str, object], list[str]]:
    """What a command leaves that nothing disturbs, and its durable writes. argv: of the command that writes to a folder."""
    process = killed(0, folder, *argv(folder))
    assert process.returncode == 0, process.stderr[-3000:]
    expected, writes = contents(folder), Path(f"{folder}.writes").read_text().splitlines()
    known = {line.split()[1].removesuffix(".partial") for line in writes}
    # All files of a folder that got its name by renaming are known.
    unknown = [name for name in expected if not {name, *map(str, Path(name).parents)} & known]
    assert not unknown, f"written through a door that killed_run.py does not watch: {unknown}"
    return expected, writes


def check_dead(process: subprocess.CompletedProcess, folder: Path, expected: dict[str, object], where: str) -> None:
    """A killed command: what has its final name is whole."""
    assert process.returncode == -signal.SIGKILL, f"{where}: {process.stderr[-3000:]}"
    there = {name: text for name, text in contents(folder).items() if not UNFINISHED.search(name)}
    assert {name: expected.get(name) == text for name, text in there.items()} == dict.fromkeys(there, True), where


def check_resumed(process: subprocess.CompletedProcess, folder: Path, expected: dict[str, object], where: str) -> None:
    assert process.returncode == 0 and "Traceback" not in process.stderr, f"{where}: {process.stderr[-3000:]}"
    actual = contents(folder)
    assert {name: actual.get(name) == expected.get(name) for name in actual | expected} == dict.fromkeys(
        expected, True
    ), where


def killed_at(picked: Callable[[int], Iterable[int]], folder: Path, argv: Callable[[Path], list[str]]) -> None:
    """Killed at one of the durable writes that are picked from their number, and resumed, a command leaves the same files."""
    expected, writes = undisturbed(folder / "whole", argv)
    for write in picked(len(writes)):
        place, where = folder / f"write_{write}", f"write {write}: {writes[write - 1]}"
        check_dead(killed(write, place, *argv(place)), place, expected, where)
        check_resumed(forked(None, *argv(place), "--resume", PYTHONPATH=TESTS), place, expected, where)


def killed_at_every_write(folder: Path, argv: Callable[[Path], list[str]]) -> None:
    """Killed at a durable write, resumed, killed at the next that no process before was killed at, and so on."""
    expected, writes = undisturbed(folder / "whole", argv)
    place, deaths, more = folder / "killed", folder / "killed.writes", list[str]()
    while (process := killed("new", place, *argv(place), *more)).returncode:
        where = deaths.read_text().splitlines()
        check_dead(process, place, expected, where[-1])
        assert len(where) < 2 * len(writes), f"no end: {where[-10:]}"
        more = ["--resume"] if (place / "resolved_config.yaml").exists() else []
    check_resumed(process, place, expected, "the end")
    survived = Counter(line.rsplit(" ", 1)[0] for line in set(writes))
    survived -= Counter(line.rsplit(" ", 1)[0] for line in where)
    assert not survived


# Costs are wall time, which model cards tell too; the lock has the process's number, and an adapter's configuration the path
# of its base model.
NOT_COMPARED = (
    *(
        "ledger.json",
        "log.txt",
        "report.html",
        "table.txt",
        "lock",
        "resolved_config.yaml",
        "adapter_config.json",
        "README.md",
    ),
)
# Is appended to, changed or deleted while a command is going on.
UNFINISHED = re.compile(r"\.partial|checkpoints/|manifest|metrics|log_probs|judgements|rewards|plays\.jsonl")


def contents(folder: Path) -> dict[str, object]:
    """Every file by its path; scores by what they say, because the order of a file that was appended to is no result."""
    files: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name in NOT_COMPARED:
            continue
        if name.startswith(("log_probs/", "judgements/", "rewards/")):
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            files[name] = {key: value for line in lines for key, value in line.items()}
        else:
            files[name] = path.read_bytes()
    return files


def train(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return forked(None, "train", *argv, **environment)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_jsonl(folder / "metrics.jsonl")]
