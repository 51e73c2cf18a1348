"""Engines as processes: who reaches them, what they know, how they die, and what they leave. One start serves all, in order."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from openrlhf_sgpo import ray_session
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.rollout import Sampling
from openrlhf_sgpo.rollout.vllm_on_cpu import threads_of

PROMPTS = [(1, 10, 20, 30), (1, 40, 50, 60, 70, 80), (1, 9)] * 8
KEYS = ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD")


@pytest.fixture(scope="module")
def session(tiny_model):
    """A rollout of one engine, and the folder of its session. The environment holds keys when Ray starts."""
    from openrlhf_sgpo.data.tokens import load_chat
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.rollout import start_rollout

    config = Config()
    config.rollout.engine = "vllm"
    config.ds.param_dtype, config.data.max_len, config.vllm.num_engines = "fp32", 64, 1
    config.train.batch_size = config.train.micro_batch_size = 1
    build_strategy(config)
    chat, _ = load_chat(str(tiny_model), False, "model", config.data.max_len)
    with pytest.MonkeyPatch.context() as patch:
        for name in KEYS:
            patch.setenv(name, "planted")
        rollout = start_rollout(config, chat, str(tiny_model))
        assert os.environ["HF_TOKEN"] == "planted"
    assert rollout.starting == [0], "it starts in the background"
    rollout.log_probs(PROMPTS[:1])
    assert rollout.starting == []
    folder = ray_session._keeper.args[-1]
    yield rollout, folder
    if rollout.engines:
        rollout.close()


def listening(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    ids = {str(process.pid) for process in processes}
    rows = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    addresses = [row.split()[3].rpartition(":") for row in rows if ids & set(re.findall(r"pid=(\d+)", row))]
    return {(address.strip("[]"), int(port)) for address, _, port in addresses}


STRANGER = """
import sys
from ray._raylet import GcsClient
try:
    print(GcsClient(address=sys.argv[1]).cluster_id.hex())
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/bin/ss").exists() and not Path("/bin/ss").exists(), reason="needs ss of iproute2")
def test_a_stranger_gets_nothing(session):
    _, folder = session
    processes = [*ray_session._processes(folder), psutil.Process()]
    sockets = listening(processes)
    assert len(sockets) > 5
    assert {address for address, _ in sockets} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    outside = next((row.address for rows in psutil.net_if_addrs().values() for row in rows
                    if row.family == socket.AF_INET and not row.address.startswith("127.")), None)  # fmt: skip
    for _, port in sockets if outside else ():
        with pytest.raises(OSError):
            socket.create_connection((outside, port), timeout=2).close()
    import ray

    address = ray.get_runtime_context().gcs_address
    with_key = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    without = {name: value for name, value in os.environ.items() if name not in with_key}
    for environment, expected in (
        (without, "AuthenticationError"),
        (without | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}, "AuthenticationError"),
        (without | with_key, "[0-9a-f]{56}"),
    ):
        said = subprocess.run(
            [sys.executable, "-c", STRANGER, address], env=environment, capture_output=True, text=True, timeout=120
        )
        assert re.fullmatch(expected, said.stdout.strip()), said.stdout + said.stderr


@pytest.mark.slow
def test_workers_know_no_keys(session):
    _, folder = session
    engines = [process for process in ray_session._processes(folder) if "Engine" in process.name()]
    assert engines
    for process in ray_session._processes(folder):
        with suppress(psutil.NoSuchProcess):  # Ray ends workers that have nothing to do
            assert "planted" not in process.environ().values(), process


@pytest.mark.slow
def test_openmp_waits_passively_in_engines_and_uses_their_cores(session):
    import ray

    rollout, _ = session
    names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    known = rollout.engines[0].__ray_call__.remote(lambda _: [os.environ[name] for name in names])
    assert ray.get(known) == ["PASSIVE", threads_of(1)]


@pytest.mark.slow
def test_an_engine_imports_what_it_needs_and_that_once(session):
    """vLLM's process began as a copy of the actor, and not as a new interpreter, which would have got further variables."""
    import ray

    rollout, folder = session
    trainers = ("deepspeed", "peft", "sklearn")
    loaded = rollout.engines[0].__ray_call__.remote(lambda _: [name for name in trainers if name in sys.modules])
    assert ray.get(loaded) == []
    (actor,) = (process for process in ray_session._processes(folder) if "RolloutEngine" in process.name())
    (core,) = (process for process in actor.children() if process.name() == "VLLM::EngineCore")
    assert core.environ() == actor.environ()


