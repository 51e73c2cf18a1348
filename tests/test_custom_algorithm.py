"""The package of examples/custom_algorithm: installed as its README says, listed, right, and trained."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import forked

from openrlhf_sgpo.algorithms.base import PairBatch
from openrlhf_sgpo.algorithms.dpo import dpo_loss

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent / "examples" / "custom_algorithm"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed the package, built from a copy so that nothing is left beside the source."""
    folder = tmp_path_factory.mktemp("custom")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder / "source"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def dpop():
    """The example's module, from its source."""
    spec = importlib.util.spec_from_file_location("dpo_positive_of_the_example", EXAMPLE / "dpo_positive.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def command_line(*argv: str, path: Path) -> subprocess.CompletedProcess:
    # Tests that build a strategy in this process leave its rank in the environment.
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    inherited["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**inherited, "PYTHONPATH": os.pathsep.join([str(path), str(EXAMPLE.parent.parent)])}
    command = [sys.executable, "-m", "openrlhf_sgpo.cli.main", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_it_stays_small():
    assert len((EXAMPLE / "dpo_positive.py").read_text().splitlines()) < 60


def test_the_list_shows_it_with_the_distribution_that_brings_it(installed):
    process = command_line("algorithms", path=installed)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("dpop "))
    assert "the chosen response must not become less likely" in lines[start]
    assert lines[start + 1].strip() == "arXiv 2402.13228, entry point of dpo-positive"
    assert lines[start + 2].strip() == "--dpop.penalty 5.0"


def test_its_flags_are_those_of_a_built_in(installed, tmp_path):
    required = ["--model.model_name_or_path", "model", "--data.dataset", "pairs.jsonl", "--ckpt.output_dir"]
    argv = ["train", "--algo", "dpop", *required, str(tmp_path / "run"), "--dry_run"]
    process = command_line(*argv, "--dpop.penalty", "7", path=installed)
    assert process.returncode == 0, process.stderr
    assert "dpop:\n  penalty: 7.0" in process.stdout
    refused = command_line(*argv, "--dpop.penalty", "-1", path=installed)
    assert refused.returncode == 2
    assert "--dpop.penalty: -1.0 is out of range, use at least 0" in refused.stderr


def test_it_is_dpo_where_the_chosen_response_has_not_lost(dpop):
    policy, reference = draw(2, 6), draw(4, 6)[2:]
    kept = PairBatch(torch.maximum(policy[0], reference[0]), policy[1], *reference)
    assert torch.equal(dpop.dpop_loss(kept, 0.3, 50.0), dpo_loss(kept.margins(0.3)))
    any_pair = PairBatch(*policy, *reference)
    assert torch.equal(dpop.dpop_loss(any_pair, 0.3, 0.0), dpo_loss(any_pair.margins(0.3)))


def test_what_the_chosen_response_lost_counts_against_the_margin(dpop):
    """h = 0 with both responses down by one nat: DPO sees no change, DPO-Positive a margin of -beta * lambda."""
    zero, down = torch.zeros(1, dtype=torch.float64), -torch.ones(1, dtype=torch.float64)
    batch = PairBatch(down, down, zero, zero)
    assert dpo_loss(batch.margins(0.3)).item() == pytest.approx(math.log(2))
    assert dpop.dpop_loss(batch, 0.3, 5.0).item() == pytest.approx(math.log(1 + math.exp(0.3 * 5.0)))


def test_a_lost_chosen_response_is_pulled_up_by_one_plus_the_penalty(dpop):
    """The slope in log pi(y_w) is (1 + lambda) times the one in -log pi(y_l) below the reference, and equal to it above."""
    policy, reference = draw(2, 8).requires_grad_(), draw(4, 8)[2:]
    algorithm = dpop.DPOPositive(dpop.DPOPositiveSettings(4.0), 0.5)
    loss = algorithm.loss(PairBatch(*policy, *reference))
    assert loss.shape == (8,)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    lost = policy[0] < reference[0]
    assert lost.any() and not lost.all()
    assert torch.allclose(gradient[0], -gradient[1] * torch.where(lost, 5.0, 1.0), rtol=0, atol=1e-12)


def test_gradient(dpop):
    reference = draw(4, 5)[2:]
    points = draw(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda chosen, rejected: dpop.dpop_loss(PairBatch(chosen, rejected, *reference), 0.4, 5.0),
        tuple(points.unbind()),
    )


def test_it_trains(installed, tiny_model, tiny_data, tmp_path):
    """From the installed package by its name, in one stage on the human pairs, with a penalty that makes a difference."""
    argv = [
        *("train", "--algo", "dpop", "--model.model_name_or_path", str(tiny_model)),
        *("--data.dataset", str(tiny_data["pairs"]), "--data.max_len", "128", "--ds.param_dtype", "fp32"),
        *("--train.batch_size", "4", "--train.micro_batch_size", "2", "--adam.lr", "1e-3", "--ds.zero_stage", "0"),
    ]
    losses = {}
    for penalty in ("0", "5"):
        folder = tmp_path / penalty
        more = ("--dpop.penalty", penalty, "--ckpt.output_dir", str(folder))
        process = forked(None, *argv, *more, PYTHONPATH=str(installed))
        assert process.returncode == 0, process.stderr[-3000:]
        assert (folder / "round_0/policy/model.safetensors").exists()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[penalty] = [row["train/loss"] for row in rows]
        assert len(rows) == 24 // 4
    assert losses["0"][0] == pytest.approx(losses["5"][0], abs=1e-5) == pytest.approx(math.log(2), abs=1e-5)
    assert losses["0"][1:] != losses["5"][1:]
