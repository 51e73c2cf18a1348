"""What vLLM's classes for GPUs must have for this package, read from their source: importing them needs CUDA."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("openrlhf")


def members(module: str, name: str) -> set[str]:
    """Methods of a class and of its bases that stand in the same file."""
    package, _, rest = module.partition(".")
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    path = Path(folder, *rest.split(".")).with_suffix(".py")
    classes = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
    bases = {base.id for base in classes[name].bases if isinstance(base, ast.Name)} & classes.keys()
    here = {node.name for node in classes[name].body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    return here.union(*(members(module, base) for base in bases))


def test_the_worker_of_a_gpu_has_no_method_that_ours_would_replace():
    """vLLM refuses a worker extension whose methods its worker has."""
    workers = members("vllm.v1.worker.gpu_worker", "Worker") | members("vllm.v1.worker.worker_base", "WorkerBase")
    source = ast.parse((Path(__file__).parents[2] / "openrlhf_sgpo" / "openrlhf" / "engine.py").read_text())
    (extension,) = [
        node for node in source.body if isinstance(node, ast.ClassDef) and "WorkerWrap" in ast.unparse(node)
    ]
    added = {node.name for node in extension.body if isinstance(node, ast.FunctionDef)}
    added |= members("openrlhf.trainer.ray.vllm_worker_wrap", "WorkerWrap")
    assert added and {name for name in added & workers if not name.startswith("__")} == set()


def test_an_engine_has_the_calls_that_are_made():
    engine = members("vllm.v1.engine.async_llm", "AsyncLLM")
    assert {"collective_rpc", "generate", "sleep", "wake_up", "is_sleeping", "reset_prefix_cache"} <= engine


@pytest.mark.parametrize("numbers", [[5], [4, 5]])
def test_all_gpus_of_an_engine_are_visible_where_ray_sets_none(numbers, monkeypatch):
    """Ray leaves CUDA_VISIBLE_DEVICES alone with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES, as on clusters that set it."""
    import os

    import ray

    from openrlhf_sgpo.openrlhf import engine

    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: numbers)
    actor = engine._RolloutEngine.__new__(engine._RolloutEngine)
    actor._configure_device_env("uni" if len(numbers) == 1 else "mp", None, len(numbers))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, numbers))


@pytest.mark.parametrize(
    ("asked", "gpus", "parallel", "expected"), [(0, 4, 1, 4), (0, 4, 2, 2), (0, 0, 1, 1), (3, 8, 1, 3), (0, 1, 2, 1)]
)
def test_engines_take_all_visible_gpus_unless_told_otherwise(asked, gpus, parallel, expected):
    from openrlhf_sgpo.config import Inference
    from openrlhf_sgpo.rollout import engine_count

    config = Inference()
    config.vllm.num_engines, config.vllm.tensor_parallel_size = asked, parallel
    assert engine_count(config, gpus) == expected
