"""Runs that meet figures or weights that are not finite: they stop, say where, keep nothing of it, and go on before it."""

from __future__ import annotations

import gc
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from running import ROOT, SCRIPT, arguments, launch, read_jsonl
from safetensors.torch import load_file, save_file
from test_plays import flags as play_flags

from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.metrics import Metrics
from openrlhf_sgpo.run_folder import json_text, parse_json


def pair_flags(tiny_model, tiny_data, folder, *more: str) -> list[str]:
    """One stage of 24 pairs: 6 steps, a checkpoint after each second one."""
    argv = arguments(tiny_model, tiny_data, folder, "--ckpt.save_steps", "2", *more, algo="dpo")
    argv[argv.index("dpo")] = "toy_losses:Pairs"
    return argv


def run(argv: list[str], capsys) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["train", *argv])
    gc.collect()  # the lock on the folder ends with the run's objects
    # Progress bars end without a line's end where a run stops.
    return code, capsys.readouterr().err.rpartition("error: ")[2]


def with_one_nan(model: Path, folder: Path, name: str = "model.layers.0.mlp.up_proj.weight") -> Path:
    shutil.copytree(model, folder)
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[7] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stages(folder: Path, number: int) -> dict:
    path = folder / f"round_{number}" / "manifest.json"
    return json.loads(path.read_text())["stages"] if path.exists() else {}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("zero_stage", ["0", "2"])
def test_pairs_stop_keep_nothing_and_go_on(what, zero_stage, tiny_model, tiny_data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    argv = pair_flags(tiny_model, tiny_data, folder)
    argv[argv.index("--ds.zero_stage") + 1] = zero_stage
    monkeypatch.setenv("POISONED_STEP", "4")
    monkeypatch.setenv("POISONED", what)
    code, error = run(argv, capsys)
    assert code == 2
    assert f"round 0, step 4: the {what}" in error and "nan" in error and "--adam.lr" in error and "--resume" in error
    assert not (folder / "round_0/policy").exists() and "train" not in stages(folder, 0)
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3]
    assert sorted(path.name for path in (folder / "round_0/checkpoints").glob("step_*")) == ["step_2"]

    monkeypatch.delenv("POISONED_STEP")
    assert main(["train", *argv, "--resume"]) == 0
    assert "train" in stages(folder, 0)
    whole = tmp_path / "whole"
    argv[argv.index(str(folder))] = str(whole)
    assert main(["train", *argv]) == 0
    name = "round_0/policy/model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_fresh_answers_stop_keep_nothing_and_go_on(what, tiny_model, tiny_data, tmp_path, monkeypatch, capsys):
    """Step 5 is the second of round 2, whose first step has a checkpoint."""
    folder = tmp_path / "run"
    argv = play_flags(tiny_model, tiny_data, folder, "toy_losses:FreshAnswers", "--ckpt.save_steps", "2")
    monkeypatch.setenv("POISONED_STEP", "5")
    monkeypatch.setenv("POISONED", what)
    code, error = run(argv, capsys)
    assert code == 2
    assert f"round 2, step 5: the {what}" in error and "nan" in error and "--adam.lr" in error and "--resume" in error
    assert not (folder / "round_2/policy").exists() and "play" in stages(folder, 1) and "play" not in stages(folder, 2)
    assert [row["step"] for row in read_jsonl(folder / "round_2/plays.jsonl")] == [4] * 4

    monkeypatch.delenv("POISONED_STEP")
    assert main(["train", *argv, "--resume"]) == 0
    assert "play" in stages(folder, 2)
    whole = tmp_path / "whole"
    argv[argv.index(str(folder))] = str(whole)
    assert main(["train", *argv]) == 0
    for name in ("round_2/policy/model.safetensors", "round_2/plays.jsonl", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_learning_rate_that_leads_out_of_the_range(tiny_model, tiny_data, tmp_path, capsys):
    common = ("--lr_scheduler", "constant", "--lr_warmup_ratio", "0")
    folder = tmp_path / "pairs"
    argv = pair_flags(tiny_model, tiny_data, folder, *common)
    argv[argv.index("--adam.lr") + 1] = "1e30"
    code, error = run(argv, capsys)
    assert code == 2 and "round 0, step 2: the gradient norm is nan" in error and "--adam.lr" in error
    assert not list(folder.glob("round_0/checkpoints/step_*")) and not (folder / "round_0/policy").exists()

    folder = tmp_path / "plays"
    code, error = run(play_flags(tiny_model, tiny_data, folder, "nash_md", "--adam.lr", "1e30", *common), capsys)
    assert code == 2 and "round 1, step 2: the gradient norm is nan" in error and "--adam.lr" in error
    assert not (folder / "round_1/policy").exists()


def test_weights_that_are_not_finite_are_neither_written_nor_sampled_from(tiny_model, make_resources, tmp_path):
    from openrlhf_sgpo.finite import NotFiniteError, check_trained
    from openrlhf_sgpo.openrlhf import load_actor
    from openrlhf_sgpo.rollout import Sampling
    from openrlhf_sgpo.rollout.hf import HuggingFaceRollout
    from openrlhf_sgpo.training.policies import write_policy

    resources = make_resources()
    config, strategy, tokenizer = resources.config, resources.strategy, resources.chat.tokenizer
    actor = strategy.prepare(load_actor(str(tiny_model), config, strategy, trainable=False))
    finite = torch.zeros(2)
    check_trained(actor, finite, "round 1, after step 3", "bf16")
    with pytest.raises(NotFiniteError, match="round 1, after step 3: the policy's log-probabilities are not finite"):
        check_trained(actor, torch.tensor([0.0, -torch.inf]), "round 1, after step 3", "bf16")
    name, weight = next(iter(actor.named_parameters()))
    with torch.no_grad():
        weight[3, 5] = torch.inf
    # fp16 is named where it may be the cause, and only there.
    for dtype, advice in (("fp16", True), ("fp32", False)):
        with pytest.raises(NotFiniteError, match=f"round 1, after step 3: the weight {name} is not finite") as error:
            check_trained(actor, finite, "round 1, after step 3", dtype)
        assert ("--ds.param_dtype bf16" in str(error.value)) == advice
    with pytest.raises(NotFiniteError, match=f"policy is not written: its weight {name} is not finite"):
        write_policy(actor, tokenizer, tmp_path / "policy", strategy)
    assert not (tmp_path / "policy").exists()
    actor.model.destroy()

    damaged = str(with_one_nan(tiny_model, tmp_path / "damaged"))
    for temperature in (1.0, 0.0):
        rollout = HuggingFaceRollout(config, resources.chat, damaged)
        with pytest.raises(NotFiniteError, match=f"the next-token probabilities of the model {damaged} are not finite"):
            rollout.generate([(5, 6), (7, 8, 9)], Sampling(temperature, 1.0, 4, 0), "")
        rollout.close()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["model", "ref", "reward"])
