"""The command: what it prints, refuses and proposes; times that follow from a ledger."""

from __future__ import annotations

import json

import pytest

from openrlhf_sgpo import flags, run_settings
from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.config import LoraSettings, ModelSettings
from openrlhf_sgpo.estimate.command import Estimate
from openrlhf_sgpo.estimate.devices import GIB
from openrlhf_sgpo.estimate.duration import SAMPLE, SCORE, TRAIN, measured, passes, whole
from openrlhf_sgpo.estimate.fitting import CHANGES, changed, combinations, flags_of, useful_changes
from openrlhf_sgpo.estimate.settings import load
from openrlhf_sgpo.estimate.shape import model_shape
from openrlhf_sgpo.integrity import signed
from openrlhf_sgpo.ledger import write_ledger

CHECKPOINTING = "--model.gradient_checkpointing_enable"


def recipe(model: str, *argv: str) -> list[str]:
    more = [] if any(word.startswith("--estimate.from_run") for word in argv) else ["--estimate.gpu", "H100-80GB"]
    return [
        *("--config", "zephyr-7b.paper", "--model.model_name_or_path", model),
        *("--estimate.prompts", "60000", "--estimate.pairs", "60000", *more, *argv),
    ]


def seconds(estimate: Estimate) -> dict[str, float]:
    return {f"{stage}: {kind}": time for stage, kind, _, time in estimate.times()[0]}


def test_the_proposal_is_the_first_that_fits(published):
    """6.5 billion parameters on two GPUs of 24 GiB: what is proposed fits, and nothing before it in the order does."""
    argv = ["--algo", "dpo", "--estimate.gpu", "RTX4090-24GB", "--estimate.gpus", "2", "--estimate.pairs", "2000"]
    argv += ["--model.model_name_or_path", published["wide"], "--data.dataset", "owner/pairs"]
    estimate = Estimate(load(argv))
    assert estimate.problems(estimate.memory)
    chosen, memory = estimate.fitting()
    assert 1.1 * memory.peak() <= 24 * GIB
    order = list(combinations(useful_changes(estimate.memory)))
    for combination in order[: order.index(chosen)]:
        assert estimate.problems(estimate._memory(changed(estimate.config, *combination)), spare=0.1)
    assert f"fits with {flags_of(*chosen)}" in " ".join(estimate.text().split())


def test_an_engine_without_room_gets_a_larger_share(published):
    """Half of 24 GiB does not hold 6.5 billion parameters in half precision; how long sampling takes is then not known."""
    argv = ["--config", "one-gpu", "--model.model_name_or_path", published["wide"], "--estimate.gpu", "RTX4090-24GB"]
    estimate = Estimate(load([*argv, "--vllm.gpu_memory_utilization", "0.5"]))
    (problem,) = estimate.problems(estimate.memory)
    assert "raise --vllm.gpu_memory_utilization" in problem
    assert flags_of(*estimate.fitting()[0]) == "--vllm.gpu_memory_utilization 0.9"
    assert seconds(estimate)["round 1: sample"] is None
    mended = Estimate(load([*argv, "--vllm.gpu_memory_utilization", "0.9"]))
    assert mended.problems(mended.memory) == [] and seconds(mended)["round 1: sample"] > 0


def test_combinations_come_in_the_order_of_their_costs():
    first, second, third = changes = list(CHANGES[:3])
    assert list(combinations(changes)) == [
        *([first], [second], [first, second], [third], [first, third], [second, third], [first, second, third])
    ]


def test_settings_that_two_changes_make_are_printed_once():
    """DeepSpeed offloads nothing at stage 0."""
    shards, offload = CHANGES[4], CHANGES[8]
    assert flags_of(shards, offload) == "--ds.zero_stage 2 --ds.adam_offload true"
    assert flags_of(CHANGES[6], offload) == "--ds.zero_stage 3 --ds.adam_offload true"


def test_a_flag_that_is_proposed_is_one_of_the_train_command(tiny_model):
    for change in CHANGES:
        load(recipe(str(tiny_model), *flags_of(change).split()))


def test_time_is_shared_and_checkpointing_costs_a_third(tiny_model):
    model = str(tiny_model)
    times = {
        (gpus, checkpointing): seconds(
            Estimate(load(recipe(model, *("--estimate.gpus", str(gpus)), *(CHECKPOINTING, checkpointing))))
        )
        for gpus in (1, 4)
        for checkpointing in ("true", "false")
    }
    for stage in ("seed: train", "round 3: train", "round 3: score"):
        assert times[1, "false"][stage] == pytest.approx(4 * times[4, "false"][stage])
    assert times[4, "true"]["seed: train"] == pytest.approx(4 / 3 * times[4, "false"]["seed: train"])
    # 2,000 pairs, 3 epochs, 200 + 2 * 250 tokens, 6 operations for each parameter; the embedding is the head.
    multiplied = model_shape(ModelSettings(model), "bf16", LoraSettings()).parameters
    assert times[1, "false"]["seed: train"] == pytest.approx(6 * multiplied * 2000 * 3 * 700 / (989e12 * 0.35))


