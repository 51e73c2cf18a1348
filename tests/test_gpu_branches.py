"""`make test-gpu` knows every branch that only a GPU reaches, and its runs have settings that resolve."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from openrlhf_sgpo.cli.main import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "openrlhf_sgpo"
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
from gpu_runs import BRANCHES, run_flags  # noqa: E402


def asks_for_a_gpu(node: ast.AST, room: str) -> bool:
    names = (getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "value", None))
    # The estimate describes machines that may be others than this one.
    asking = ("cuda", "is_cuda") if room == "estimate" else ("cuda", "is_cuda", "on_gpu", "sleeps")
    return any(name in asking for name in names if isinstance(name, str))


def branches() -> set[str]:
    """FILE:FUNCTION, the innermost one, of all code that asks whether there is a GPU."""
    places = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        stack: list[tuple[ast.AST, str]] = [(ast.parse(path.read_text()), "")]
        while stack:
            node, name = stack.pop()
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                name = node.name
            if asks_for_a_gpu(node, path.relative_to(PACKAGE).parts[0]):
                places.add(f"{path.relative_to(PACKAGE)}:{name}")
            stack += [(child, name) for child in ast.iter_child_nodes(node)]
    return places


def test_every_branch_of_a_gpu_is_listed():
    assert branches() == BRANCHES.keys()


def test_the_tests_that_are_named_exist():
    tree = ast.parse((ROOT / "tests" / "gpu" / "test_gpu.py").read_text())
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {name for name in BRANCHES.values() if name} <= tests


@pytest.mark.parametrize("algo", ["sgpo", "slhf", "nash_md"])
def test_the_runs_resolve(algo, tiny_model, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tests")
    argv = run_flags(tiny_model, tiny_data, tmp_path / "run", algo)
    assert main(["train", *argv, "--dry_run"]) == 0, capsys.readouterr().err
