"""What files and sizes tell of a run that cannot work is said before torch is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, arguments, train

from openrlhf_sgpo.run_folder import RunFolder

# Exit code and what was said, of runs that are started one after the other in one process; and whether torch was loaded.
TRY_ALL = """
import contextlib, io, json, sys
from openrlhf_sgpo.cli.main import main
found = []
for argv in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main(["train", *argv])
    found.append((code, said.getvalue(), "torch" in sys.modules))
print(json.dumps(found))
"""


@pytest.fixture
def cases(tiny_data, tmp_path):
    """By what is wrong: what the settings of a run of 24 pairs and 24 prompts in two rounds are then, and what is said."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 100}))
    table = tmp_path / "pairs.csv"
    table.write_text("prompt,chosen,rejected\n")
    (tmp_path / "file").write_text("")
    return {
        "human pairs": ({"train.batch_size": "32"}, "24 pairs are fewer than --train.batch_size 32"),
        "seed.size": ({"seed.size": "25"}, "--seed.size 25 exceeds the 24 pairs of --data.dataset; lower it"),
        "seed of a batch": ({"seed.size": "3"}, "--data.dataset: 3 pairs are fewer than --train.batch_size 4"),
        "round": ({"rounds.prompts": "12 2"}, "round 2 with 2 prompts: 2 pairs are fewer than --train.batch_size 4"),
        "rounds": ({"rounds.prompts": "20 20"}, "holds 24 usable prompts, 2 rounds need [20, 20]: lower"),
        "no pairs": ({"data.dataset": "none.jsonl"}, "none.jsonl: no such file"),
        "no prompts": ({"data.prompt_dataset": "none.parquet"}, "none.parquet: no such file"),
        "no held-out pairs": ({"eval.dataset": "none.json.gz"}, "none.json.gz: no such file"),
        "kind": ({"data.dataset": str(table)}, "pairs.csv: unknown kind of file; expected .jsonl"),
        "in use": ({"ckpt.output_dir": str(tmp_path / "used")}, "used is in use by process "),
        "not a run": ({"ckpt.output_dir": str(tiny_data["pairs"].parent)}, "is not empty and not a run"),
        "read-only": ({"ckpt.output_dir": "/proc/runs/mine"}, "/proc cannot be written to ("),
        "in a file": ({"ckpt.output_dir": str(tmp_path / "file/mine")}, "cannot be written to (Not a directory)"),
        "positions": ({"model.model_name_or_path": str(model)}, "--data.max_len 128 exceeds the 100 positions"),
    }


def test_all_is_said_before_torch_is_loaded(tiny_data, tmp_path, cases):
    used = RunFolder(str(tmp_path / "used"))  # which holds the folder as long as it lives
    used.lock()
    argvs = []
    for changes, _ in cases.values():
        words = arguments("a-hub-name", tiny_data, tmp_path / "run")
        given = dict(zip(words[::2], words[1::2], strict=True)) | {f"--{name}": text for name, text in changes.items()}
        argvs.append([word for name, text in given.items() for word in (name, *text.split(" "))])
    command = [sys.executable, "-c", TRY_ALL]
    done = subprocess.run(command, input=json.dumps(argvs), cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for (name, (_, expected)), (code, said, loaded) in zip(cases.items(), json.loads(done.stdout), strict=True):
        assert (code, loaded) == (2, False), f"{name}: {said}"
        assert said.startswith("error: ") and expected in said, f"{name}: {said}"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_policy_that_has_not_moved_is_said_and_the_remedy_works(tiny_model, tiny_data, tmp_path):
    """Such a learning rate is lost in the rounding of the weights, so that the implicit rewards are all equal."""
    folder = tmp_path / "run"
    argv = arguments(tiny_model, tiny_data, folder, "--seed.max_epochs", "1")
    stuck = train(*argv, "--seed.lr", "1e-30")
    assert stuck.returncode == 2
    (line,) = [line for line in stuck.stderr.splitlines() if line.startswith("error: ")]
    assert "round 1: all answers to a prompt got the same reward" in line
    assert f"the policy round_0/policy has not moved from {tiny_model}. Raise --seed.lr or --seed.max_epochs" in line
    remedy = f"delete {folder / 'round_0'} and {folder / 'round_1'} and add --resume"
    assert remedy in line and not RunFolder(str(folder)).finished(1, "pairs")
    for number in (0, 1):
        shutil.rmtree(folder / f"round_{number}")
    process = train(*argv, "--seed.lr", "1e-3", "--resume")
    assert process.returncode == 0, process.stderr[-3000:]
    assert Path(folder, "round_2/policy/model.safetensors").is_file()
