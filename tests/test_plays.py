"""Runs that sample in every step: what they record, what they learn, and that they go on after a sudden death."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from running import ROOT, forked, read_jsonl, train
from toy_oracles import CONDORCET, Letters, kind

from openrlhf_sgpo import algorithms, games, run_settings
from openrlhf_sgpo.algorithms.slhf import IMPROVE
from openrlhf_sgpo.cli.main import main, run

ON_POLICY = [name for name in algorithms.BUILT_INS if algorithms.get(name).fresh_answers]
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


def flags(tiny_model, tiny_data, folder: Path, algo: str, *more: str) -> list[str]:
    """Two rounds of three steps of four prompts, unless ``more`` says otherwise."""
    given = {
        "--algo": algo,
        "--model.model_name_or_path": str(tiny_model),
        "--data.prompt_dataset": str(tiny_data["prompts"]),
        "--eval.dataset": str(tiny_data["held_out"]),
        "--ckpt.output_dir": str(folder),
        "--data.max_len": "256",
        "--train.batch_size": "4",
        "--train.micro_batch_size": "2",
        "--adam.lr": "1e-3",
        "--ds.param_dtype": "fp32",
        "--rollout.engine": "hf",
        "--rollout.max_new_tokens": "8",
        "--rounds.count": "2",
        "--rounds.steps": "3",
        "--oracle": "toy_oracles:Letters",
    }
    given |= dict(zip(more[::2], more[1::2], strict=True))
    return [word for pair in given.items() for word in pair if word is not None]


def play(*argv: str) -> list[dict]:
    """A run in this process: no second import of everything."""
    settings, options = run_settings.load(argv)
    return run(settings, algorithms.get(settings.algo), options)


@pytest.fixture(scope="module")
def played(tiny_model, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plays") / "slhf"
    return folder, play(*flags(tiny_model, tiny_data, folder, "slhf", "--slhf.followers", "2"))


def test_what_a_run_leaves(played):
    folder, rows = played
    assert "checkpoints" not in {path.name for path in folder.iterdir()}
    assert [row["name"] for row in rows] == ["start", "round 1", "round 2"]
    lines = [read_jsonl(folder / f"round_{number}/plays.jsonl") for number in (1, 2)]
    assert [[row["step"] for row in part] for part in lines] == [
        [step for step in steps for _ in range(4)] for steps in ([1, 2, 3], [4, 5, 6])
    ]
    # 24 prompts are 6 batches: none comes twice within an epoch.
    assert len({row["id"] for part in lines for row in part}) == 24
    for row in lines[0] + lines[1]:
        assert [answer["role"] for answer in row["answers"]] == ["policy", "follower", "follower"]
        matrix = np.array(row["preferences"])
        assert np.allclose(matrix + matrix.T, 1) and np.allclose(np.diag(matrix), 0.5)
        scores = np.array([Letters().score(None, answer["text"]) for answer in row["answers"]])
        assert np.allclose(matrix, 1 / (1 + np.exp(scores[None, :] - scores[:, None])))
    first = [answer for row in lines[0][:4] for answer in row["answers"]]
    assert all(answer["log_prob"] == pytest.approx(answer["reference_log_prob"], abs=1e-4) for answer in first)
    later = [answer for row in lines[1] for answer in row["answers"]]
    assert mean(abs(answer["log_prob"] - answer["reference_log_prob"]) for answer in later) > 0.01
    ledger = json.loads((folder / "ledger.json").read_text())["stages"]
    for number, part in enumerate(lines, start=1):
        cost = ledger[f"round_{number}/play"]
        assert (cost["steps"], cost["samples"]) == (3, 36)
        assert cost["tokens_generated"] == sum(answer["tokens"] for row in part for answer in row["answers"])
        assert {f"seconds_{part}" for part in ("generate", "oracle", "log_probs", "train", "sync")} <= cost.keys()
    table = (folder / "table.txt").read_text()
    assert table.split()[:6] == ["accuracy", "margin", "kl", "length", "wins", "labels"] and "sync" in table


def test_win_rate_is_the_oracles_mean_preference_over_the_start(played):
    folder, rows = played
    start, now = (read_jsonl(folder / name / "samples.jsonl") for name in ("initial", "round_2"))
    scores = [[Letters().score(None, answer["text"]) for answer in part] for part in (now, start)]
    expected = mean(1 / (1 + np.exp(b - a)) for a, b in zip(*scores, strict=True))
    assert rows[2]["win_rate"] == pytest.approx(expected)
    assert "win_rate" not in rows[0]


@pytest.mark.parametrize("algo", ON_POLICY)
def test_every_algorithm_plays(algo, tiny_model, tiny_data, tmp_path):
    folder = tmp_path / algo
    more = ("--comal.reference_rounds", "1") if algo == "comal" else ()
    rows = play(*flags(tiny_model, tiny_data, folder, algo, "--rounds.steps", "2", *more))
    assert rows[-1]["kl"] > 0
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert all(np.isfinite(row["train/loss"]) for row in metrics)
    assert metrics[1]["train/grad_norm"] > 0
    (first, *_) = read_jsonl(folder / "round_1/plays.jsonl")
    kind = algorithms.get(algo)
    assert tuple(answer["role"] for answer in first["answers"]) == kind(kind.settings(), 0.001).roles


def test_rloo_on_scores(tiny_model, tiny_data, tmp_path):
    """They are the oracle's, one per answer; an oracle that only compares is refused before anything is loaded."""
    folder, more = tmp_path / "scores", ("--rloo.reward", "score", "--rounds.count", "1", "--rounds.steps", "1")
    play(*flags(tiny_model, tiny_data, folder, "rloo", *more))
    for row in read_jsonl(folder / "round_1/plays.jsonl"):
        assert row["rewards"] == [Letters().score(None, answer["text"]) for answer in row["answers"]]
    with pytest.raises(ValueError, match="compares answers and gives them no scores"):
        play(*flags(tiny_model, tiny_data, tmp_path / "no", "rloo", *more, "--oracle", "toy_oracles:Condorcet"))


