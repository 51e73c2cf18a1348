"""The noise study: every cell's settings resolve, and a small study runs, is taken up again, and reports what its runs say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import write_jsonl
from running import ROOT, launch

from openrlhf_sgpo.run_settings import load

pytestmark = pytest.mark.slow

FOLDER = ROOT / "examples" / "noise_study"
specification = importlib.util.spec_from_file_location("study", FOLDER / "study.py")
study_module = importlib.util.module_from_spec(specification)
sys.modules["study"] = study_module
specification.loader.exec_module(study_module)


def offline_settings(study: dict) -> dict:
    return {name: value for name, value in study["common"].items() if name not in study_module.ONLY_WITH_ROUNDS}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_cell_resolves_and_takes_over_what_exists(name, tmp_path):
    study = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(study["common"]))
    (tmp_path / "offline.yaml").write_text(yaml.safe_dump(offline_settings(study)))
    cells = study_module.cells(study)
    assert len(cells) == len({cell.folder(tmp_path) for cell in cells})
    done = set()
    for cell in cells:
        words = study_module.command(cell, "model", tmp_path)
        config, _ = load(words[words.index("train") + 1 :])
        assert (config.train.seed, config.seed.flip_rate) == (cell.seed, cell.flip_rate)
        if cell.base:
            assert Path(config.ckpt.fork_from) in done, "a cell takes over what is made only later"
        done.add(cell.folder(tmp_path))
    names = {method["name"] for method in study["methods"]}
    assert {method.get("same_run_as", method["name"]) for method in study["methods"]} <= names
    # Equal steps: as many optimiser steps on the seed alone as on seed and rounds together.
    sizes, size, rounds = study["sizes"], study["common"]["train"]["batch_size"], study["common"]["rounds"]["count"]
    common = study["common"]
    longer = next(method for method in study["methods"] if method["name"] == "dpo_longer")
    seed_steps = sizes["seed"] // size
    assert longer["flags"].get("adam.lr", common["adam"]["lr"]) == common["seed"]["lr"]
    assert longer["flags"]["train.max_epochs"] * seed_steps == pytest.approx(
        seed_steps + rounds * (sizes["prompts"] // rounds // size), abs=2
    )


def test_a_small_study(tiny_model, tmp_path):
    def pair(index: int) -> dict:
        return {"id": f"p{index}", "prompt": f"Say {index}", "chosen": "yes" + "!" * (index % 5), "rejected": "no no"}

    pairs = write_jsonl(tmp_path / "pairs.jsonl", [pair(index) for index in range(40)])
    study = yaml.safe_load((FOLDER / "cpu.yaml").read_text())
    study |= {"seeds": [1], "flip_rates": [0.25], "sizes": {"seed": 8, "prompts": 8, "held_out": 6}}
    study["methods"] = [
        method for method in study["methods"] if method["name"] in ("seed_only", "self_annotated", "best_margin_0.5")
    ]
    study["common"]["ds"] |= {"param_dtype": "fp32"}
    study["common"]["train"] |= {"batch_size": 4, "micro_batch_size": 2}
    study["common"]["rollout"]["max_new_tokens"] = 8
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    command = ["bash", ROOT / "examples/noise_study.sh", "--out", out, "--study", path]
    process = launch([*map(str, command), "--pairs", str(pairs), "--model", str(tiny_model)])
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("finished") == 2, process.stdout

    base, fork = (out / f"flip_0.25/seed_1/{name}" for name in ("self_annotated", "best_margin_0.5"))
    for name in ("round_0/pairs.jsonl", "round_0/policy/model.safetensors", "round_1/pairs.jsonl"):
        assert (base / name).read_bytes() == (fork / name).read_bytes()
    assert json.loads((fork / "round_1/worst_case.json").read_text())["ball"] == "best"
    seed = [json.loads(line) for line in (base / "round_0/pairs.jsonl").read_text().splitlines()]
    assert sum(row["flipped"] for row in seed) == 2
    prompts = {name: (out / f"data/{name}.jsonl").read_text() for name in ("seed", "prompts", "held_out")}
    identities = [{json.loads(line)["id"] for line in text.splitlines()} for text in prompts.values()]
    assert [len(identity) for identity in identities] == [8, 8, 6] and len(set.union(*identities)) == 22

    accuracy = json.loads((fork / "round_1/evaluation.json").read_text())["accuracy"]
    (row,) = (line for line in process.stdout.splitlines() if line.startswith("| best case"))
    assert row.split(" | ")[2] == f"{accuracy:.3f}"
    assert (out / "figure.svg").read_text().startswith("<?xml")
    again = launch([*map(str, command), "--report_only"])
    assert again.returncode == 0, again.stderr
    assert (out / "table.md").read_text() in process.stdout
    assert "finished" not in again.stdout
    study["seeds"] = [2]
    path.write_text(yaml.safe_dump(study))
    other = launch([*map(str, command), "--pairs", str(pairs), "--model", str(tiny_model)])
    assert other.returncode == 1
    assert "holds a different study" in other.stderr


def test_too_few_pairs_are_said_to_be(tiny_model, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "Why?", "chosen": "yes", "rejected": "no"}])
    command = [sys.executable, FOLDER / "study.py", "--out", tmp_path / "out", "--pairs", pairs, "--model", tiny_model]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert process.returncode == 1
    assert "1 usable pairs, but the study needs 450" in process.stderr
