"""vLLM's engines read models from folders: those of a model, and on the machines of a cluster copies of those of rank 0."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import OrderedDict
from contextlib import suppress
from glob import glob
from typing import Any

import numpy
import psutil

from openrlhf_sgpo.ray_session import Placement
from openrlhf_sgpo.shared_files import KEPT, Stamps, parts_of, read_part, stamps_of

PREFIX = "sgpo-engine-"  # of temporary folders; then the number of the process that keeps copies there


class Copies:
    """An actor on a machine with engines, which keeps copies of the folders that the machine does not see."""

    def __init__(self) -> None:
        # Ray ends actors by force, and what they keep would stay.
        for left in glob(os.path.join(tempfile.gettempdir(), f"{PREFIX}*")):
            process = os.path.basename(left).removeprefix(PREFIX).partition("-")[0]
            if process.isdigit() and not psutil.pid_exists(int(process)):
                shutil.rmtree(left, ignore_errors=True)
        self.root = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")
        self.kept: OrderedDict[str, tuple[Stamps, str]] = OrderedDict()
        self.begun = 0

    def place(self, folder: str, expected: Stamps) -> str | None:
        """Where a folder with these files is on this machine; None if there is neither the folder nor a copy."""
        if stamps_of(folder) == expected:
            return folder
        there, place = self.kept.get(folder, ({}, ""))
        if there != expected:
            return None
        self.kept.move_to_end(folder)
        return place

    def begin(self, folder: str, expected: Stamps) -> None:
        """Make room for a copy, with empty files."""
        while folder in self.kept or len(self.kept) >= KEPT:
            _, outdated = self.kept.pop(folder if folder in self.kept else next(iter(self.kept)))
            shutil.rmtree(outdated, ignore_errors=True)
        place = os.path.join(self.root, str(self.begun), os.path.basename(folder.rstrip("/")))
        self.begun += 1
        self.kept[folder] = expected, place
        for name in expected:
            os.makedirs(os.path.dirname(os.path.join(place, name)), exist_ok=True)
            open(os.path.join(place, name), "wb").close()

    def append(self, folder: str, name: str, content: numpy.ndarray) -> None:
        with open(os.path.join(self.kept[folder][1], name), "ab") as file:
            file.write(content.data)

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


class EngineFolders:
    """Folders of rank 0, which asks, where each engine can read them. Engines of this machine's own session see them all."""

    def __init__(self, placement: Placement | None):
        self.nodes: list[str] = []
        self.copies: dict[str, Any] = {}
        if placement is None:
            return
        import ray
        from ray.util.placement_group import placement_group_table
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = placement_group_table(placement.group)["bundles_to_node_id"]
        self.nodes = [nodes[bundles[0]] for bundles in placement.bundles]
        for node in sorted(set(self.nodes)):
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            self.copies[node] = ray.remote(Copies).options(num_cpus=0, scheduling_strategy=there).remote()

    def place(self, folder: str, engine: int) -> str:
        """Of a folder, for an engine. Raises OSError if it cannot be written there, RuntimeError if the machine is lost."""
        if not self.copies:
            return folder
        import ray

        node = self.nodes[engine]
        try:
            return self._placed(folder, self.copies[node])
        except ray.exceptions.RayError as error:
            machine = next((row["NodeManagerAddress"] for row in ray.nodes() if row["NodeID"] == node), node)
            cause = getattr(error, "cause", None)
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, f"{machine}:{cause.filename}") from error
            raise RuntimeError(f"the machine of vLLM engine {engine}, {machine}, does not take {folder}") from error

    def _placed(self, folder: str, actor: Any) -> str:
        import ray

        expected = stamps_of(folder)
        if expected is None:
            raise ValueError(f"{folder} has no files that engines could read")
        if (place := ray.get(actor.place.remote(folder, expected))) is None:
            requests = [actor.begin.remote(folder, expected)]
            for name, (size, _) in expected.items():
                with open(os.path.join(folder, name), "rb") as file:
                    for part in parts_of(size):
                        requests.append(actor.append.remote(folder, name, ray.put(read_part(file, part).numpy())))
                        ray.get(requests.pop(0))  # one part is written while the next is read
            ray.get(requests)
            place = ray.get(actor.place.remote(folder, expected))
        return str(place)

    def close(self) -> None:
        import ray

        for actor in self.copies.values():
            with suppress(ray.exceptions.RayError):  # its machine is lost
                ray.get(actor.clear.remote())
            ray.kill(actor)
        self.copies = {}


def local_folder(model: str, revision: str | None = None) -> str:
    """The folder of a model; a model of the hub is downloaded unless it is cached. revision: a commit; None: the newest."""
    if os.path.isdir(model):
        return model
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
    return snapshot_download(model, revision=revision, allow_patterns=patterns)
