"""``train --launcher ray`` on a cluster of two raylets on this machine, each with a GPU that exists in Ray's books only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from glob import glob
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobSubmissionClient
from running import OF_RANKS, ROOT, arguments, free_port, inherited, losses, read_jsonl, train

from openrlhf_sgpo.cli.cluster import JOB, ray_places
from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.rollout.folders import PREFIX

PATIENT = {  # on a busy machine, where Ray would give up workers that are slow to start
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "300",
}

MARK = "OPENRLHF_SGPO_TEST_CLUSTER"  # in the environment of all processes of the cluster


def test_a_job_of_ray_is_placed_by_ray_and_a_rank_is_not(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for given, job, rank, expected in (
        ("auto", False, False, False),
        ("auto", True, False, True),
        ("auto", True, True, False),
        ("deepspeed", True, False, False),
        ("ray", False, False, True),
    ):
        with monkeypatch.context() as patch:
            if job:
                patch.setenv(JOB, "{}")
            if rank:
                patch.setenv("RANK", "0")
            assert ray_places(Config(launcher=given)) is expected


def test_ranks_of_a_launcher_do_not_start_ranks(tiny_model, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("OPENRLHF_SGPO_COMMAND", "deepspeed")
    assert main(["train", *arguments(tiny_model, tiny_data, tmp_path / "run", "--launcher", "ray")]) == 2
    assert "--launcher ray starts the ranks itself: start it once" in capsys.readouterr().err


def test_settings_of_ray_are_not_read_without_it(tiny_model, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", *arguments(tiny_model, tiny_data, tmp_path / "run", "--ray.ranks", "2")]) == 2
    assert "--ray: this is not --launcher ray, and would not read it" in capsys.readouterr().err


def test_no_cluster_at_the_address_is_one_sentence(tiny_model, tiny_data, tmp_path, monkeypatch, capsys):
    import ray

    def init(**_):
        raise ConnectionError("nobody answers")

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", init)
    assert main(["train", *arguments(tiny_model, tiny_data, tmp_path / "run", "--launcher", "ray")]) == 2
    assert "RAY_ADDRESS=127.0.0.1:1: nobody answers; start the cluster" in capsys.readouterr().err


def test_the_slurm_script_starts_a_cluster_on_all_nodes_and_trains_on_the_first(tmp_path):
    """With stand-ins for Slurm's and Ray's commands that note how they are called: a node is alive once it was started."""
    calls = tmp_path / "calls"
    stand_ins = {
        "scontrol": "printf 'a1\\na2\\na3\\n'",
        "srun": f"""case "$*" in *hostname*) echo "10.0.0.7 fe80::1";; *"ray start"*) /bin/sleep 0.2;; esac
echo "$*" >> {calls}""",
        "python": f"echo $(($(grep -c -e --head {calls}) + 2 * $(grep -c -e --exclude {calls})))",
        "sleep": "exec /bin/sleep 0.05",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "a[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
    }
    script = ROOT / "examples" / "train_ssapo.slurm"
    subprocess.run(["bash", script, "--config", "zephyr-7b.paper"], cwd=ROOT, env=environment, check=True, timeout=60)
    _, *started, trained = calls.read_text().splitlines()
    head, rest = sorted(started, key=lambda line: "--exclude" in line)
    assert "--nodelist=a1 env -u RAY_ADDRESS ray start --head --node-ip-address=10.0.0.7 --port=6379" in head
    assert "--nodes=2 --ntasks=2 --exclude=a1 env -u RAY_ADDRESS ray start --address=10.0.0.7:6379" in rest
    assert trained.endswith("--nodelist=a1 bash examples/train_ssapo_ray.sh --config zephyr-7b.paper")


@pytest.fixture(scope="module")
def cluster():
    """Two raylets with a GPU each in their books, and two CPUs; with the dashboard, which takes jobs."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**PATIENT, MARK: str(os.getpid())}.items():
            patch.setenv(name, value)
        for name in OF_RANKS:  # jobs take their variables from the cluster
            patch.delenv(name, raising=False)
        resources = {"num_cpus": 2, "num_gpus": 1}
        dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": int(free_port())}
        ports = [{"dashboard_agent_listen_port": int(free_port())} for _ in range(2)]  # the default serves one cluster
        started = Cluster(initialize_head=True, head_node_args={**resources, **dashboard, **ports[0]})
        started.add_node(**resources, **ports[1])
        yield started
        started.shutdown()


