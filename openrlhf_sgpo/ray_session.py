"""A Ray of this process alone: for this machine, with a key of its own, and gone when this process is.

Ray's servers run whatever they are told, as the user who started them, and by themselves listen on all interfaces.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from openrlhf_sgpo.keys import without_keys

SESSION = "OPENRLHF_SGPO_SESSION"  # in the environment of everything that Ray starts
LONGEST = (
    25  # characters of the folder for temporary files; Ray's own part of a socket's path is 82, and 107 are allowed
)
# For vLLM, which by itself takes the address of the machine: on one machine its processes have nothing to say to others.
LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
PATIENCE = 10.0  # seconds for what is left to clean up behind itself

_keeper: subprocess.Popen[bytes] | None = None


@contextlib.contextmanager
def _keys_put_aside() -> Iterator[None]:
    """What starts within the block inherits no keys."""
    keys = {name: value for name, value in os.environ.items() if name not in without_keys(os.environ)}
    for name in keys:
        del os.environ[name]
    try:
        yield
    finally:
        for name, value in keys.items():
            os.environ.setdefault(name, value)  # not Ray's, which is that of this session by now


def start_ray(environment: Mapping[str, str]) -> None:
    """Start Ray, if this process has none yet. environment: further variables of its workers, which get no keys of ours.

    Raises RuntimeError if Ray would not ask for its key or listen beyond this machine.
    """
    global _keeper
    import ray

    if ray.is_initialized():
        return
    from ray._private import ray_constants

    raylet: Any = import_module("ray._raylet")  # compiled, and without a description of these names
    folder = tempfile.mkdtemp(prefix="sgpo-", dir="/tmp" if len(tempfile.gettempdir()) > LONGEST else None)
    _keeper = subprocess.Popen(
        [sys.executable, "-m", __name__, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to this process's group must not end what cleans up after it
    )
    # Then Ray takes 127.0.0.1 for its address, which it otherwise refuses.
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _keys_put_aside():
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), SESSION: folder}
            # Ray may have been imported, and have read its settings, long before.
            raylet.Config.initialize("")
            raylet.AuthenticationTokenLoader.instance().reset_cache()
            # Engines say much; what goes wrong in them arrives as an exception with its traceback.
            context = ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                runtime_env={"env_vars": dict(environment)},
                _temp_dir=folder,
            )
        if raylet.get_authentication_mode() != raylet.AuthenticationMode.TOKEN:
            raise RuntimeError(
                "this version of Ray does not ask for a token, so that everyone on this machine could use it"
            )
        address = context.address_info["node_ip_address"]
        if address != "127.0.0.1":
            raise RuntimeError(f"Ray would listen at {address}, where other machines could use it")
    except BaseException:
        end_ray()
        raise


def end_ray() -> None:
    """End Ray, all that it started, and its files; one that was there before ``start_ray`` stays."""
    global _keeper
    if _keeper is None or _keeper.stdin is None:
        return
    import ray

    ray.shutdown()
    _keeper.stdin.close()
    _keeper.wait()
    _keeper = None


def clean_up_after(folder: str) -> None:
    """Waits for the end of standard input, then ends every process of the session in ``folder`` and removes the folder.

    The other end is with the process that started the session. When that is gone, even by SIGKILL, the input ends.
    """
    import psutil

    begin = os.stat(folder).st_mtime
    sys.stdin.buffer.read()
    left = _processes(folder)
    trackers = [process for process in left if "multiprocessing.resource_tracker" in " ".join(process.cmdline())]
    for process in left:
        with contextlib.suppress(psutil.Error):
            # A tracker removes the shared memory of the others when they are gone, and then ends by itself.
            if process not in trackers:
                process.kill()
    psutil.wait_procs(left, timeout=PATIENCE)
    for process in _processes(folder):
        with contextlib.suppress(psutil.Error):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    # joblib's semaphores bear the number of the process that made them, and stay when it is killed.
    for path in Path("/dev/shm").glob("sem.loky-*"):
        with contextlib.suppress(OSError, ValueError):
            made = path.stat()
            if (
                made.st_uid == os.getuid()
                and made.st_mtime >= begin
                and not psutil.pid_exists(int(path.name.split("-")[1]))
            ):
                path.unlink()


def _processes(folder: str) -> list[Any]:
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(SESSION) == folder:
                found.append(process)
    return found


if __name__ == "__main__":
    clean_up_after(sys.argv[1])
