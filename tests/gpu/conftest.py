"""Tests that need a GPU are skipped without one; at their end there is a table of what they measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gpu_runs import MEASURED, SIZES, model_of


@pytest.fixture(scope="session")
def gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    return torch.cuda.get_device_name()


@pytest.fixture(scope="session", params=SIZES)
def sized_model(gpu, request, tiny_model, tmp_path_factory):
    return request.param, model_of(request.param, tiny_model, tmp_path_factory.mktemp("model") / request.param)


def pytest_terminal_summary(terminalreporter):
    if MEASURED:
        widths = [max(len(row[column]) for row in MEASURED) for column in range(3)]
        terminalreporter.section("measured on this GPU")
        for what, figure, unit in MEASURED:
            terminalreporter.write_line(f"{what:{widths[0]}}  {figure:>{widths[1]}}  {unit}")
