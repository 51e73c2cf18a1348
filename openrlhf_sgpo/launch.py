"""One process per rank on this machine: ``python -m openrlhf_sgpo.launch RANKS SCRIPT [arguments]``.

Ranks meet at a free port of the loopback interface, get the signals that this process gets, and end with it. For several
machines there is deepspeed's own launcher.
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

COMMAND = "OPENRLHF_SGPO_COMMAND"  # what people typed before a command's own flags, where that was not openrlhf-sgpo
GRACE = 20.0  # seconds that the others have to end when one rank has failed, or was told to stop
PAUSE = 0.2  # seconds between looks at the ranks
PARENT_DEATH = 1  # PR_SET_PDEATHSIG


def main(argv: list[str]) -> int:
    count, script, rest = int(argv[0]), argv[1], argv[2:]
    environment = {**os.environ, COMMAND: f"bash {shlex.quote(script)} --num_gpus {count}", **_devices(count)}
    command = [sys.executable, "-u", script, *rest]
    if count == 1:
        os.execve(sys.executable, command, environment)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_SIZE": str(count)}
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches this process alone, which hands it on once
            preexec_fn=end_with_parent,
        )
        for rank in range(count)
    ]
    return _wait(ranks)


def end_with_parent() -> None:
    """In a new process: it gets SIGTERM when the one that started it is gone, however that ended."""
    ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGTERM)


def _devices(count: int) -> dict[str, str]:
    """The GPUs of the ranks: the first ones of those that are visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return {}
    names = visible.split(",") if visible is not None else [str(number) for number in range(count)]
    if len(names) < count:
        sys.exit(f"error: --num_gpus {count}, but CUDA_VISIBLE_DEVICES={visible} names {len(names)}: make them agree")
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[:count])}


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Returns the exit code of the first rank that fails, or 0, when all have ended."""
    told: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        told.append(number)
        _signal(ranks, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, hand_on)
    deadline, code, is_told_to_end = float("inf"), 0, False
    while None in [process.poll() for process in ranks]:
        failed = [(rank, process.returncode) for rank, process in enumerate(ranks) if process.returncode]
        if deadline == float("inf") and (failed or told):
            deadline = time.monotonic() + GRACE
            if failed and not told:
                rank, code = failed[0]
                if code < 0:  # it could not say anything itself
                    name = signal.Signals(-code).name
                    print(
                        f"error: rank {rank} was ended by {name}; SIGKILL may mean that memory ran out", file=sys.stderr
                    )
                    deadline = time.monotonic()
        if time.monotonic() >= deadline:
            _signal(ranks, signal.SIGKILL if is_told_to_end else signal.SIGTERM)
            is_told_to_end, deadline = True, time.monotonic() + GRACE
        time.sleep(PAUSE)
    code = code or next((process.returncode for process in ranks if process.returncode), 0)
    if told:
        return 128 + told[0]
    return code if code >= 0 else 128 - code


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def follow_deepspeed(command: str) -> None:
    """In a rank of ``deepspeed``, from now on: when that is ended, so are the ranks. It has a process start them, to which it
    hands no signal on. command: of this package, which the rank runs."""
    import psutil

    launcher = psutil.Process(os.getppid())
    if "deepspeed.launcher.launch" not in launcher.cmdline():
        return
    is_module = sys.argv[0].endswith("__main__.py")
    what = f"--module openrlhf_sgpo {command}" if is_module else shlex.quote(sys.argv[0])
    os.environ[COMMAND] = f"deepspeed --num_gpus {os.environ['WORLD_SIZE']} {what}"
    above = launcher.ppid()

    def watch() -> None:
        with contextlib.suppress(psutil.Error):
            while launcher.ppid() == above:
                time.sleep(1)
            launcher.terminate()

    if os.environ["LOCAL_RANK"] == "0":
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