def test_comal_moves_its_reference(tiny_model, tiny_data, tmp_path):
    """In the first step of a round that follows a reset, policy and reference are one; otherwise not."""
    more = ("--comal.reference_rounds", "2", "--rounds.count", "4", "--rounds.steps", "2")
    play(*flags(tiny_model, tiny_data, tmp_path / "comal", "comal", *more))
    for number, same in ((1, True), (2, False), (3, True), (4, False)):
        rows = read_jsonl(tmp_path / "comal" / f"round_{number}/plays.jsonl")
        first = [answer for row in rows if row["step"] == 2 * number - 1 for answer in row["answers"]]
        gaps = [abs(answer["log_prob"] - answer["reference_log_prob"]) for answer in first]
        assert (max(gaps) < 1e-4) == same


@pytest.mark.parametrize("layout", ["padded", "auto"])
def test_log_probs_are_those_of_the_sampling_distribution(layout, tiny_model, other_tiny_model, tiny_data, tmp_path):
    """At temperature 0.7, in the context in which each answer was given, under policy and reference."""
    from trainers import make_trainer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from openrlhf_sgpo.algorithms.slhf import SLHF, SLHFSettings
    from openrlhf_sgpo.data.records import Answer, Prompt
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.training.plays import Play

    argv = flags(tiny_model, tiny_data, tmp_path, "slhf", "--rollout.temperature", "0.7", "--train.layout", layout)
    settings, _ = run_settings.load([*argv, "--ds.zero_stage", "0"])
    strategy = build_strategy(settings)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(0)
    draws = [
        tuple(torch.randint(3, 250, (size,), generator=generator).tolist()) for size in (5, 9, 3, 12, 7, 4, 8, 2, 6, 3)
    ]
    samples = [Answer("", True, ids) for ids in draws[2:]]
    prompt = Prompt("p", [{"role": "user", "content": "?"}])
    # The second play has two answers in one context, as of the role policy twice.
    plays = [
        Play(prompt, [(draws[0], samples[0]), (draws[1], samples[1])], [[0.5, 0.7], [0.3, 0.5]]),
        Play(prompt, [(draws[0], samples[2]), (draws[0], samples[3])], [[0.5, 0.2], [0.8, 0.5]]),
        Play(prompt, [(draws[1], samples[4]), (draws[0], samples[5])], [[0.5, 0.5], [0.5, 0.5]]),
        Play(prompt, [(draws[1], samples[6]), (draws[0], samples[7])], [[0.5, 0.9], [0.1, 0.5]]),
    ]
    algorithm, other = SLHF(SLHFSettings(), 0.1), str(other_tiny_model)
    with make_trainer(algorithm, settings, strategy, tokenizer, tmp_path, 4, reference=other) as trainer:
        _, recorded = trainer.step(1, plays)
    policy, anchor, *_ = recorded.tensor_split(5, dim=1)
    for rows, folder in ((policy, tiny_model), (anchor, other_tiny_model)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for row, play in zip(rows, plays, strict=True):
            for value, (context, sample) in zip(row, play.answers, strict=True):
                tokens = torch.tensor([context + sample.token_ids])
                with torch.no_grad():
                    logits = model(tokens).logits[0, len(context) - 1 : -1] / 0.7
                expected = logits.log_softmax(-1).gather(-1, tokens[0, len(context) :, None]).sum()
                assert value.item() == pytest.approx(expected.item(), abs=2e-4)


def test_the_follower_sees_the_draft_and_nothing_before_it(tiny_model):
    from transformers import AutoTokenizer

    from openrlhf_sgpo.data.records import Answer, Prompt
    from openrlhf_sgpo.data.tokens import ChatFormat
    from openrlhf_sgpo.rollout.roles import follower_context, follower_room

    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model), 256)
    prompt = Prompt("why", [{"role": "user", "content": "Why?"}])

    def context(text: str, longest: int = 256) -> str:
        ids = tuple(chat.tokenizer(text)["input_ids"])
        return chat.tokenizer.decode(follower_context(chat, prompt, Answer(text, False, ids), IMPROVE, longest)[0])

    whole = (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>user\n"
        f"{IMPROVE}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert context(" second draft\n") == whole.format("second draft")
    assert "first" not in context("second draft")
    room = follower_room(chat, IMPROVE, max_new_tokens=8)
    # With this room a draft of 8 tokens fits whole, and 8 tokens are left for the follower.
    longest = len(chat.prompt(prompt.messages)) + room - 8
    assert context("12345678", longest) == whole.format("12345678")
    assert context("123456789", longest) == whole.format("12345678")
    with pytest.raises(ValueError, match="instruction have"):
        context("1", longest - 9)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rollout.top_p", "0.9"), "--rollout.top_p: 0.9 truncates"),
        (
            ("--rollout.n_samples_per_prompt", "4"),
            "--rollout.n_samples_per_prompt: --algo nash_md samples in every step",
        ),
        (("--rounds.count", "0"), "--rounds.count: 0"),
        (("--nash_md.mixture", "2"), "--nash_md.mixture: 2.0 is out of range"),
    ],
)
def test_settings_that_cannot_be(more, message, tiny_model, tiny_data, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_settings.load(flags(tiny_model, tiny_data, tmp_path, "nash_md", *more))


def test_the_shared_defaults_leave_room_for_two_answers(tiny_model, tiny_data, tmp_path, capsys):
    data = ["--model.model_name_or_path", str(tiny_model), "--data.prompt_dataset", str(tiny_data["prompts"])]
    assert main(["data", "--algo", "slhf", *data]) == 0
    assert "24 prompts, 24 kept" in capsys.readouterr().out
    settings, _ = run_settings.load(
        ["--algo", "slhf", *data, "--ckpt.output_dir", str(tmp_path), "--oracle", "toy_oracles:Letters"]
    )
    assert settings.data.max_len > 2 * settings.rollout.max_new_tokens
    with pytest.raises(ValueError, match="--data.max_len: 16 leaves no room for a prompt, a draft"):
        run_settings.load(flags(tiny_model, tiny_data, tmp_path, "slhf", "--data.max_len", "16"))
    alone = ["--slhf.baseline", "leave_one_out", "--train.micro_batch_size", "1"]
    with pytest.raises(ValueError, match="--train.micro_batch_size: 1 leaves no other play"):
        run_settings.load(flags(tiny_model, tiny_data, tmp_path, "slhf", *alone))


def test_a_loss_that_is_no_number_ends_the_run_with_a_reason(tiny_model, tiny_data, tmp_path, monkeypatch):
    from openrlhf_sgpo.algorithms.rloo import RLOO

    monkeypatch.setattr(RLOO, "loss", lambda self, batch: batch.log_probs.sum((1, 2)) * float("nan"))
    with pytest.raises(ValueError, match="round 1, step 1: the loss is nan.*--adam.lr"):
        play(*flags(tiny_model, tiny_data, tmp_path / "run", "rloo"))


def test_what_is_found_before_a_model_is_loaded(tiny_model, tiny_data, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    settings = (other / "config.json").read_text()
    (other / "config.json").write_text(settings.replace('"vocab_size": 259', '"vocab_size": 320'))
    with pytest.raises(ValueError, match="other has a vocabulary of 320 tokens"):
        play(*flags(tiny_model, tiny_data, tmp_path / "a", "rloo", "--ref.model_name_or_path", str(other)))
    strict = shutil.copytree(tiny_model, tmp_path / "strict")
    template = (strict / "chat_template.jinja").read_text()
    refusal = "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(refusal + template)
    with pytest.raises(ValueError, match="use a model for more than one turn"):
        play(*flags(strict, tiny_data, tmp_path / "b", "slhf"))


def test_another_number_of_ranks_cannot_resume(tmp_path):
    from types import SimpleNamespace

    from openrlhf_sgpo.training.checkpoints import Checkpoints

    strategy = SimpleNamespace(world_size=2, is_rank_0=lambda: True)
    (tmp_path / "ranks").write_text("1")
    with pytest.raises(ValueError, match="--resume on 2 ranks, but .* was written by 1; start as many again"):
        Checkpoints(tmp_path, strategy).restore(None)


def test_more_settings_that_cannot_be(tiny_model, tiny_data, tmp_path):
    with pytest.raises(ValueError, match=r"--inpo.inverse_step 0.0075 must be larger than --model.beta 0.1"):
        run_settings.load(flags(tiny_model, tiny_data, tmp_path, "inpo", "--model.beta", "0.1"))
    with pytest.raises(ValueError, match=r"--rounds.steps: --algo dpo trains on pairs"):
        run_settings.load(flags(tiny_model, tiny_data, tmp_path, "dpo", "--data.dataset", str(tiny_data["pairs"])))
    with pytest.raises(ValueError, match=r"24 usable prompts, fewer than --train.batch_size 32"):
        play(*flags(tiny_model, tiny_data, tmp_path / "none", "rloo", "--train.batch_size", "32"))


def test_policies_learn_what_a_transitive_oracle_likes(tiny_model, tiny_data, tmp_path):
    """SLHF: later answers win against the start's, in both roles."""
    more = ["--rounds.count", "1", "--rounds.steps", "40", "--train.batch_size", "16", "--train.micro_batch_size", "4"]
    more += ["--adam.lr", "3e-3", "--lr_scheduler", "constant", "--rollout.temperature", "1"]
    folder = tmp_path / "run"
    rows = play(*flags(tiny_model, tiny_data, folder, "slhf", *more))
    assert rows[1]["win_rate"] > 0.8
    lines = read_jsonl(folder / "round_1/plays.jsonl")
    for place in (0, 1):
        letters = [Letters().score(None, row["answers"][place]["text"]) for row in lines]
        assert mean(letters[-64:]) > mean(letters[:64]) + 1.5


@pytest.mark.parametrize(
    "behind", [(), ("--rollout.engine", "vllm", "--rollout.steps_behind", "1")], ids=["", "one step behind"]
)
def test_self_play_reaches_the_regularised_nash_equilibrium(behind, tiny_model, tiny_data, tmp_path):
    """Answers of one token, whose preferences go round in a circle: every prompt is a game over the vocabulary, whose
    equilibrium is computed from the reference's distribution."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = [
        "--rounds.count",
        "1",
        "--rounds.steps",
        "75",
        "--train.batch_size",
        "24",
        "--train.micro_batch_size",
        "24",
    ]
    more += ["--adam.lr", "4e-3", "--lr_scheduler", "linear", "--rollout.temperature", "1"]
    more += ["--rollout.max_new_tokens", "1", "--oracle", "toy_oracles:Condorcet", "--rloo.answers", "8"]
    tau = 0.1
    play(*flags(tiny_model, tiny_data, tmp_path / "run", "rloo", *more, "--model.beta", str(tau), *behind))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    kinds = np.array([kind(tokenizer.decode([token], skip_special_tokens=True)) for token in range(259)])
    end, start, nash = [], [], []
    for row in read_jsonl(tiny_data["prompts"])[::6]:
        messages = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        distributions = []
        for folder in (tmp_path / "run/round_1/policy", tiny_model):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            distributions.append(model(tokens).logits[0, -1].double().softmax(-1).detach().numpy())
        game = games.Game(CONDORCET[kinds][:, kinds], tuple(map(str, range(259))), leader_reference=distributions[1])
        solution = games.regularised_nash(game, tau).policy
        for sums, policy in ((end, distributions[0]), (start, distributions[1]), (nash, solution)):
            sums.append([policy[kinds == number].sum() for number in range(3)])
    assert abs(np.mean(nash, 0) - np.mean(start, 0)).max() > 0.15
    assert abs(np.mean(end, 0) - np.mean(nash, 0)).max() < 0.05


def test_two_ranks_do_what_one_does(tiny_model, tiny_data, tmp_path):
    more = ["--rounds.count", "1", "--ds.zero_stage", "3", "--ds.lora.rank", "4"]
    environment = {"PYTHONPATH": str(ROOT / "tests")}
    process = train(*flags(tiny_model, tiny_data, tmp_path / "one", "slhf", *more), **environment)
    assert process.returncode == 0, process.stderr[-3000:]
    two = forked(None, "train", *flags(tiny_model, tiny_data, tmp_path / "two", "slhf", *more), ranks=2, **environment)
    assert two.returncode == 0, two.stderr[-3000:]
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for row, other in zip(*rows, strict=True):
        for name in ("train/loss", "train/wins", "train/policy/kl", "train/follower/entropy", "train/grad_norm"):
            assert row[name] == pytest.approx(other[name], abs=2e-3), (row["step"], name)
    assert all(a["train/learning_rate"] != b["train/learning_rate"] for a, b in pairwise(rows[0]))


def written(folder: Path | None) -> int:
    """Bytes that this process, and those of its session of Ray, have handed to the system for files, pipes and sockets."""
    import psutil

    from openrlhf_sgpo import ray_session

    processes = [psutil.Process(), *(ray_session._processes(str(folder)) if folder else ())]
    return sum(process.io_counters().write_chars for process in processes)


SIX_STEPS = ("--rounds.count", "1", "--rounds.steps", "6", "--ckpt.save_steps", "4")


def check_no_step_writes_weights(monkeypatch, model: Path, session: Callable[[], Path | None], *argv: str) -> None:
    """From one batch to the next: rows of files and messages, but far less than a model; only a checkpoint is as large.
    argv: of a run of SIX_STEPS. session: the folder of its session of Ray."""
    from openrlhf_sgpo.sources.fresh_answers import FreshAnswers

    batch, totals = FreshAnswers.batch, []

    def counted(self, step):
        samples = batch(self, step)
        totals.append(written(session()))
        return samples

    monkeypatch.setattr(FreshAnswers, "batch", counted)
    play(*argv)
    size = (model / "model.safetensors").stat().st_size
    steps = [after - before for before, after in pairwise(totals)]
    assert max(steps[1:3]) < size / 8, steps
    assert steps[3] > 3 * size, "the checkpoint has weights and Adam's moments"


def test_a_step_writes_no_weights(tiny_model, tiny_data, tmp_path, monkeypatch):
    argv = flags(tiny_model, tiny_data, tmp_path / "run", "slhf", *SIX_STEPS)
    check_no_step_writes_weights(monkeypatch, tiny_model, lambda: None, *argv)


def test_vllm_engines_follow_every_step_and_no_step_writes_weights(tiny_model, tiny_data, tmp_path, monkeypatch):
    """Answers are drawn from the policy as it is: for those the mean log-ratio to the reference is a divergence, above 0; for
    answers of the start it would be below, as it is for a mixture that is all reference."""
    from openrlhf_sgpo import ray_session

    more = ["--rollout.engine", "vllm", "--adam.lr", "3e-2", "--lr_scheduler", "constant", "--nash_md.mixture", "1"]
    argv = flags(tiny_model, tiny_data, tmp_path / "run", "nash_md", *SIX_STEPS, *more)
    check_no_step_writes_weights(monkeypatch, tiny_model, lambda: ray_session._keeper.args[-1], *argv)
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert rows[0]["train/policy/kl"] == pytest.approx(0, abs=1e-3)
    assert rows[3]["train/policy/kl"] > 1 and rows[3]["train/mixture/kl"] < -1
