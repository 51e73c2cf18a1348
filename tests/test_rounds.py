"""Whole runs through the command line, on the tiny model."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from statistics import mean

import pytest
import yaml
from running import SCRIPT, arguments, free_port, launch, losses, read_jsonl, train

from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.run_folder import RunFolder


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
        assert list(stages) == ["generate", "pairs", "train", "evaluate"][number == 0 :]
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
    assert "\n\nHeld-out accuracy " in table and "The 2 rounds after it " in table, "the verdict stands under the table"


@pytest.mark.slow
def test_a_run_says_where_it_is_and_nothing_of_other_packages(run):
    """What they say is in log.txt, from the first import on; and the run ends with what can be done next."""
    folder, process = run
    assert process.stderr == "" and "warning" not in process.stdout.lower()
    assert (folder / "log.txt").read_text().startswith("== process")
    stages = [line for line in process.stdout.splitlines() if line.startswith("stage ")]
    assert [line.split(",")[0] for line in stages] == [f"stage {number} of 15" for number in range(1, 16)]
    # Engines start while the seed stage trains, so that the start is evaluated after it.
    assert stages[3] == "stage 4 of 15, start: evaluate"
    assert stages[6] == "stage 7 of 15, round 1: annotate" and stages[14].endswith(
        "round 2: evaluate, less than a minute left"
    )
    policy, report, *following = process.stdout.splitlines()[-4:]
    assert policy == f"policy: {folder / 'round_2' / 'policy'}" and report == f"report: {folder / 'report.html'}"
    assert following[0].startswith(f"next:   openrlhf-sgpo evaluate --tasks ifeval --models {folder} start=")
    assert following[1].split() == ["vllm", "serve", str(folder / "round_2" / "policy")]


@pytest.mark.slow
def test_scoring_is_not_the_follower(run):
    """The ledger has both; the seed stage, of DPO, has no follower."""
    folder, _ = run
    stages = json.loads((folder / "ledger.json").read_text())["stages"]
    for number in range(3):
        assert stages[f"round_{number}/score"]["tokens_scored"] >= 0
        assert (f"round_{number}/follower" in stages) == (number > 0)
    assert stages["round_0/score"]["tokens_scored"] > 0


@pytest.mark.slow
def test_dpo_samples_for_its_evaluation(tiny_model, tiny_data, tiny_reward_model, tmp_path):
    """Without rounds: lengths, divergence, probe and win rate as in a run with rounds, for the prompts that are asked for."""
    more = [
        *("--eval.max_prompts", "5", "--rollout.engine", "hf", "--rollout.max_new_tokens", "8"),
        *("--oracle", "reward_model", "--reward.model_name_or_path", str(tiny_reward_model), "--train.max_steps", "4"),
    ]
    process = train(*arguments(tiny_model, tiny_data, tmp_path, *more, algo="dpo"))
    assert process.returncode == 0, process.stderr[-3000:]
    for name in ("initial", "round_0"):
        row = json.loads((tmp_path / name / "evaluation.json").read_text())
        samples = read_jsonl(tmp_path / name / "samples.jsonl")
        assert len(samples) == 5 and row["response_length"] == mean(sample["tokens"] for sample in samples)
        assert row["kl"] == pytest.approx(mean(sample["kl"] for sample in samples), abs=1e-12)
        assert ("win_rate" in row) == (name == "round_0") and "probe" in row
    trained = json.loads((tmp_path / "round_0/manifest.json").read_text())["stages"]["train"]
    assert (trained["steps"], trained["epochs"]) == (4, round(16 / 24, 3))
    assert "24 pairs, 4 optimiser steps" in process.stdout


@pytest.mark.slow
def test_pairs_are_ranked_by_implicit_reward_and_margins_are_its_differences(run):
    folder, _ = run
    pairs = read_jsonl(folder / "round_1/pairs.jsonl")
    margins = json.loads((folder / "round_1/worst_case.json").read_text())["margins"]
    differences = [pair["scores"]["chosen"] - pair["scores"]["rejected"] for pair in pairs]
    assert margins == pytest.approx(differences, abs=1e-4)
    assert min(margins) >= 0


@pytest.mark.slow
def test_a_certificate_has_the_margins_after_the_round_and_v_before_and_after(run, tiny_model):
    """The margins are those that transformers alone computes from the policy's folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from openrlhf_sgpo.data.records import load_run_pairs
    from openrlhf_sgpo.data.tokens import ChatFormat
    from openrlhf_sgpo.dro import solve_worst_case

    folder, _ = run
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model), 128)
    certificate = json.loads((folder / "round_1/worst_case.json").read_text())
    groups = [chat.pair(pair) for pair in load_run_pairs(str(folder / "round_1/pairs.jsonl"))]
    after = dict(zip(certificate["after"]["pairs"], certificate["after"]["margins"], strict=True))
    assert set(after) <= set(range(len(groups))) and len(after) >= 4

    def log_ratios(model):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        sums = []
        for pair in after:
            prompt = groups[pair].prompt
            for response in groups[pair].responses:
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
                sums.append(float(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()))
        return torch.tensor(sums).view(-1, 2)

    ratios = log_ratios(folder / "round_1/policy") - log_ratios(tiny_model)
    assert list(after.values()) == pytest.approx((0.1 * (ratios[:, 0] - ratios[:, 1])).tolist(), abs=1e-4)
    for name, margins in (
        ("value_before", [certificate["margins"][pair] for pair in after]),
        ("value_after", list(after.values())),
    ):
        worst = solve_worst_case(
            torch.tensor(margins, dtype=torch.float64), certificate["radius"], window=tuple(certificate["window"])
        )
        assert certificate[name] == pytest.approx(worst.value, abs=1e-12)
    assert certificate["value_after"] < certificate["value_before"]

    # On the held-out pairs the policy stands beside DPO on the human pairs, in the same support and at the same radius.
    figures = json.loads((folder / "round_1/evaluation.json").read_text())["worst_case"]
    assert figures["radius"] == certificate["radius"]
    for name, place in (("value", "round_1"), ("dpo_value", "round_0")):
        held_out = torch.tensor([row["margin"] for row in read_jsonl(folder / place / "held_out.jsonl")]).double()
        worst = solve_worst_case(held_out, figures["radius"], window=tuple(figures["window"]))
        assert figures[name] == pytest.approx(worst.value, abs=1e-6)

    # The model card says the same in words, with what is saved.
    card = " ".join((folder / "round_1/policy/README.md").read_text().split())
    stated = re.findall(r"is (\S+) under this policy and (\S+) under DPO, (\S+) \S+ (\S+) (less|more)", card)
    for (policy, dpo, saved, half, sign), name in zip(stated, ("loss", "value"), strict=True):
        assert (policy, dpo) == (f"{figures[name]:.4f}", f"{figures[f'dpo_{name}']:.4f}")
        difference = figures[f"dpo_{name}"] - figures[name]
        assert float(saved) == pytest.approx(abs(difference), abs=6e-5) and sign == (
            "less" if difference >= 0 else "more"
        )
        assert float(half) == pytest.approx(1.96 * figures[f"{name}_saved_error"], abs=6e-5)
    assert f"by {figures['radius']:g} on average" in card
    assert "Worst-case loss" not in (folder / "round_0/policy/README.md").read_text()


