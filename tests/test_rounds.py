"""Whole runs through the command line, on the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import yaml
from running import ROOT, SCRIPT, arguments, launch, losses, read_jsonl, train


@pytest.fixture(scope="module")
def run(tiny_model, tiny_data, tmp_path_factory):
    """One finished run, with the process that made it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train(*arguments(tiny_model, tiny_data, folder))


@pytest.mark.slow
def test_a_run_leaves_what_the_layout_says(run, tiny_model):
    folder, process = run
    assert process.returncode == 0, process.stderr[-3000:]
    assert not list(folder.rglob("*.partial"))
    for number in range(3):
        stages = json.loads((folder / f"round_{number}/manifest.json").read_text())["stages"]
        assert list(stages) == (["pairs", "train"] if number == 0 else ["generate", "pairs", "train"])
        assert (folder / f"round_{number}/policy/model.safetensors").exists()
    certificate = json.loads((folder / "round_2/worst_case.json").read_text())
    assert certificate["empirical"] <= certificate["value"] <= certificate["bound"] + 1e-12
    assert abs(certificate["gap"]) < 1e-12
    assert len(certificate["margins"]) == certificate["pairs"] == len(read_jsonl(folder / "round_2/pairs.jsonl"))
    ledger = json.loads((folder / "ledger.json").read_text())
    generated = [ledger["stages"][f"round_{number}/generate"]["samples"] for number in (1, 2)]
    assert generated == [24, 24]
    resolved = yaml.safe_load((folder / "resolved_config.yaml").read_text())
    assert resolved["sgpo"]["radius"] == 0.01
    table = (folder / "table.txt").read_text()
    assert table in process.stdout
    assert [line.split("  ")[0] for line in table.splitlines()[2:6]] == ["start", "round 0", "round 1", "round 2"]


@pytest.mark.slow
def test_pairs_are_ranked_by_implicit_reward_and_margins_are_its_differences(run):
    folder, _ = run
    pairs = read_jsonl(folder / "round_1/pairs.jsonl")
    margins = json.loads((folder / "round_1/worst_case.json").read_text())["margins"]
    differences = [pair["scores"]["chosen"] - pair["scores"]["rejected"] for pair in pairs]
    assert margins == pytest.approx(differences, abs=1e-4)
    assert min(margins) >= 0


