"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "openrlhf_sgpo"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of absolute imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_only_one_room_imports_openrlhf():
    rooms = {path.relative_to(PACKAGE).parts[0] for path in SOURCES if "openrlhf" in imported(path)}
    assert rooms == {"openrlhf"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 430


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("openrlhf_sgpo, openrlhf_sgpo.config, openrlhf_sgpo.algorithms.sgpo, openrlhf_sgpo.cli.main", "torch"),
        ("openrlhf_sgpo.dro, openrlhf_sgpo.dro.losses", "cvxpy scipy transformers openrlhf deepspeed ray vllm"),
        ("openrlhf_sgpo.data, openrlhf_sgpo.data.seed", "torch datasets"),
        ("openrlhf_sgpo.games", "torch scipy matplotlib"),
    ],
)
def test_light_modules_stay_light(module, absent):
    code = (
        f"import sys, {module}; loaded = [m for m in {absent.split()} if m in sys.modules]; assert not loaded, loaded"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_flash_attention_stand_in_leaves_no_trace():
    """After OpenRLHF is imported without flash_attn, others still see that it is absent."""
    code = """
import importlib.util, sys
if importlib.util.find_spec("flash_attn") is None:
    import openrlhf_sgpo.openrlhf
    assert "openrlhf.models.ring_attn_utils" in sys.modules
    assert not [name for name in sys.modules if name.startswith("flash_attn")]
    assert importlib.util.find_spec("flash_attn") is None
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