@pytest.mark.slow
def test_what_an_engine_drew_is_what_is_scored_and_trained(run, tiny_model):
    """Token by token: the toy policy draws bytes that are no text, which another tokenisation of the text would change."""
    from transformers import AutoTokenizer

    from openrlhf_sgpo.data.tokens import ChatFormat
    from openrlhf_sgpo.training.scoring import tokens_key

    folder, _ = run
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model), 128)
    responses = {
        row["id"]: [answer["token_ids"] for answer in row["responses"]]
        for row in read_jsonl(folder / "round_1/responses.jsonl")
    }
    scored = [set().union(*map(dict.keys, read_scores(path))) for path in (folder / "log_probs").iterdir()]
    others = 0
    for pair in read_jsonl(folder / "round_1/pairs.jsonl"):
        prompt = chat.prompt(pair["prompt"])
        for side in ("chosen", "rejected"):
            drawn = pair[f"{side}_token_ids"]
            assert drawn in responses[pair["id"].removeprefix("round_1/")]
            key = tokens_key(prompt, tuple(drawn))
            assert sum(key in keys for keys in scored) == 2, "under the policy and under its reference"
            text, truncated = pair[side][0]["content"], pair[f"{side}_truncated"]
            others += tuple(drawn) != chat.response(text, truncated, 100)
    assert others > 0, "otherwise this proves nothing"


