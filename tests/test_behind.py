"""--rollout.steps_behind 1: engines sample while the policy trains, with the weights of one step ago."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import TESTS, check_dead, contents, forked, killed, read_jsonl, undisturbed
from test_plays import flags

from openrlhf_sgpo import run_settings
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.ledger import Stopwatch

BEHIND = ("--rollout.steps_behind", "1", "--rollout.engine", "vllm")


def argv(tiny_model, tiny_data, folder: Path) -> list[str]:
    """Two rounds of four steps with a checkpoint in the middle of each."""
    more = ("--rounds.steps", "4", "--ckpt.save_steps", "2", "--adam.lr", "1e-2", "--lr_scheduler", "constant", *BEHIND)
    return ["train", *flags(tiny_model, tiny_data, folder, "slhf", *more, "--eval.max_prompts", "2")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_goes_on_with_the_same_answers(tiny_model, tiny_data, tmp_path):
    """Killed after the third step of a round: the answers of the third were asked of the weights of the first, which are gone,
    and are in the checkpoint of the second."""
    whole, place = tmp_path / "whole", tmp_path / "killed"
    expected, writes = undisturbed(whole, lambda folder: argv(tiny_model, tiny_data, folder))
    third = [
        write for write, line in enumerate(writes, start=1) if line.split()[:2] == ["write", "round_2/plays.jsonl"]
    ][9]
    check_dead(killed(third, place, *argv(tiny_model, tiny_data, place)), place, expected, writes[third - 1])
    assert {path.name for path in (place / "checkpoints").glob("step_*")} == {"step_4", "step_6"}
    process = forked(None, *argv(tiny_model, tiny_data, place), "--resume", PYTHONPATH=TESTS)
    assert process.returncode == 0, process.stderr[-3000:]
    # The engine's log-probabilities are not those of another process to the last digit.
    exact = {name for name in expected if "metrics" not in name and "manifest" not in name}
    resumed = contents(place)
    assert {name for name in exact if resumed[name] != expected[name]} == set() and resumed.keys() == expected.keys()
    for row, other in zip(*(read_jsonl(folder / "metrics.jsonl") for folder in (whole, place)), strict=True):
        ratios = {name for name in row if name.startswith("train/ratio/")}
        assert len(ratios) == 4 and {name for name in row if row[name] != other[name]} <= ratios
        assert [row[name] for name in ratios] == pytest.approx([other[name] for name in ratios], rel=2e-3)

    # In the second step of the run the reference, from which it starts, has given the answers.
    metrics = read_jsonl(whole / "metrics.jsonl")
    second = [
        answer for row in read_jsonl(whole / "round_1/plays.jsonl") if row["step"] == 2 for answer in row["answers"]
    ]
    ratios = [exp(answer["log_prob"] - answer["reference_log_prob"]) for answer in second]
    assert metrics[1]["train/ratio/mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)
    assert metrics[1]["train/ratio/max"] == pytest.approx(max(ratios), rel=1e-3)
    first, *others = (row for row in metrics if row["stage"] == "round 2")
    assert first["train/ratio/max"] == pytest.approx(1, abs=1e-3), "the first step has answers of the policy"
    assert all(abs(row["train/ratio/max"] - 1) > 0.1 for row in others)
    cost = json.loads((whole / "ledger.json").read_text())["stages"]["round_1/play"]
    assert 0 < cost["overlapped_seconds"] < cost["engine_seconds"] < cost["seconds"]


def test_which_weights_answer():
    """Step t + 1 is asked after step t - 1 is trained, and before step t is; nothing is asked beyond the last step."""
    from openrlhf_sgpo.sources.fresh_answers import FreshAnswers

    asked = []

    def begin(step):
        asked.append((step, roles.weights))
        return lambda: (f"answers to {step}", (0.0, 1.0))

    def source(ahead=None):
        made = FreshAnswers.__new__(FreshAnswers)
        made.config = Config()
        made.config.rollout.steps_behind = 1
        made.trainer = SimpleNamespace(stage=SimpleNamespace(last=5, clock=Stopwatch()))
        made.roles, made._next, made._asked = roles, ahead, lambda step: (step,)
        made._trains = made._trained = 0.0
        return made

    roles = SimpleNamespace(weights="start", begin=begin)
    whole = source()
    kept = {}
    for step in range(1, 6):
        assert whole._answers(step) == f"answers to {step}"
        roles.weights = f"step {step}"
        kept[step] = whole.ahead()
    assert asked == [(1, "start"), (2, "start"), (3, "step 1"), (4, "step 2"), (5, "step 3")]
    assert kept == {1: "answers to 2", 2: "answers to 3", 3: "answers to 4", 4: "answers to 5", 5: None}
    asked.clear()
    roles.weights = "step 3"  # as a resumed run does
    rest = source(kept[3])
    assert rest._answers(4) == "answers to 4" and asked == [(5, "step 3")]


@pytest.mark.parametrize(
    ("algo", "more", "message"),
    [
        (
            "slhf",
            (*BEHIND, "--slhf.sharing", "two_adapters", "--slhf.kappa_mode", "learning_rate", "--ds.lora.rank", "4"),
            "--rollout.steps_behind: 1, but --algo slhf samples from the adapters leader and follower",
        ),
        ("rloo", ("--rollout.steps_behind", "1"), "--rollout.steps_behind: --rollout.engine hf is selected"),
        ("rloo", ("--rollout.importance_cap", "2"), "--rollout.importance_cap: --rollout.engine hf is selected"),
        ("sgpo", BEHIND, "--rollout.steps_behind: --algo sgpo trains on pairs"),
    ],
)
def test_what_cannot_be_behind(algo, more, message, tiny_model, tiny_data, tmp_path):
    argv = flags(tiny_model, tiny_data, tmp_path, algo, *more)
    with pytest.raises(ValueError, match=message):
        run_settings.load(argv)


def test_engines_that_sleep_while_the_policy_trains_cannot_be_behind(monkeypatch):
    import torch

    from openrlhf_sgpo import ray_session
    from openrlhf_sgpo.rollout import check_rollout

    config = Config()
    config.rollout.steps_behind = 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--rollout.steps_behind 1: the engines share GPUs with the trainer"):
        check_rollout(config)
    config.vllm.enable_sleep = False
    check_rollout(config)
    config.vllm.enable_sleep = True
    monkeypatch.setattr(ray_session, "placement", ray_session.Placement(None, [[1]], 0.4, apart=True))
    check_rollout(config)
