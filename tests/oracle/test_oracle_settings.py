"""What --oracle and the settings of oracles may be, found before anything is loaded."""

from __future__ import annotations

import pytest
import yaml

from openrlhf_sgpo import flags
from openrlhf_sgpo.oracle import RewardOracle
from openrlhf_sgpo.run_settings import load

REQUIRED = ["--model.model_name_or_path", "m", "--data.prompt_dataset", "p", "--ckpt.output_dir", "o"]
ROUNDS = ["--algo", "sgpo", "--data.dataset", "d", *REQUIRED]
PLAYS = ["--algo", "nash_md", *REQUIRED]
JUDGE = ["--oracle", "judge", "--judge.base_url", "http://localhost:1/v1", "--judge.model", "j"]


class Reads(RewardOracle):
    name = "reads"
    reads = ("reward.max_len",)


def problems(*argv: str) -> list[str]:
    try:
        load(list(argv))
    except flags.SettingsError as error:
        return list(error.args)
    return []


@pytest.mark.parametrize("run", [ROUNDS, PLAYS])
@pytest.mark.parametrize(
    "more",
    [
        JUDGE,
        [*JUDGE, "--judge.swap", "random", "--judge.logprobs", "false", "--judge.temperature", "0.9"],
        ["--oracle", "reward_model", "--reward.model_name_or_path", "r", "--reward.max_len", "9"],
        ["--oracle", "preference_model", "--reward.model_name_or_path", "r", "--reward.max_len", "9"],
        ["--oracle", "reward_heads", "--reward.heads", "a", "b"],
        ["--oracle", f"{__name__}:Reads", "--reward.max_len", "9"],
    ],
)
def test_every_oracle_goes_with_every_algorithm(run, more):
    assert problems(*run, *more) == []


def test_an_unknown_oracle():
    (problem,) = problems(*ROUNDS, "--oracle", "judgement")
    assert problem.startswith("--oracle: unknown oracle 'judgement'; did you mean judge? known: implicit, reward_model")
    (problem,) = problems(*ROUNDS, "--oracle", "no.such_module:Class")
    assert problem.startswith("--oracle: oracle 'no.such_module:Class': cannot import module 'no.such_module'")


@pytest.mark.parametrize(
    ("more", "start"),
    [
        (["--oracle", "reward_model"], "--reward.model_name_or_path: missing, --oracle reward_model needs it"),
        (["--oracle", "preference_model"], "--reward.model_name_or_path: missing, --oracle preference_model needs"),
        (["--oracle", "reward_heads", "--reward.heads", "a"], "--reward.heads: 1 given, --oracle reward_heads needs 2"),
        (JUDGE[:4], "--judge.model: missing, --oracle judge needs it"),
        ([*JUDGE, "--judge.timeout", "0"], "--judge.timeout: 0.0 is out of range, use more than 0"),
        ([*JUDGE, "--judge.temperature", "0"], "--judge.temperature: 0.0 is out of range, use more than 0"),
        ([*JUDGE, "--judge.concurrency", "0"], "--judge.concurrency: 0 is out of range, use at least 1"),
        ([*JUDGE, "--judge.max_retries", "-1"], "--judge.max_retries: -1 is out of range, use at least 0"),
    ],
)
@pytest.mark.parametrize("run", [ROUNDS, PLAYS])
def test_what_is_missing_or_out_of_range(run, more, start):
    (problem,) = problems(*run, *more)
    assert problem.startswith(start)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["--judge.model", "j"], "judge.model"),
        (["--reward.heads", "a", "b"], "reward.heads"),
        ([*JUDGE, "--reward.max_len", "9"], "reward.max_len"),
        ([*JUDGE, "--rounds.judge_reference", "initial"], "rounds.judge_reference"),
        (["--oracle", "reward_heads", "--reward.heads", "a", "b", "--reward.model_name_or_path", "r"],
         "reward.model_name_or_path"),
        (["--oracle", f"{__name__}:Reads", "--reward.heads", "a"], "reward.heads"),
    ],
)  # fmt: skip
def test_what_the_oracle_would_not_read_is_refused(more, name):
    (problem,) = problems(*ROUNDS, *more)
    chosen = more[1] if more[0] == "--oracle" else "implicit"
    assert problem.startswith(f"--{name}: --oracle {chosen} is selected and would not read it")


def test_the_implicit_reward_is_the_policys_own_in_rounds_and_frozen_in_plays():
    assert problems(*ROUNDS, "--rounds.judge_reference", "previous") == []
    (problem,) = problems(*ROUNDS, "--reward.model_name_or_path", "seed")
    assert problem.startswith("--reward.model_name_or_path: --oracle implicit is selected")
    frozen = ["--oracle", "implicit", "--reward.model_name_or_path", "seed"]
    assert problems(*PLAYS, *frozen) == []
    (problem,) = problems(*PLAYS, *frozen[:2])
    assert problem.startswith("--reward.model_name_or_path: missing, --oracle implicit needs the policy whose")
    (problem,) = problems(*PLAYS, *frozen, "--rounds.judge_reference", "previous")
    assert problem.startswith("--rounds.judge_reference: --oracle implicit is selected")


def test_the_key_is_in_no_dump(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    config, options = load([*ROUNDS, *JUDGE, "--judge.api_key", "env:MY_KEY"])
    text = flags.dump({"": config, "sgpo": options})
    assert config.judge.api_key == "env:MY_KEY" and "secret" not in text and "MY_KEY" not in text
    (tmp_path / "dump.yaml").write_text(text)
    again, _ = load(["--config", str(tmp_path / "dump.yaml")])
    assert again.judge.model == "j" and again.judge.api_key == yaml.safe_load(text)["judge"]["api_key"] == ""