def read_scores(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


@pytest.mark.slow
def test_evaluations_say_what_their_files_say(run):
    """Row by row: accuracy and margin from held_out.jsonl; length, truncation and divergence from samples.jsonl."""
    folder, process = run
    rows = {}
    for name in ("initial", "round_0", "round_1", "round_2"):
        row = rows[name] = json.loads((folder / name / "evaluation.json").read_text())
        held_out, samples = (read_jsonl(folder / name / f"{kind}.jsonl") for kind in ("held_out", "samples"))
        assert (
            [row["id"] for row in held_out] == [row["id"] for row in samples] == [f"pair-{i}" for i in range(100, 108)]
        )
        margins = [pair["margin"] for pair in held_out]
        assert row["pairs"] == 8 and row["margin"] == pytest.approx(mean(margins), abs=1e-12)
        assert row["accuracy"] == mean((margin > 0) + 0.5 * (margin == 0) for margin in margins)
        assert row["response_length"] == mean(sample["tokens"] for sample in samples) <= 8
        assert row["truncated"] == mean(sample["truncated"] for sample in samples)
        assert row["kl"] == pytest.approx(mean(sample["kl"] for sample in samples), abs=1e-12)
        assert all(sample["kl"] >= 0 for sample in samples) and row["kl_error"] >= 0
    assert rows["initial"]["kl"] == rows["initial"]["margin"] == 0 and rows["initial"]["accuracy"] == 0.5
    # Each stage trains from where the last one ended, away from the initial reference.
    assert all(rows[name]["kl"] > 1e-4 for name in ("round_0", "round_1", "round_2"))
    assert len({row["kl"] for row in rows.values()}) == 4
    header, _, *lines = process.stdout.split("  accuracy")[-1].splitlines()
    assert header.split()[:5] == ["margin", "kl", "length", "wins", "labels"]
    table = {line[:7].strip(): re.split(" {2,}", line[7:].strip()) for line in lines[:4]}
    for name, row in zip(("start", "round 0", "round 1", "round 2"), rows.values(), strict=True):
        figures = [f"{row['accuracy']:.3f}", f"{row['margin']:.4f}", f"{row['kl']:.2f}"]
        assert [cell.partition(" ")[0] for cell in table[name][:3]] == figures
        if name != "start":  # which is the reference itself
            assert f"{1.96 * row['accuracy_error']:.3f}" in table[name][0] and row["accuracy_error"] > 0
        assert table[name][4:6] == ["-", "-"], "the judge changes with every round, and no prompt has human labels"


@pytest.mark.slow
def test_the_data_report_is_kept_and_printed(run, tiny_data):
    folder, process = run
    reports = json.loads((folder / "data_report.json").read_text())
    flags = {"--data.dataset": "pairs", "--eval.dataset": "held_out", "--data.prompt_dataset": "prompts"}
    assert [report["name"] for report in reports] == [f"{flag} {tiny_data[kind]}" for flag, kind in flags.items()]
    assert [(report["rows"], report["kept"]) for report in reports] == [(24, 24), (8, 8), (24, 24)]
    for report in reports:
        assert f"{report['name']}: {report['rows']} {report['kind']}, {report['kept']} kept" in process.stdout


@pytest.mark.slow
def test_pair_files_load_in_trl_form(run):
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(run[0] / "round_1/pairs.jsonl"), split="train")
    assert rows[0]["prompt"][-1]["role"] == "user"
    assert rows[0]["chosen"][0]["role"] == rows[0]["rejected"][0]["role"] == "assistant"


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_needs_resume_and_then_repeats_nothing(run, tiny_model, tiny_data, capsys):
    folder, _ = run
    argv = arguments(tiny_model, tiny_data, folder)
    assert main(["train", *argv]) == 2
    assert "add --resume" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert main(["train", *argv, "--resume", "--sgpo.radius", "0.02"]) == 2
    assert "--sgpo.radius: was 0.01, now 0.02" in capsys.readouterr().err
    resumed = train(*argv, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert (folder / "table.txt").read_text() in resumed.stdout


@pytest.mark.slow
def test_resume_while_the_run_folder_is_in_use(run, tiny_model, tiny_data, capsys):
    folder, _ = run
    holder = RunFolder(str(folder))
    holder.lock()
    assert main(["train", *arguments(tiny_model, tiny_data, folder, "--resume")]) == 2
    assert f"--ckpt.output_dir {folder} is in use by process {os.getpid()} on " in capsys.readouterr().err
    holder._lock.close()


@pytest.mark.slow
def test_iterative_dpo_with_a_reward_model(tiny_model, tiny_reward_model, tiny_data, tmp_path):
    """Every label is the reward model's; for 18 prompts with human labels the run says how many it shares."""
    from reward_models import conversation, rewards_alone

    prompts = read_jsonl(tiny_data["prompts"])
    for index, row in enumerate(prompts[:18]):
        row |= {"chosen": "yes" + "!" * index, "rejected": "no" + " no" * (index % 5)}
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    folder = tmp_path / "run"
    argv = arguments(tiny_model, tiny_data | {"prompts": path}, folder, algo="iter_dpo")
    argv[argv.index("--rounds.count") + 1] = "1"
    process = train(*argv, "--reward.model_name_or_path", str(tiny_reward_model))
    assert process.returncode == 0, process.stderr[-3000:]

    def judged(rows):
        """Rewards of rows (prompt, answer, whether the answer ends) by OpenRLHF's class, in twos."""
        tokens = [conversation(tiny_reward_model, *row) for row in rows]
        rewards = rewards_alone(tiny_reward_model, tokens)
        return list(zip(rewards[::2], rewards[1::2], strict=True))

    sides = ("chosen", "rejected")
    pairs = read_jsonl(folder / "round_1/pairs.jsonl")
    assert len(pairs) > 12 and {pair["source"] for pair in pairs} == {"reward_model"}
    rewards = judged(
        (pair["prompt"][0]["content"], pair[side][0]["content"], not pair[f"{side}_truncated"])
        for pair in pairs
        for side in sides
    )
    for pair, (chosen, rejected) in zip(pairs, rewards, strict=True):
        assert chosen > rejected
        assert pair["scores"] == pytest.approx({"chosen": chosen, "rejected": rejected}, abs=1e-4)

    shared = mean(
        chosen > rejected for chosen, rejected in judged((row["prompt"], row[s]) for row in prompts[:18] for s in sides)
    )
    assert 0 < shared < 1, "all or none would prove little"
    facts = json.loads((folder / "round_1/manifest.json").read_text())["stages"]
    assert facts["pairs"]["oracle"] == "reward_model" and "judge_reference" not in facts["pairs"]
    assert facts["pairs"]["gold_pairs"] == 18 and facts["pairs"]["label_accuracy"] == pytest.approx(shared, abs=1e-12)
    assert facts["train"]["loss_reference"] == "round_0/policy"
    table = [re.split(" {2,}", line.strip()) for line in (folder / "table.txt").read_text().splitlines()]
    (header,) = (cells for cells in table if cells[0] == "accuracy")
    cell = {row[0]: dict(zip(header, row[1:], strict=False)) for row in table}
    assert cell["round 1"]["labels"] == f"{shared:.3f}" and cell["round 0"]["labels"] == "-"
    # The reward model also says how it likes the policy's answers, against the start's.
    start, now = (read_jsonl(folder / name / "samples.jsonl") for name in ("initial", "round_1"))
    answers = [
        (answer["prompt"][0]["content"], answer["text"], not answer["truncated"])
        for both in zip(now, start, strict=True)
        for answer in both
    ]
    wins = mean(1 / (1 + math.exp(start_reward - reward)) for reward, start_reward in judged(answers))
    evaluation = json.loads((folder / "round_1/evaluation.json").read_text())
    assert evaluation["win_rate"] == pytest.approx(wins, abs=1e-4) and cell["round 1"]["wins"].startswith(
        f"{evaluation['win_rate']:.3f}"
    )
    assert "judge reference" not in process.stdout


@pytest.mark.slow
def test_spa_smooths_in_two_rounds(tiny_model, tiny_data, tmp_path):
    folder = tmp_path / "run"
    more = ("--spa.noisy_share", "0.5", "--spa.warmup_share", "0", "--spa.window", "4", "--lr_warmup_ratio", "0")
    process = train(*arguments(tiny_model, tiny_data, folder, *more, algo="spa"))
    assert process.returncode == 0, process.stderr[-3000:]
    rows = read_jsonl(folder / "metrics.jsonl")
    assert not any("spa" in key for row in rows if row["stage"] == "round 0" for key in row)
    for number in (1, 2):
        manifest = json.loads((folder / f"round_{number}/manifest.json").read_text())["stages"]
        assert manifest["train"]["loss_reference"] == f"round_{number - 1}/policy"
        steps = [row for row in rows if row["stage"] == f"round {number}"]
        assert len(steps) >= 2
        assert all({"train/spa/noisy_share", "train/spa/threshold"} <= row.keys() for row in steps)
        # The first step has no earlier margins to compare with, and its own are 0: the policy is the reference.
        assert steps[0]["train/spa/noisy_share"] == 0
        assert steps[0]["train/spa/threshold"] == pytest.approx(0, abs=1e-4)
        assert abs(steps[1]["train/spa/threshold"]) > 1e-3, "by now the policy has left the reference"
        assert steps[0]["train/loss"] == pytest.approx(0.693147, abs=1e-4)
    assert not list(folder.glob("round_*/worst_case.json"))


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
    assert "--sgpo.radius 50.0 is enough to move all" in process.stderr


@pytest.mark.slow
def test_two_ranks_through_deepspeed_train_as_one_through_bash(tiny_model, tiny_data, tmp_path):
    """The same file is a shell script and a deepspeed target; two ranks give the losses of one, within rounding.

    With ZeRO-3 and LoRA, whose saving is collective while rank 0 alone gets the weights.
    """
    extra = ("--ds.lora.rank", "4", "--sgpo.refresh_steps", "1")
    ranks = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), str(SCRIPT)]
    argv = arguments(tiny_model, tiny_data, tmp_path / "two", *extra)
    argv[argv.index("--ds.zero_stage") + 1] = "3"
    two = launch([*ranks, *argv])
    assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-3000:]
    process = launch(
        ["bash", str(SCRIPT), *arguments(tiny_model, tiny_data, tmp_path / "one", *extra), "--num_gpus", "1"],
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    assert len(losses(tmp_path / "two")) == len(losses(tmp_path / "one")) > 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=5e-4)
    for name in ("round_1/pairs.jsonl", "round_2/pairs.jsonl"):
        assert len(read_jsonl(tmp_path / "two" / name)) == len(read_jsonl(tmp_path / "one" / name))
    assert (tmp_path / "two/round_2/policy/adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_dpo_is_one_stage_on_the_human_pairs(tiny_model, tiny_data, tmp_path):
    process = train(*arguments(tiny_model, tiny_data, tmp_path / "run", algo="dpo"))
    assert process.returncode == 0, process.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "run").glob("round_*")) == ["round_0"]
    assert len(losses(tmp_path / "run")) == 24 // 4
    # Without rounds nothing samples: what only they would read is refused. (test_fork.py has --algo dpo with a round.)
    evaluation = json.loads((tmp_path / "run/round_0/evaluation.json").read_text())
    assert evaluation["pairs"] == 8 and not {"kl", "probe", "response_length"} & evaluation.keys()


