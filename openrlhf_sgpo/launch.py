"""One process per rank on this machine: ``python -m openrlhf_sgpo.launch RANKS SCRIPT [arguments]``.

Ranks meet at a free port of the loopback interface, receive the signals that this process receives, and end with it. For
several machines use DeepSpeed's launcher.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

COMMAND = "OPENRLHF_SGPO_COMMAND"  # what the user typed before a command's flags, if not openrlhf-sgpo
GRACE = 20.0  # seconds that the other ranks have to end after a rank has failed or a signal to stop
PAUSE = 0.2  # seconds between polls of the ranks
PARENT_DEATH = 1  # PR_SET_PDEATHSIG


def main(argv: list[str]) -> int:
    if not argv[0].isdigit() or int(argv[0]) < 1:
        sys.exit(f"error: --num_gpus {argv[0]}: give a number of at least 1")
    count, script, arguments = int(argv[0]), argv[1], argv[2:]
    environment = {**os.environ, COMMAND: f"bash {shlex.quote(script)} --num_gpus {count}", **_devices(count)}
    command = [sys.executable, "-u", script, *arguments]
    if count == 1:
        os.execve(sys.executable, command, environment)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_SIZE": str(count)}
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches only this process, which forwards it once
            preexec_fn=end_with_parent,
        )
        for rank in range(count)
    ]
    return _wait(ranks)


def end_with_parent() -> None:
    """In a new process: requests SIGTERM for when its parent ends, however the parent ends."""
    ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGTERM)


def _devices(count: int) -> dict[str, str]:
    """The environment for the ranks' GPUs: the first of those that are visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):  # asks for the CPU
        return {}
    names = visible.split(",") if visible is not None else [str(number) for number in range(count)]
    if len(names) < count:
        sys.exit(f"error: --num_gpus {count}, but CUDA_VISIBLE_DEVICES={visible} names {len(names)}: make them agree")
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[:count])}


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Waits until all ranks have ended; returns the exit code of the first that failed, or 0."""
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        _signal(ranks, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    deadline, code, was_terminated = float("inf"), 0, False
    while None in [process.poll() for process in ranks]:
        failed = [(rank, process.returncode) for rank, process in enumerate(ranks) if process.returncode]
        if deadline == float("inf") and (failed or received):
            deadline = time.monotonic() + GRACE
            if failed and not received:
                rank, code = failed[0]
                if code < 0:  # it could not print anything itself
                    name = signal.Signals(-code).name
                    print(
                        f"error: rank {rank} was ended by {name}; SIGKILL may mean that memory ran out", file=sys.stderr
                    )
                    deadline = time.monotonic()
        if time.monotonic() >= deadline:
            _signal(ranks, signal.SIGKILL if was_terminated else signal.SIGTERM)
            was_terminated, deadline = True, time.monotonic() + GRACE
        time.sleep(PAUSE)
    code = code or next((process.returncode for process in ranks if process.returncode), 0)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def follow_deepspeed(command: str) -> None:
    """In a rank started by ``deepspeed``: from now on, ends the ranks when ``deepspeed`` ends, which starts them through a
    process that gets no signals from it. command: the one of this package that the rank runs."""
    import psutil

    launcher = psutil.Process(os.getppid())
    if "deepspeed.launcher.launch" not in launcher.cmdline():
        return
    is_module = sys.argv[0].endswith("__main__.py")
    what = f"--module openrlhf_sgpo {command}" if is_module else shlex.quote(sys.argv[0])
    os.environ[COMMAND] = f"deepspeed --num_gpus {os.environ['WORLD_SIZE']} {what}"
    parent = launcher.ppid()

    def watch() -> None:
        with contextlib.suppress(psutil.Error):
            while launcher.ppid() == parent:
                time.sleep(1)
            launcher.terminate()

    if os.environ["LOCAL_RANK"] == "0":
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
