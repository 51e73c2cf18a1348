"""``train`` on a Ray cluster: places ranks and engines, passes on what rank 0 prints, and ends all when one is lost.

Every rank runs what it would run under a launcher. The process of the command waits for them.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from openrlhf_sgpo import algorithms, extras, keys, ray_session
from openrlhf_sgpo.cli import ending
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.launch import GRACE
from openrlhf_sgpo.output import other_packages_apart, say
from openrlhf_sgpo.run_folder import release_locks
from openrlhf_sgpo.run_settings import samples

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in the command of a job
SHARE = 0.2  # of a GPU in Ray's books: a rank and an engine fit on the same one
PATIENCE = 120.0  # seconds for a cluster to give the GPUs that it says are free
PAUSE = 0.2  # seconds between two looks


def ray_places(config: Config) -> bool:
    """Whether this process is to place ranks, and is not one itself."""
    is_job = JOB in os.environ and "RANK" not in os.environ
    return config.launcher == "ray" or (config.launcher == "auto" and is_job)


@dataclass(frozen=True)
class _Command:
    """What every rank is told. run: trains with these settings. environment: variables that its process needs, keys among them,
    which therefore go to the ranks directly and not through Ray's books. folder, path: where the command was started, and where
    it finds the user's modules. lines: a queue of what is printed."""

    run: Callable[..., Any]
    settings: Config
    options: Any
    argv: list[str]
    folder: str
    path: list[str]
    environment: dict[str, str]
    placement: ray_session.Placement
    lines: Any


class _Lines(io.TextIOBase):
    """A stream of a rank whose text goes to the command's. number: 1 for its output, 2 for its errors."""

    def __init__(self, queue: Any, number: int):
        self.queue = queue
        self.number = number

    def write(self, text: str) -> int:
        if text:
            self.queue.put((self.number, text))
        return len(text)


def train_on_ray(
    run: Callable[..., Any], settings: Config, algorithm: algorithms.AlgorithmType, options: Any, argv: list[str]
) -> int:
    """Run a training on the cluster of RAY_ADDRESS, or on a private session on this machine; returns the exit code. argv: of
    the command, for what it says when it ends early.

    Raises ValueError if packages are missing or the cluster is too small.
    """
    if "RANK" in os.environ:
        raise ValueError("--launcher ray starts the ranks itself: start it once, without deepspeed or torchrun")
    if problem := extras.missing("ray", "transformers", "deepspeed", "peft", "openrlhf"):
        raise ValueError(problem)
    import ray

    ray_session.join_ray()
    try:
        engines = settings.rollout.engine == "vllm" and samples(settings, algorithm)
        with _placed(settings, engines) as (count, placement):
            from ray.util.queue import Queue
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            from openrlhf_sgpo.openrlhf.ray_ranks import start_ranks

            # On the node of this command: the end of another node must not take away what is printed.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            lines = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
            inherited = keys.without_keys(os.environ)
            environment = {name: value for name, value in os.environ.items() if name not in inherited}
            environment.pop("RAY_AUTH_TOKEN", None)  # Ray's own processes have it
            path = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            command = _Command(run, settings, options, argv, os.getcwd(), path, environment, placement, lines)
            ranks = start_ranks(count, placement.group, placement.share)
            try:
                return _wait([rank.call.remote(_train, command) for rank in ranks], ranks, lines, argv)
            finally:
                for rank in ranks:
                    ray.kill(rank)
                lines.shutdown(force=True)
    finally:
        ray.shutdown()
        ray_session.end_ray()