@pytest.mark.slow
def test_columns_of_soft_labels_and_weights_reach_the_loss(tiny_model, tiny_data, tmp_path):
    """``chosen_probability`` .9 under DPO is cDPO at .1. ``weight`` .5 halves the losses; Adam takes the same steps."""
    labels = {"chosen_probability": 0.9, "weight": 0.5}
    marked = tmp_path / "pairs.jsonl"
    marked.write_text("".join(json.dumps(row | labels) + "\n" for row in read_jsonl(tiny_data["pairs"])))
    for folder, pairs, algo in (("soft", marked, "dpo"), ("smoothed", tiny_data["pairs"], "cdpo")):
        argv = arguments(tiny_model, tiny_data | {"pairs": pairs}, tmp_path / folder, algo="dpo")
        process = train("--algo", algo, *argv[2:], "--rounds.count", "0", "--max_norm", "0")
        assert process.returncode == 0, process.stderr[-3000:]
    expected = losses(tmp_path / "smoothed")
    assert max(abs(loss - expected[0]) for loss in expected) > 0.01
    assert [2 * loss for loss in losses(tmp_path / "soft")] == pytest.approx(expected, abs=1e-4)
    assert all(row.items() >= labels.items() for row in read_jsonl(tmp_path / "soft/round_0/pairs.jsonl"))