def test_speeds_of_a_ledger_give_its_times_back(tiny_model, tmp_path):
    model = str(tiny_model)
    loads = {f"{stage}: {kind}": tokens for stage, kind, tokens, _ in Estimate(load(recipe(model))).times()[0]}
    config, options = run_settings.load(
        ["--config", "zephyr-7b.paper", "--model.model_name_or_path", model, "--ckpt.output_dir", str(tmp_path)]
    )
    with pytest.raises(ValueError, match="not a run folder"):
        measured(str(tmp_path))
    (tmp_path / "resolved_config.yaml").write_text(signed(flags.dump({"": config, config.algo: options})))
    with pytest.raises(ValueError, match="no finished training stage"):
        measured(str(tmp_path))
    stages = {
        "round_0/train": {"seconds": 100.0, "tokens_trained": loads["seed: train"]},
        "round_1/annotate": {"seconds": 50.0, "tokens_scored": loads["round 1: score"]},
        "round_1/generate": {"seconds": 25.0, "tokens_generated": loads["round 1: sample"]},
    }
    write_ledger(tmp_path / "ledger.json", stages)
    times = seconds(Estimate(load(recipe(model, "--estimate.from_run", str(tmp_path), "--estimate.gpus", "1"))))
    assert times["seed: train"] == pytest.approx(100)
    assert times["round 1: score"] == pytest.approx(50)
    assert times["round 1: sample"] == pytest.approx(25)


def test_log_probabilities_of_the_engine_save_the_policy_s_scoring(tiny_model):
    model = str(tiny_model)
    plain, reused = (
        {f"{stage}: {kind}": tokens for stage, kind, tokens, _ in Estimate(load(recipe(model, *flags))).times()[0]}
        for flags in ((), ("--rollout.reuse_log_probs", "true"))
    )
    assert {name for name in plain if plain[name] != reused[name]} == {f"round {number}: score" for number in (1, 2, 3)}
    assert reused["round 1: score"] == plain["round 1: score"] / 2


def test_engines_one_step_behind_sample_while_the_policy_trains():
    rows = [
        *[("round 1", SAMPLE, 1.0, 5.0), ("round 1", SCORE, 1.0, 1.0), ("round 1", TRAIN, 1.0, 2.0)],
        *[("round 2", SAMPLE, 1.0, 5.0), ("round 2", SCORE, 1.0, 3.0), ("round 2", TRAIN, 1.0, 4.0)],
    ]
    assert whole(rows, overlap=False) == 20
    assert whole(rows, overlap=True) == 5 + 7
    assert whole([*rows, ("round 3", SAMPLE, 1.0, None)], overlap=True) is None


def test_a_model_that_is_not_packed_is_estimated_padded(tmp_path):
    """A window of 4,096 tokens is shorter than --data.max_len: another layout cannot be proposed."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "mistral", "vocab_size": 256, "sliding_window": 4096, "num_key_value_heads": 2, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = str(tmp_path)
    estimate = Estimate(load(recipe(model, "--data.max_len", "8192")))
    assert "sliding window of 4096 tokens" in estimate.text()
    assert not estimate.memory.packed
    assert "--train.layout auto" not in {flags_of(change) for change, _ in estimate.changes()}
    chosen = Estimate(load(recipe(model, "--train.layout", "padded")))
    assert "--train.layout auto" in {flags_of(change) for change, _ in chosen.changes()}


def test_operations_of_a_token(tiny_model):
    whole, adapters = (model_shape(ModelSettings(str(tiny_model)), "bf16", LoraSettings(rank=rank)) for rank in (0, 8))
    assert [passes("train", whole, False), passes("train", whole, True), passes("score", whole, True)] == [6, 8, 2]
    assert [passes("train", adapters, False), passes("train", adapters, True)] == [4, 6]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--estimate.gpu", "H1000"], "--estimate.gpu: H1000 is unknown, choose one of A10G-24GB"),
        (["--ds.attn_implementation", "eager"], "for which estimate has no formula"),
        (["--estimate.utilisation", "2"], "--estimate.utilisation: 2.0 is out of range"),
        (["--estimate.gpu", "L4-24GB", "--estimate.from_run", "runs/x"], "--estimate.gpu names others"),
    ],
)
def test_what_cannot_be_honoured_is_refused(argv, message, published, capsys):
    words = [word for word in recipe(published["Mistral-7B-v0.1"]) if word not in ("--estimate.gpu", "H100-80GB")]
    assert main(["estimate", *words, *argv]) == 2
    assert message in capsys.readouterr().err


def test_sizes_that_cannot_be_counted_are_asked_for(published, capsys):
    argv = ["--config", "zephyr-7b.paper", "--seed.size", "0", "--rounds.prompts", ""]
    assert main(["estimate", *argv, "--model.model_name_or_path", published["Mistral-7B-v0.1"]]) == 2
    error = capsys.readouterr().err
    assert "--estimate.pairs: missing" in error and "--estimate.prompts: missing" in error


def test_text_and_json_of_a_small_run(tiny_model, tiny_data, capsys):
    argv = ["--model.model_name_or_path", str(tiny_model), "--data.dataset", str(tiny_data["pairs"])]
    argv += ["--data.prompt_dataset", str(tiny_data["prompts"]), "--rounds.count", "2", "--train.batch_size", "8"]
    assert main(["estimate", *argv, "--estimate.gpu", "L4-24GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sgpo on 1 x L4-24GB, an estimate: nothing was run"
    assert "fits into 22.5 GiB" in lines
    assert max(map(len, lines[2:])) <= 80  # the second has the model's path
    assert main(["estimate", *argv, "--estimate.json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["device"]["on_gpu"] in (True, False) and result["ranks"] >= 1
    assert {"backward", "step", "scoring", "sampling"} == result["memory"].keys()
    # 24 pairs in the seed stage, then 12 prompts with two answers in each round.
    tokens = {(row["stage"], row["kind"]): row["tokens"] for row in result["time"]}
    assert tokens["seed", "train"] == 24 * (result["tokens"]["prompt"] + 2 * result["tokens"]["response"])
    assert tokens["round 2", "sample"] == 24 * result["tokens"]["response"]