def start(cluster, folder: Path, *argv: str, as_job: bool = False, place: Path = ROOT) -> subprocess.Popen:
    """The command, in a place on this machine, or a job of Ray with it, which takes its variables from the cluster."""
    environment = {"RAY_ADDRESS": cluster.address, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "openrlhf_sgpo", "train", *argv]
    if as_job:
        client = JobSubmissionClient(f"http://{cluster.head_node.webui_url}")
        wait_for(lambda: takes_jobs(client), "the cluster takes no jobs", 200)
        there = {"env_vars": {"PYTHONPATH": environment["PYTHONPATH"]}}
        submit = [*RAY, "job", "submit", "--address", f"http://{cluster.head_node.webui_url}"]
        command = [*submit, "--runtime-env-json", json.dumps(there), "--", *command]
    else:
        command += ["--launcher", "ray"]
    with open(f"{folder}.stderr", "w") as errors:
        return subprocess.Popen(
            command, cwd=place, env=inherited() | environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )


def takes_jobs(client: JobSubmissionClient) -> bool:
    """A cluster that has just started may have no agent yet that runs jobs."""
    with contextlib.suppress(RuntimeError):
        client.submit_job(entrypoint="true")
        return True
    return False


def actors(cluster, kind: str) -> list[psutil.Process]:
    """Processes of actors, which are named after their class, or after the class of the method that they run. Their parents are
    the raylets."""
    raylets = [part.process.pid for node in cluster.list_all_nodes() for part in node.all_processes["raylet"]]
    children = [child for pid in raylets if psutil.pid_exists(pid) for child in psutil.Process(pid).children()]
    return [child for child in children if kind in child.name()]


