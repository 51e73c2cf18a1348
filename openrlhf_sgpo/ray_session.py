"""Ray: a private session, local to this machine, with its own key, and ended with this process; or a cluster that is there.

Ray's servers execute any request as the user who started them, and by default listen on all interfaces.
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
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from openrlhf_sgpo.keys import without_keys

SESSION = "OPENRLHF_SGPO_SESSION"  # in the environment of all processes that Ray starts
# Characters in the path of the folder for temporary files: Ray appends 82 to it in the path of a socket, and 107 are allowed.
LONGEST = 25
# For vLLM, which by default uses the machine's address: on one machine its processes need not be reachable from others.
LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
PATIENCE = 10.0  # seconds for remaining processes to clean up

_keeper: subprocess.Popen[bytes] | None = None
_before = contextlib.ExitStack()  # what the end of the session sets back in this process


@dataclass(frozen=True)
class Placement:
    """Where the engines of a run stand whose ranks are actors on a cluster.

    group: Ray's placement group, of a bundle per GPU. bundles: those of each engine, which are on one machine where they can
    be. share: of a GPU that an engine or a rank takes in Ray's books; 0 on a cluster without GPUs. apart: no engine is on the
    GPU of a rank.
    """

    group: Any
    bundles: list[list[int]]
    share: float
    apart: bool

    def options(self, engine: int) -> dict[str, Any]:
        """Of the Ray actor of an engine. Workers of an engine on several GPUs are actors of their own, which have the GPUs."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = self.bundles[engine]
        strategy = PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=bundles[0], placement_group_capture_child_tasks=True
        )
        return {"num_cpus": 0, "num_gpus": self.share if len(bundles) == 1 else 0, "scheduling_strategy": strategy}


placement: Placement | None = None  # in a rank that Ray has started


@contextlib.contextmanager
def _keys_put_aside() -> Iterator[None]:
    """Processes started within the block inherit no keys."""
    keys = {name: value for name, value in os.environ.items() if name not in without_keys(os.environ)}
    for name in keys:
        del os.environ[name]
    try:
        yield
    finally:
        for name, value in keys.items():
            os.environ.setdefault(name, value)  # Ray's token stays that of this session


def _restore(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def start_ray(environment: Mapping[str, str]) -> None:
    """Starts Ray, unless this process already has. environment: further variables for its workers, which get no API keys.

    Raises RuntimeError if Ray would not require its token, or would listen beyond this machine.
    """
    global _keeper
    import ray

    if ray.is_initialized():
        return
    from ray._private import ray_constants

    raylet: Any = import_module("ray._raylet")  # compiled, without stubs for these names
    folder = tempfile.mkdtemp(prefix="sgpo-", dir="/tmp" if len(tempfile.gettempdir()) > LONGEST else None)
    _keeper = subprocess.Popen(
        [sys.executable, "-m", __name__, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # signals to this process's group must not end the cleanup process
    )

    def read_settings() -> None:
        """Ray may have been imported, and read its settings, earlier."""
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()

    session = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), SESSION: folder}
    _before.callback(read_settings)
    _before.callback(_restore, {name: os.environ.get(name) for name in session})
    _before.callback(setattr, ray_constants, "ENABLE_RAY_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER)
    # Without this, Ray refuses 127.0.0.1 as its address.
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _keys_put_aside():
            os.environ |= session
            read_settings()
            # Engines print much; their failures arrive as exceptions with tracebacks.
            context = ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                runtime_env={"env_vars": dict(environment)},
                _temp_dir=folder,
                # A worker per core, of which engines take none: they have variables of their own.
                _system_config={"prestart_worker_first_driver": False},
            )
        if raylet.get_authentication_mode() != raylet.AuthenticationMode.TOKEN:
            raise RuntimeError("this version of Ray does not require a token, so anyone on this machine could use it")
        address = context.address_info["node_ip_address"]
        if address != "127.0.0.1":
            raise RuntimeError(f"Ray would listen at {address}, where other machines could use it")
    except BaseException:
        end_ray()
        raise


def join_ray() -> None:
    """Joins the cluster of RAY_ADDRESS, which ``ray job submit`` sets, or else starts a session on this machine. Raises
    ValueError if there is no such cluster."""
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return start_ray({})
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ray.exceptions.RayError, RuntimeError) as error:
        raise ValueError(
            f"RAY_ADDRESS={address}: {error}; start the cluster (ray start --head), or unset it"
        ) from error
    return None


def end_ray() -> None:
    """Ends the Ray session, all its processes, and its files. A session that ``start_ray`` did not start stays."""
    global _keeper
    if _keeper is None or _keeper.stdin is None:
        return
    import ray

    ray.shutdown()
    _keeper.stdin.close()
    _keeper.wait()
    _keeper = None
    _before.close()


def clean_up_after(folder: str) -> None:
    """Waits for the end of standard input, then ends every process of the session in ``folder`` and removes the folder.

    The process that started the session holds the other end. When that process ends, even by SIGKILL, the input ends.
    """
    import psutil

    begin = os.stat(folder).st_mtime
    sys.stdin.buffer.read()
    left = _processes(folder)
    for process in left:
        with contextlib.suppress(psutil.Error):
            # A tracker removes the shared memory of the other processes after their end, and then exits.
            if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                process.kill()
    psutil.wait_procs(left, timeout=PATIENCE)
    for process in _processes(folder):
        with contextlib.suppress(psutil.Error):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    # joblib's semaphores are named after the process that created them, and stay if it is killed.
    for path in Path("/dev/shm").glob("sem.loky-*"):
        with contextlib.suppress(OSError, ValueError):
            status, creator = path.stat(), int(path.name.split("-")[1])
            if status.st_uid == os.getuid() and status.st_mtime >= begin and not psutil.pid_exists(creator):
                path.unlink()


def _processes(folder: str) -> list[Any]:
    import psutil

    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(SESSION) == folder:
                processes.append(process)
    return processes


if __name__ == "__main__":
    clean_up_after(sys.argv[1])