@pytest.mark.slow
def test_pair_files_load_in_trl_form(run):
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(run[0] / "round_1/pairs.jsonl"), split="train")
    assert rows[0]["prompt"][-1]["role"] == "user"
    assert rows[0]["chosen"][0]["role"] == rows[0]["rejected"][0]["role"] == "assistant"


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_needs_resume_and_then_repeats_nothing(run, tiny_model, tiny_data):
    folder, _ = run
    argv = arguments(tiny_model, tiny_data, folder)
    again = train(*argv)
    assert again.returncode != 0
    assert "add --resume" in again.stderr
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    changed = train(*argv, "--resume", "--sgpo.radius", "0.02")
    assert "--sgpo.radius: was 0.01, now 0.02" in changed.stderr
    resumed = train(*argv, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert (folder / "table.txt").read_text() in resumed.stdout


@pytest.mark.slow
def test_killed_in_training_and_resumed_gives_the_same_run(run, tiny_model, tiny_data, tmp_path):
    """SIGKILL after the fourth of six seed steps; the checkpoint is of step 3, so that steps are taken again."""
    folder, _ = run
    copy = tmp_path / "run"
    argv = arguments(tiny_model, tiny_data, copy, "--ckpt.save_steps", "3")
    command = [sys.executable, "-m", "openrlhf_sgpo.cli.main", "train", *argv]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = copy / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 4):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (copy / "round_0/policy").exists(), "the seed stage was over before the kill"
    assert (copy / "round_0/checkpoints/latest").read_text() == "step_3"
    resumed = train(*argv, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert not list(copy.rglob("checkpoints"))
    assert losses(copy) == losses(folder)
    for number in range(3):
        for name in (f"round_{number}/policy/model.safetensors", f"round_{number}/pairs.jsonl"):
            assert (copy / name).read_bytes() == (folder / name).read_bytes(), name
    assert (copy / "round_2/worst_case.json").read_bytes() == (folder / "round_2/worst_case.json").read_bytes()


SELF_ANNOTATED_DPO = """
from openrlhf_sgpo.algorithms.base import Algorithm, Needs
from openrlhf_sgpo.algorithms.dpo import dpo_loss

class SelfAnnotatedDPO(Algorithm):
    name, paper, summary = "self_annotated_dpo", "-", "-"
    needs = Needs(rounds=True, samples_per_prompt=2)

    def loss(self, batch):
        return dpo_loss(batch.margins(self.beta))
"""


@pytest.mark.slow
def test_radius_0_equals_self_annotated_dpo_exactly(tiny_model, tiny_data, tmp_path):
    (tmp_path / "third_party.py").write_text(SELF_ANNOTATED_DPO)
    path = {"PYTHONPATH": str(tmp_path)}
    algo = "third_party:SelfAnnotatedDPO"
    dpo = train(*arguments(tiny_model, tiny_data, tmp_path / "dpo", algo=algo), **path)
    assert dpo.returncode == 0, dpo.stderr[-3000:]
    zero = train(*arguments(tiny_model, tiny_data, tmp_path / "zero", "--sgpo.radius", "0"))
    assert zero.returncode == 0, zero.stderr[-3000:]
    assert losses(tmp_path / "zero") == losses(tmp_path / "dpo")
    name = "round_2/policy/model.safetensors"
    assert (tmp_path / "zero" / name).read_bytes() == (tmp_path / "dpo" / name).read_bytes()


@pytest.mark.slow
def test_all_data_previous_references_refresh_and_fps(tiny_model, tiny_data, tmp_path):
    process = train(
        *arguments(tiny_model, tiny_data, tmp_path / "run", "--rounds.data", "all", "--sgpo.refresh_steps", "2"),
        *("--rounds.judge_reference", "previous", "--rounds.loss_reference", "previous", "--sgpo.space", "probability"),
        *("--seed.size", "16", "--seed.selection", "fps", "--seed.flip_rate", "0.25"),
    )
    assert process.returncode == 0, process.stderr[-3000:]
    seed = read_jsonl(tmp_path / "run/round_0/pairs.jsonl")
    assert (len(seed), sum(pair["flipped"] for pair in seed)) == (16, 4)
    manifest = json.loads((tmp_path / "run/round_2/manifest.json").read_text())["stages"]
    assert manifest["pairs"]["judge_reference"] == "round_0/policy"
    assert manifest["train"]["loss_reference"] == "round_1/policy"
    certificate = json.loads((tmp_path / "run/round_2/worst_case.json").read_text())
    assert certificate["pairs"] == sum(len(read_jsonl(tmp_path / f"run/round_{k}/pairs.jsonl")) for k in range(3))
    # The reference is the policy that enters the round, so every margin is 0 and every win probability one half.
    assert certificate["margins"] == pytest.approx([0.0] * certificate["pairs"], abs=1e-5)
    assert "judge reference round_0/policy" in process.stdout
    steps = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert any("train/sgpo/slope" in row for row in steps if row["stage"] == "round 2")


@pytest.mark.slow
def test_a_saturated_ball_stops_the_run_with_an_explanation(tiny_model, tiny_data, tmp_path):
    process = train(*arguments(tiny_model, tiny_data, tmp_path / "run", "--sgpo.radius", "50"))
    assert process.returncode != 0
    assert "--sgpo.radius 50.0 (space margin) is enough to move all" in process.stderr


@pytest.mark.slow
def test_two_ranks_through_deepspeed_train_as_one_through_bash(tiny_model, tiny_data, tmp_path):
    """The same file is a shell script and a deepspeed target; two ranks give the losses of one, within rounding.

    With ZeRO-3 and LoRA, whose saving is collective while rank 0 alone gets the weights.
    """
    extra = ("--ds.lora.rank", "4", "--sgpo.refresh_steps", "1")
    ranks = ["deepspeed", "--num_gpus", "2", "--master_port", "29541", str(SCRIPT)]
    argv = arguments(tiny_model, tiny_data, tmp_path / "two", *extra)
    argv[argv.index("--ds.zero_stage") + 1] = "3"
    two = launch([*ranks, *argv])
    assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-3000:]
    one = launch(
        ["bash", str(SCRIPT), *arguments(tiny_model, tiny_data, tmp_path / "one", *extra), "--num_gpus", "1"],
        MASTER_PORT="29543",
    )
    assert one.returncode == 0, one.stdout[-2000:] + one.stderr[-3000:]
    assert len(losses(tmp_path / "two")) == len(losses(tmp_path / "one")) > 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=5e-4)
    for name in ("round_1/pairs.jsonl", "round_2/pairs.jsonl"):
        assert len(read_jsonl(tmp_path / "two" / name)) == len(read_jsonl(tmp_path / "one" / name))
    assert (tmp_path / "two/round_2/policy/adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_lora_through_vllm_engines(tiny_model, tiny_data, tmp_path):
    """Merged adapters reach the engines: the run's own probe stops it otherwise, and its figures say how well."""
    argv = arguments(tiny_model, tiny_data, tmp_path / "run", "--ds.lora.rank", "4", "--seed.max_epochs", "2")
    argv[argv.index("hf")] = "vllm"
    process = train(*argv)
    assert process.returncode == 0, process.stderr[-3000:]
    assert (tmp_path / "run/round_2/policy/adapter/adapter_model.safetensors").exists()
    probe = json.loads((tmp_path / "run/round_2/evaluation.json").read_text())["probe"]
    assert probe["engine_to_trainer"] < 1e-3 < probe["moved_by_training"]
    assert probe["followed"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.slow
def test_dpo_is_one_stage_on_the_human_pairs(tiny_model, tiny_data, tmp_path):
    process = train(*arguments(tiny_model, tiny_data, tmp_path / "run", algo="dpo"))
    assert process.returncode == 0, process.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "run").glob("round_*")) == ["round_0"]
    assert len(losses(tmp_path / "run")) == 24 // 4
    wrong = train(*arguments(tiny_model, tiny_data, tmp_path / "other", "--rounds.count", "2", algo="dpo"))
    assert wrong.returncode == 2
    assert "--algo dpo has no rounds" in wrong.stderr