def test_one_nan_among_the_weights_to_start_from(
    flag, tiny_model, tiny_data, tiny_reward_model, tmp_path, monkeypatch, capsys
):
    source, name = (
        (tiny_reward_model, "score.weight") if flag == "reward" else (tiny_model, "model.layers.0.mlp.up_proj.weight")
    )
    damaged, folder = with_one_nan(source, tmp_path / "damaged", name), tmp_path / "run"
    more = ["--ref.model_name_or_path", str(tiny_model), "--oracle", "reward_model"]
    more += ["--reward.model_name_or_path", str(tiny_reward_model), "--rounds.steps", "1", "--rounds.count", "1"]
    argv = play_flags(tiny_model, tiny_data, folder, "online_ipo", *more)
    argv[argv.index(f"--{flag}.model_name_or_path") + 1] = str(damaged)
    code, error = run(argv, capsys)
    assert code == 2 and str(damaged) in error and name in error and "not finite" in error
    assert not (folder / "round_1/policy").exists() and not stages(folder, 1)
    kept = [
        line
        for part in ("log_probs", "rewards")
        for path in (folder / part).glob("*")
        for line in path.read_text().split()
    ]
    assert not any("NaN" in line for line in kept)
    shutil.copy(source / "model.safetensors", damaged / "model.safetensors")
    assert main(["train", *argv, "--resume"]) == 0


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_norm_is_that_of_plain_torch(zero_stage, accumulation, tiny_model, make_resources):
    """Also of a second step, so that a norm that is left over from the first would show."""
    from transformers import AutoModelForCausalLM

    from openrlhf_sgpo.data.tokens import Group
    from openrlhf_sgpo.training.log_probs import response_log_probs
    from openrlhf_sgpo.training.policies import load_trained

    resources = make_resources(ds__zero_stage=zero_stage, train__micro_batch_size=2 // accumulation)
    config, strategy = resources.config, resources.strategy
    config.lr_scheduler, config.lr_warmup_ratio = "constant", 0.0
    actor, optimizer, scheduler = load_trained(str(tiny_model), config, strategy, 1e-3, 10, "test")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adam = torch.optim.AdamW(
        plain.parameters(),
        lr=1e-3,
        betas=tuple(config.adam.betas),
        eps=config.adam.eps,
        weight_decay=config.adam.weight_decay,
    )
    groups = [Group((5, 6, 7), ((8, 9, 2),)), Group((11, 12), ((13, 2),))]
    for _ in range(2):
        for part in [groups] if accumulation == 1 else [groups[:1], groups[1:]]:
            strategy.backward(-response_log_probs(actor, part, 0).mean(), actor, optimizer)
            strategy.optimizer_step(optimizer, actor, scheduler)
        loss = 0
        for group in groups:
            tokens = torch.tensor([group.prompt + group.responses[0]])
            log_probs = plain(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])
            loss -= log_probs[len(group.prompt) - 1 :].sum() / 2
        adam.zero_grad()
        loss.backward()
        expected = torch.cat([weight.grad.flatten() for weight in plain.parameters()]).norm().item()
        assert expected > 1
        assert strategy.get_grad_norm(actor) == pytest.approx(expected, rel=1e-4)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.max_norm)
        adam.step()
    actor.model.destroy()


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["step_2", ""])
def test_rounds_are_played_again_if_the_checkpoint_with_which_they_ended_is_damaged(
    whole, tiny_model, tiny_data, tmp_path, monkeypatch, capsys
):
    """Round 1 ends with step 3; step 2 lies within it."""
    folder, undisturbed = tmp_path / "run", tmp_path / "whole"
    argv = play_flags(tiny_model, tiny_data, folder, "toy_losses:FreshAnswers", "--ckpt.save_steps", "2")
    argv += ["--ckpt.max_num", "2"]
    monkeypatch.setenv("POISONED_STEP", "5")
    assert run(argv, capsys)[0] == 2
    monkeypatch.delenv("POISONED_STEP")
    assert sorted(path.name for path in folder.glob("checkpoints/step_*")) == ["step_2", "step_3", "step_4"]
    for path in folder.glob("checkpoints/step_*/*.pt"):
        if path.parent.name != whole:
            path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["train", *argv, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "step_4 is damaged" in said and "round 1 is played again" in said
    argv[argv.index(str(folder))] = str(undisturbed)
    assert main(["train", *argv]) == 0
    for name in ("round_1/plays.jsonl", "round_2/policy/model.safetensors", "round_2/plays.jsonl", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.slow
def test_two_ranks_stop_together(tiny_model, tiny_data, tmp_path):
    """A NaN that one rank alone meets: each has a half of every batch."""
    folder = tmp_path / "run"
    argv = pair_flags(tiny_model, tiny_data, folder)
    environment = {"POISONED_STEP": "3", "POISONED_RANK": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = launch(["bash", str(SCRIPT), "--num_gpus", "2", *argv], **environment)
    assert done.returncode != 0
    assert "round 0, step 3: the loss is nan" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "round_0/policy").exists() and "train" not in stages(folder, 0)
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2]


def test_json_has_no_nan():
    assert json_text({"figures": [1.5, None], "text": "é"}) == '{"figures": [1.5, null], "text": "é"}'
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(
            ValueError, match=rf"the value\['figures'\]\[1\]\['x'\] is {value}, which JSON does not have"
        ):
            json_text({"figures": [1.0, {"x": value}]})
        with pytest.raises(ValueError, match="which is not valid JSON"):
            parse_json(json.dumps([value]))


def test_a_metric_without_a_value_is_left_out(make_resources, tmp_path):
    metrics = Metrics(tmp_path, make_resources().config, {}, writes=True)
    metrics.log("round 1", 1, {"train/loss": 0.5, "train/grad_norm": None})
    metrics.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"stage": "round 1", "step": 1, "train/loss": 0.5}]