@pytest.mark.slow
def test_an_engine_that_does_not_start_says_why(session):
    """What happens in vLLM's process, and what in the actor."""
    rollout, folder = session
    (running,) = (process for process in ray_session._processes(folder) if "RolloutEngine" in process.name())
    expected = {
        "num_gpu_blocks_override": (1, "ValueError: No available memory for the cache blocks"),
        "max_model_len": (100_000, "max_model_len .100000. is greater"),
    }
    for name, (value, reason) in expected.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rollout, "arguments", rollout.arguments | {name: value})
            patch.setattr(rollout, "engines", [rollout._engine(0)])
            with pytest.raises(
                RuntimeError, match=f"vLLM engine 0 did not start, see --vllm.*, --data.max_len: .*{reason}"
            ):
                rollout._wait_for([0])
    failed = {process for process in ray_session._processes(folder) if "RolloutEngine" in process.name()} - {running}
    assert psutil.wait_procs(failed, timeout=60)[1] == [], "they end by themselves"


@pytest.mark.slow
def test_an_engine_that_dies_is_started_again_and_asked_again(session, capsys):
    rollout, folder = session
    undisturbed = rollout.generate(PROMPTS, Sampling(1.0, 1.0, 8, seed=5, n=3), label="test")
    (engine,) = [process for process in ray_session._processes(folder) if "RolloutEngine" in process.name()]
    engine.suspend()  # so that it has not answered when it dies
    threading.Timer(0.1, engine.kill).start()
    assert rollout.generate(PROMPTS, Sampling(1.0, 1.0, 8, seed=5, n=3), label="test") == undisturbed
    assert "vLLM engine 0 died; restarting it" in capsys.readouterr().out
    assert not engine.is_running()


@pytest.mark.slow
def test_an_engine_that_dies_twice_ends_the_run_with_one_message_and_leaves_nothing(session, monkeypatch):
    rollout, folder = session
    (engine,) = [process for process in ray_session._processes(folder) if "RolloutEngine" in process.name()]
    engine.kill()
    monkeypatch.setattr(rollout, "_restart", lambda number: None)  # as if it had died at once
    with pytest.raises(RuntimeError, match="vLLM engine 0 died twice on the same prompts"):
        rollout.generate(PROMPTS, Sampling(1.0, 1.0, 8, seed=5, n=3), label="test")
    begin = Path(folder).stat().st_mtime
    rollout.close()
    assert ray_session._processes(folder) == [] and not Path(folder).exists()
    left = []
    for pattern in ("psm_*", "plasma*", "sem.mp*"):
        for path in Path("/dev/shm").glob(pattern):
            with suppress(FileNotFoundError):  # another session's
                left += [path] if path.stat().st_mtime >= begin else []
    assert left == []
    from ray._private import services

    # This process can join a cluster now, which has no token of ours and stands at the machine's address.
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", ray_session.SESSION} & os.environ.keys()
    assert services.get_node_ip_address() == services.node_ip_address_from_perspective()


def test_a_process_that_ends_meanwhile_does_not_keep_the_others_alive(tmp_path, monkeypatch):
    ended, stays = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    processes = [psutil.Process(process.pid) for process in (ended, stays)]
    ended.kill()
    ended.wait()
    monkeypatch.setattr(ray_session, "_processes", lambda _: processes)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    folder = tmp_path / "session"
    folder.mkdir()
    ray_session.clean_up_after(str(folder))
    assert not processes[1].is_running() and not folder.exists()


@pytest.mark.slow
def test_nothing_is_left_of_a_session_whose_owner_was_killed(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", "from openrlhf_sgpo import ray_session as r; r.start_ray({});"
         "print(r._keeper.args[-1], flush=True);"
         "import time; time.sleep(300)"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    folder = owner.stdout.readline().strip()
    assert Path(folder).is_dir() and ray_session._processes(folder)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 60
    while Path(folder).exists() or ray_session._processes(folder):
        assert time.monotonic() < deadline, ray_session._processes(folder)
        time.sleep(0.5)