def engine_processes() -> list[psutil.Process]:
    """Of vLLM, which its actors start."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "EngineCore" in process.name() and process.environ().get(MARK) == str(os.getpid()):
                processes.append(process)
    return processes


def wait_for(condition, what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


RAY = [sys.executable, "-m", "ray.scripts.scripts"]
ENGINES = {"--rollout.engine": "vllm", "--rounds.count": "1"}
PLAYS = {"--data.dataset": None, "--rounds.steps": "2", "--oracle": "toy_oracles:Letters", "--data.max_len": "256"}


def flags(argv: list[str], changes: dict[str, str | None]) -> list[str]:
    given = dict(zip(argv[::2], argv[1::2], strict=True)) | changes
    return [word for name, value in given.items() if value is not None for word in (name, value)]


def answers(row: dict) -> list:
    """Of a line of pairs.jsonl, the chosen one first, or of plays.jsonl."""
    if "answers" in row:
        return [answer["text"] for answer in row["answers"]]
    return [row["id"], row["chosen_token_ids"], row["rejected_token_ids"]]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("algo", "file"), [("sgpo", "pairs.jsonl"), ("slhf", "plays.jsonl")])
def test_a_run_on_two_nodes_is_that_of_one_process(algo, file, cluster, tiny_model, tiny_data, tmp_path):
    """Two ranks and two engines, one of each per node: the same pairs or plays, and losses. An engine that is killed while the
    first round is sampled is started again and asked again. One of the runs is a job of Ray. Engines of the other see neither
    the model nor the run folder: paths begin with /proc/self/cwd, which is another folder in each process."""
    folders = {name: tmp_path / name for name in ("ray", "alone")}
    argv = arguments(tiny_model, tiny_data, folders["ray"], algo=algo)
    argv = flags(argv, ENGINES | (PLAYS if algo == "slhf" else {}))
    there: dict[str, str | None] = {}
    if algo == "sgpo":
        shutil.copytree(tiny_model, tmp_path / "model")
        there = {"--model.model_name_or_path": "/proc/self/cwd/model", "--ckpt.output_dir": "/proc/self/cwd/ray"}
    more = ("--ray.ranks", "2")
    process = start(cluster, folders["ray"], *flags(argv, there), *more, as_job=algo == "slhf", place=tmp_path)
    assert process.stdout
    said, seen = [], False
    for line in process.stdout:
        said.append(line)
        seen = seen or bool(engine_processes())  # a job passes its lines on when it has ended
        if algo == "sgpo" and "round 1: generate" in line:
            actors(cluster, "Rollout")[0].kill()
    assert process.wait(600) == 0, "".join(said)[-3000:] + Path(f"{folders['ray']}.stderr").read_text()[-3000:]
    assert any(line.startswith("2 ranks on Ray, the run folder is") for line in said)
    assert any(re.match(r"vLLM engine \d died; restarting it", line) for line in said) == (algo == "sgpo")
    wait_for(lambda: not actors(cluster, "_Rank") and not actors(cluster, "Rollout"), "actors are left", 20)
    assert seen or algo == "slhf"
    wait_for(lambda: not engine_processes(), "engines are left, also of the actor that was killed", 20)
    copies = [int(path.removeprefix(PREFIX)) for path in glob(f"{PREFIX}*")]
    assert not [number for number in copies if not psutil.pid_exists(number)], "copies of folders are left"
    # One rank and one engine, which start sooner than two. What two ranks of a launcher do is what one does: test_rounds.py.
    done = train(*flags(argv, {"--ckpt.output_dir": str(folders["alone"])}), PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.returncode == 0, done.stderr[-3000:]
    # Log-probabilities and scores beside the answers differ in their last digits.
    rows, other_rows = ([answers(row) for row in read_jsonl(folder / "round_1" / file)] for folder in folders.values())
    assert rows == other_rows
    assert losses(folders["ray"]) == pytest.approx(losses(folders["alone"]), rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_or_a_node_that_is_lost_ends_the_run_within_a_minute(cluster, tiny_model, tiny_data, tmp_path):
    """The message says what was lost and how to go on; nothing is left running. The last test: a node is gone after it."""
    folder = tmp_path / "run"
    argv = arguments(tiny_model, tiny_data, folder, "--train.max_epochs", "5000", "--ckpt.save_steps", "5", algo="dpo")
    for lost, more in (("rank", []), ("node", ["--resume"])):
        before = len(losses(folder)) if (folder / "metrics.jsonl").exists() else 0
        process = start(cluster, folder, *argv, "--ray.ranks", "2", *more)
        metrics = folder / "metrics.jsonl"
        wait_for(
            lambda process=process, before=before, metrics=metrics: (
                process.poll() is not None or (metrics.exists() and len(metrics.read_text().splitlines()) > before + 8)
            ),
            "no step was taken",
            400,
        )
        errors = Path(f"{folder}.stderr")
        assert process.poll() is None, errors.read_text()[-3000:]
        (queue,), head = actors(cluster, "Queue"), cluster.head_node.all_processes["raylet"][0].process.pid
        assert queue.ppid() == head, "what is printed must not pass through a node that may end before the command"
        began = time.monotonic()
        if lost == "rank":
            actors(cluster, "_Rank")[-1].send_signal(signal.SIGKILL)
        else:
            cluster.remove_node(sorted(cluster.worker_nodes, key=str)[0], allow_graceful=False)
        assert process.wait(120) == 1
        assert time.monotonic() - began < 60
        said = errors.read_text()
        assert re.search(r"^error: rank \d was lost: ", said, re.MULTILINE) and "Traceback" not in said, said
        resumed = re.search(r"^to continue: openrlhf-sgpo train .* --resume\b.*$", said, re.MULTILINE)
        assert resumed and resumed[0].count("--resume") == 1, said
        wait_for(lambda: not actors(cluster, "_Rank"), "ranks are left", 20)