@contextlib.contextmanager
def _placed(settings: Config, with_engines: bool) -> Iterator[tuple[int, ray_session.Placement]]:
    """The number of ranks, and the placement of the engines. Raises ValueError if the cluster is too small or busy."""
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    gpus, parallel = int(ray.cluster_resources().get("GPU", 0)), settings.vllm.tensor_parallel_size
    asked = settings.vllm.num_engines if with_engines else 0
    separate = asked * parallel if with_engines and not settings.ray.colocate else 0
    if separate == 0 and with_engines and not settings.ray.colocate:
        raise ValueError("--ray.colocate false: say how many engines have GPUs of their own, --vllm.num_engines")
    count = settings.ray.ranks or max(1, gpus - separate)
    engines = asked or (max(1, count // parallel) if with_engines else 0)
    colocated = engines * parallel if settings.ray.colocate else 0
    bundles = max(count, colocated) + separate
    unit = "GPU" if gpus else "CPU"
    there = int(ray.cluster_resources().get(unit, 0))
    if bundles > there:
        with_these = f" and {engines} engines (of {parallel} {unit}s each)" if engines else ""
        raise ValueError(
            f"{count} ranks{with_these} need {bundles} {unit}s, but the cluster has "
            f"{there}: lower --ray.ranks, --vllm.num_engines or --vllm.tensor_parallel_size, or add nodes"
        )
    needs: list[dict[str, float]] = [{"CPU": 1.0} | ({"GPU": 1.0} if gpus else {}) for _ in range(bundles)]
    # Rank 0, which has the run folder, is on the machine of the command if that can train.
    address = ray.util.get_node_ip_address()
    here = next((node for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == address), None)
    if here and here["Resources"].get(unit, 0) >= 1:
        needs[0][f"node:{address}"] = 0.001
    group = placement_group(needs, strategy="PACK")
    try:
        try:
            ray.get(group.ready(), timeout=PATIENCE)
        except ray.exceptions.GetTimeoutError as error:
            free = ray.available_resources().get(unit, 0)
            raise ValueError(
                f"{bundles} {unit}s are needed, and {free:g} of the cluster's {there} are free: wait for the others, or lower "
                "--ray.ranks"
            ) from error
        nodes = placement_group_table(group)["bundles_to_node_id"]
        ordered = sorted(
            range(count, bundles) if separate else range(bundles), key=lambda bundle: (nodes[bundle], bundle)
        )
        parts = [ordered[number * parallel :][:parallel] for number in range(engines)]
        yield count, ray_session.Placement(group, parts, SHARE if gpus else 0, separate > 0)
    finally:
        remove_placement_group(group)


def _train(command: _Command) -> int:
    """In a rank: the training, as under a launcher; returns the exit code."""
    os.environ |= command.environment
    with contextlib.suppress(OSError):  # a machine without this folder
        os.chdir(command.folder)
    sys.path += [place for place in command.path if place not in sys.path]
    ray_session.placement = command.placement
    sys.stdout, sys.stderr = _Lines(command.lines, 1), _Lines(command.lines, 2)
    if os.environ["RANK"] == "0":
        place = f"{socket.gethostname()}:{os.path.abspath(command.settings.ckpt.output_dir)}"
        ranks = "1 rank" if os.environ["WORLD_SIZE"] == "1" else f"{os.environ['WORLD_SIZE']} ranks"
        say(f"{ranks} on Ray, the run folder is {place}")
    try:
        with other_packages_apart():
            command.run(command.settings, algorithms.get(command.settings.algo), command.options)
        ending.part_from_other_ranks(failed=False)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return ending.explain(error, command.argv)
    finally:
        release_locks()


def _wait(calls: list[Any], ranks: list[Any], lines: Any, argv: list[str]) -> int:
    """Prints what the ranks print until all have ended; returns the exit code of the first that failed, or 0. A rank that is
    lost ends it at once."""
    import ray

    rank_of = {call: rank for rank, call in enumerate(calls)}
    deadline, failure, pending = float("inf"), 0, list(calls)
    while pending:
        done, pending = ray.wait(pending, timeout=PAUSE)
        _pass_on(lines)
        for call in done:
            try:
                code = ray.get(call)
            except ray.exceptions.RayError as error:
                ending.explain_loss(_loss(rank_of[call], error), argv)
                return 1
            failure = failure or code
        if failure and deadline == float("inf"):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            break
    _pass_on(lines)
    return failure


def _loss(rank: int, error: BaseException) -> str:
    """What has become of a rank, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = next(
        (line for line in lines if "node" in line.lower() and "died" in line.lower()), lines[-1] if lines else ""
    )
    return f"rank {rank} was lost: {cause or type(error).__name__}"


def _pass_on(lines: Any) -> None:
    for number, text in lines.get_nowait_batch(lines.qsize()):
        say(text, end="", is_error=number == 2)