@pytest.mark.parametrize("flag", ["--rollout.temperature", "--rounds.judge_reference", "--seed.lr"])
def test_what_a_run_without_rounds_would_not_read_is_refused(tiny_model, tiny_data, tmp_path, capsys, flag):
    value = {"--rounds.judge_reference": "previous"}.get(flag, "1")
    assert main(["train", *arguments(tiny_model, tiny_data, tmp_path / "run", flag, value, algo="dpo")]) == 2
    message = capsys.readouterr().err
    samples = "samples only for --eval.dataset and --eval.max_prompts"
    reason = samples if flag.startswith("--rollout.") else "has no rounds"
    assert f"{flag}: --algo dpo with --rounds.count 0 {reason} and would not read it" in message
    assert not (tmp_path / "run").exists()


def test_exceeded_data_limits_stop_a_run_before_a_model_is_loaded(tiny_model, tiny_data, tmp_path, capsys):
    """The model's folder has no weights, so that loading it would be another error."""
    light = tmp_path / "light"
    shutil.copytree(tiny_model, light, ignore=shutil.ignore_patterns("*.safetensors"))
    rows = read_jsonl(tiny_data["pairs"])
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row | {"rejected": row["chosen"]}) + "\n" for row in rows[:3]))
    with open(pairs, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[3:])
    argv = arguments(light, tiny_data | {"pairs": pairs}, tmp_path / "run")
    assert main(["train", *argv]) == 2
    captured = capsys.readouterr()
    assert f"--data.dataset {pairs}: identical 3 of 24 (12.5%, limit 5.0%), such as pair-0, pair-1" in captured.err
    assert "--data.limits.identical 0.125 accepts this" in captured.err
    assert f"--data.dataset {pairs}: 24 pairs, 21 kept" in captured.out  # the report comes first
    assert not (tmp_path / "run").exists()
    # With the flag that the message names, the model is what stops it.
    assert main(["train", *argv, "--data.limits.identical", "0.125"]) == 1
    assert "safetensors" in capsys.readouterr().err


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
        (["--sgpo.radius", "-1"], "--sgpo.radius: -1.0 is out of range, use at least 0"),
        (["--model.model_name_or_path", "no/such model"], "--model.model_name_or_path no/such model cannot be loaded"),
        (["--data.max_len", "4096"], "exceeds the 2048 positions of --model"),
        (["--rounds.prompts", "100", "100"], "holds 24 usable prompts"),
    ],
)
def test_bad_settings_are_named_before_anything_expensive(tiny_model, tiny_data, tmp_path, capsys, more, message):
    argv = arguments(tiny_model, tiny_data, tmp_path / "run")
    if more[0] in argv:
        del argv[argv.index(more[0]) : argv.index(more[0]) + 2]
    assert main(["train", *argv, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_broken_line_is_named(tiny_model, tiny_data, tmp_path, capsys):
    broken = tmp_path / "pairs.jsonl"
    broken.write_text(tiny_data["pairs"].read_text() + '{"prompt": "a", "chosen": "b"}\nnot json\n')
    assert main(["train", *arguments(tiny_model, tiny_data | {"pairs": broken}, tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert f"{broken}, line 25: missing column rejected" in message
    assert f"{broken}, line 26: not JSON" in message