def test_dry_run_prints_the_resolved_configuration(tiny_model, tiny_data, tmp_path):
    process = train(*arguments(tiny_model, tiny_data, tmp_path / "run", "--dry_run"))
    assert process.returncode == 0, process.stderr
    resolved = yaml.safe_load(process.stdout)
    assert resolved["ref"]["model_name_or_path"] == str(tiny_model)
    assert resolved["dry_run"] is False
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lr", "1e-6"], "did you mean --adam.lr?"),
        (["--sgpo.leader", "released"], "--sgpo.leader released needs --sgpo.space probability"),
        (["--data.max_len", "4096"], "exceeds the model's 2048 positions"),
        (["--rounds.prompts", "100", "100"], "holds 24 usable prompts"),
    ],
)
def test_bad_settings_are_named_before_anything_expensive(tiny_model, tiny_data, tmp_path, more, message):
    argv = arguments(tiny_model, tiny_data, tmp_path / "run")
    if more[0] in argv:
        del argv[argv.index(more[0]) : argv.index(more[0]) + 2]
    process = train(*argv, *more)
    assert process.returncode == 2
    assert message in process.stderr
    assert not (tmp_path / "run").exists()


def test_a_broken_line_is_named(tiny_model, tiny_data, tmp_path):
    broken = tmp_path / "pairs.jsonl"
    broken.write_text(tiny_data["pairs"].read_text() + '{"prompt": "a", "chosen": "b"}\nnot json\n')
    process = train(*arguments(tiny_model, tiny_data | {"pairs": broken}, tmp_path / "run"))
    assert process.returncode == 2
    assert f"{broken}, line 25: missing column rejected" in process.stderr
    assert f"{broken}, line 26: not JSON" in process.stderr
