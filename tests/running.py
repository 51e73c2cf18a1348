"""Whole runs through the command line, for the tests that need them."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "train_ssapo.sh"


def arguments(tiny_model, tiny_data, folder, *more: str, algo: str = "sgpo") -> list[str]:
    """A run of two rounds of 12 prompts in fp32."""
    common = [
        *("--algo", algo, "--model.model_name_or_path", str(tiny_model), "--data.dataset", str(tiny_data["pairs"])),
        *("--eval.dataset", str(tiny_data["held_out"]), "--data.max_len", "128", "--ckpt.output_dir", str(folder)),
        *("--train.batch_size", "4", "--train.micro_batch_size", "2", "--adam.lr", "1e-3", "--ds.zero_stage", "2"),
        *("--ds.param_dtype", "fp32", "--train.layout", "shared_prefix"),
    ]
    rounds = [
        *("--data.prompt_dataset", str(tiny_data["prompts"]), "--rounds.count", "2", "--rollout.engine", "hf"),
        *("--rollout.max_new_tokens", "8", "--rollout.temperature", "1.0"),
    ]
    return common + (rounds if algo != "dpo" else []) + list(more)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def launch(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    folder = os.path.dirname(sys.executable)
    # Tests that build a strategy in this process leave its rank and port in the environment.
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, "PATH": f"{folder}:{os.environ['PATH']}", **environment},
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


def forked(script: Path | None, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    """``openrlhf-sgpo``, or another script, in a process of its own that need not import everything first."""
    zygote = _zygote()
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "script": None if script is None else str(script),
            "arguments": argv,
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", **environment},
            "folder": str(ROOT),
            "stdout": f"{folder}/stdout",
            "stderr": f"{folder}/stderr",
        }
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            request["environment"].pop(name, None)
        assert zygote.stdin and zygote.stdout
        zygote.stdin.write(json.dumps(request) + "\n")
        zygote.stdin.flush()
        code = int(zygote.stdout.readline())
        stdout, stderr = (Path(folder, name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(argv, code, stdout, stderr)


def killed(moment: str, argv: Sequence[str], **environment: str) -> subprocess.CompletedProcess:
    """``openrlhf-sgpo train`` that ends itself at this moment, see killed_run.py."""
    return forked(ROOT / "tests" / "killed_run.py", moment, *argv, **environment)


def train(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return forked(None, "train", *argv, **environment)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_jsonl(folder / "metrics.jsonl")]
