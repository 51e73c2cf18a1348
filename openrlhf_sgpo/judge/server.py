"""A vLLM server on this machine for a judge model: it never outlives the process that started it."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from openrlhf_sgpo.judge.client import JudgeError
from openrlhf_sgpo.keys import without_keys
from openrlhf_sgpo.ray_session import LOOPBACK

KEY = "OPENRLHF_SGPO_JUDGE_KEY"
START_LIMIT = 1800  # seconds; a large model may have to be downloaded first
STOP_LIMIT = 20.0  # seconds for the server to end by itself
SHOWN = 30  # lines of its log in an error


def served_name(model: str, revision: str = "") -> str:
    """The model's name on its server and in results: a hub name with its revision; for a folder, its name and a hash of its
    files, so other weights at the same path count as another judge."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision[:8]}" if revision else model
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return f"{folder.resolve().name}-{digest.hexdigest()}"


class LocalServer:
    """A server of ``model``, a Hugging Face folder or hub name, for this machine only; ``start`` starts it.

    arguments: further arguments of vLLM's server. log: file for its output. revision: of a hub name; empty: the newest. name:
    the model's name, see ``served_name``.
    base_url: its address while it runs. Every server has a new key, in the variable ``KEY`` of this process.
    """

    def __init__(self, model: str, arguments: Mapping[str, Any], log: Path, revision: str = ""):
        self.model = model
        self.revision = revision
        self.arguments = dict(arguments)
        self.log = log
        self.name = served_name(model, revision)
        self.base_url = ""
        self._key = secrets.token_urlsafe(32)  # other users of this machine could reach the server, too
        self._keeper: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it is ready. Raises JudgeError, with the end of its log, if it never is."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command, environment = self._command(port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "openrlhf_sgpo.judge.server", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a separate process group, which can be ended as a whole
            )
        try:
            self._wait(self._keeper, port)
        except BaseException:
            self.stop()
            raise
        self.base_url = f"http://127.0.0.1:{port}/v1"
        os.environ[KEY] = self._key

    def stop(self) -> None:
        """End the server and every process that it started."""
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()
            self._keeper.wait()
        self._keeper, self.base_url = None, ""

    def _command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """The command that starts the server, and its environment."""
        import torch

        from openrlhf_sgpo.rollout.folders import local_folder
        from openrlhf_sgpo.rollout.vllm_on_cpu import CPU_ENVIRONMENT, PLAIN_WEIGHTS

        arguments: dict[str, Any] = {
            "model": local_folder(self.model, self.revision or None),  # the server has no key for the hub
            "served-model-name": self.name,
            "host": "127.0.0.1",
            "port": port,
            # Otherwise the model's generation config would override the decoding.
            "generation-config": "vllm",
            **self.arguments,
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        environment = {**without_keys(os.environ), **LOOPBACK, "VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": self._key}
        if not torch.cuda.is_available():
            command.append("--enforce-eager")
            environment |= {**CPU_ENVIRONMENT, PLAIN_WEIGHTS: "0"}  # these weights are never updated
        return command, environment

    def _wait(self, keeper: subprocess.Popen[bytes], port: int) -> None:
        from openrlhf_sgpo.output import Progress

        # Without a rate, which is always one.
        shape = "{desc}: {n_fmt} of at most {total_fmt} s"
        for _ in Progress(range(START_LIMIT), desc=f"judge: vLLM starts with {self.name}", bar_format=shape):
            if keeper.poll() is not None:
                raise self._failed("ended before it was ready")
            if _is_up(port):
                return
            time.sleep(1)
        raise self._failed(f"was not ready within {START_LIMIT} seconds")

    def _failed(self, what: str) -> JudgeError:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        end = "\n".join(lines[-SHOWN:])
        return JudgeError(
            f"--judge.model {self.model}: its server {what}. The end of its log, {self.log}:\n{end}\n"
            f"Fix the error in the log, or start a server yourself and give --judge.base_url"
        )


def run_until_input_ends(command: Sequence[str]) -> None:
    """Run a command until it or standard input ends; then end this process group, which this process leads.

    The process that needs the command holds the other end of standard input. When that process dies, even by SIGKILL, the input
    ends.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def stop() -> None:
        sys.stdin.buffer.read()
        process.terminate()
        time.sleep(STOP_LIMIT)
        process.kill()

    threading.Thread(target=stop, daemon=True).start()
    print(f"the server ended with {process.wait()}", flush=True)
    os.killpg(0, signal.SIGKILL)  # processes that the server may have left, and this process


def _is_up(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=1)  # uses no proxy
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    run_until_input_ends(sys.argv[1:])
