"""--rollout.reuse_log_probs: an engine's log-probabilities of its answers in place of the trainer's."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from counting import counted
from running import TESTS, arguments, read_jsonl, train

from openrlhf_sgpo import run_settings
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.records import Answer
from openrlhf_sgpo.run_folder import RunFolder, write_sealed
from openrlhf_sgpo.sources import engine_log_probs

REUSE = ("--rollout.reuse_log_probs", "true")


def flags(tiny_model, tiny_data, folder: Path, *more: str, algo: str = "sgpo", **changes: str) -> list[str]:
    """A round of 12 prompts with vLLM, sampled from another distribution than the policy's."""
    given = dict(zip(*[iter(arguments(tiny_model, tiny_data, folder, algo=algo))] * 2, strict=True))
    given |= {"--rollout.engine": "vllm", "--rollout.temperature": "0.7", "--rollout.top_p": "0.9"}
    given |= {"--rounds.count": "1", "--rounds.prompts": "12", "--eval.max_prompts": "2"}
    given |= {f"--{name}": value for name, value in changes.items()}
    return [*(word for pair in given.items() for word in pair), *more]


def test_spread_is_the_standard_deviation_within_prompts():
    rows = [[1.0, 3.0], [-2.0, 0.5, 7.0], [4.0], []]
    variances = [(len(row) - 1, np.var(row, ddof=1)) for row in rows if len(row) > 1]
    pooled = sum(n * variance for n, variance in variances) / sum(n for n, _ in variances)
    assert engine_log_probs.deviation_within(rows) == pytest.approx(pooled**0.5, rel=1e-12)
    moved = [[value + 100 * place for value in row] for place, row in enumerate(rows)]
    assert engine_log_probs.deviation_within(moved) == pytest.approx(engine_log_probs.deviation_within(rows), rel=1e-9)
    assert engine_log_probs.deviation_within([[5.0], []]) == 0


@pytest.mark.parametrize("tokens", [2, 10, 300])
def test_noise_covers_errors_of_both_kinds(tokens):
    """Errors e of every token make n e per text of n tokens; independent ones with deviation e make sqrt(n) e."""
    alike, independent = ({"noise": 0.01 * 10**power, "tokens": 10.0} for power in (1, 0.5))
    assert engine_log_probs.noise_of(alike, tokens) >= 0.01 * tokens * (1 - 1e-12)
    assert engine_log_probs.noise_of(independent, tokens) >= 0.01 * tokens**0.5 * (1 - 1e-12)
    exact = alike if tokens >= 10 else independent
    assert engine_log_probs.noise_of(exact, tokens) == pytest.approx(0.01 * tokens ** (1 if tokens >= 10 else 0.5))


def test_noise_of_a_tenth_turns_three_of_a_hundred_pairs():
    generator = np.random.default_rng(0)
    for noise in (engine_log_probs.AGREEMENT, 1.0):
        exact = generator.normal(size=(400_000, 2))
        noisy = exact + noise * generator.normal(size=exact.shape)
        turned = (exact[:, 0] > exact[:, 1]) != (noisy[:, 0] > noisy[:, 1])
        assert turned.mean() == pytest.approx(math.atan(noise) / math.pi, abs=0.002)
        gaps = np.abs(exact[:, 0] - exact[:, 1])
        assert gaps[turned].mean() < gaps.mean() * (0.2 if noise < 1 else 0.8)


def test_answers_with_other_tokens_than_were_sampled_are_not_among_them(tiny_model):
    """A cut answer, one whose end was split again, and text by people are left to the trainer."""
    from openrlhf_sgpo.data.tokens import ChatFormat, load_tokenizer
    from openrlhf_sgpo.oracle import Question
    from openrlhf_sgpo.oracle.implicit import as_group
    from openrlhf_sgpo.training.scoring import tokens_key

    chat = ChatFormat(load_tokenizer(str(tiny_model), False, "model.model_name_or_path"), 64)
    messages = [{"role": "user", "content": "Say yes"}]
    room = chat.max_len - len(chat.prompt(messages))
    whole = Answer("yes", False, chat.response("yes", False, 9), (-0.5,) * 4)
    long = Answer("y" * 70, True, chat.response("y" * 70, True, 70), (-0.5,) * 70)
    split_again = Answer("no", False, chat.response("no", False, 9))
    answers = (whole, long, split_again, Answer("by people"))
    rows = [{"id": "a", "responses": [answer.to_row() for answer in answers[:3]]}]
    known = engine_log_probs.reported([{"id": "a", "prompt": messages}], rows, chat)
    group = as_group(Question("a", messages, answers), chat)
    assert room < 70 == len(long.token_ids) and len(group.responses[1]) == room
    keys = [tokens_key(group.prompt, response) for response in group.responses]
    assert [known.get(key) for key in keys] == [-2.0, None, None, None]


@pytest.mark.parametrize(
    ("algo", "more", "message"),
    [
        ("sgpo", {"rollout.engine": "hf"}, "--rollout.reuse_log_probs: --rollout.engine hf is selected"),
        ("iter_dpo", {}, "--rollout.reuse_log_probs: with --rounds.loss_reference previous"),
        ("sgpo", {"rounds.loss_reference": "previous"}, "use --rounds.loss_reference initial, or leave it out"),
    ],
)
def test_what_it_cannot_be_combined_with(algo, more, message, tiny_model, tiny_data, tmp_path):
    more = more | ({"reward.model_name_or_path": "m"} if algo == "iter_dpo" else {})
    with pytest.raises(ValueError, match=message):
        run_settings.load(flags(tiny_model, tiny_data, tmp_path, *REUSE, algo=algo, **more))


@pytest.mark.parametrize(("algo", "why"), [("nash_md", "samples in every step"), ("dpo", "has no rounds")])
def test_what_has_no_rounds_of_stored_pairs(algo, why, tmp_path):
    argv = ["--algo", algo, "--model.model_name_or_path", "m", "--ckpt.output_dir", str(tmp_path), *REUSE]
    with pytest.raises(ValueError, match=f"--rollout.reuse_log_probs: .*{why}"):
        run_settings.load(argv)
    assert Config().rollout.reuse_log_probs is False


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_data, tmp_path_factory):
    """The same run with and without the engine's log-probabilities: folder and tokens of forward passes without gradient."""
    made = {}
    for name, more in (("with", REUSE), ("without", ())):
        folder = tmp_path_factory.mktemp("runs") / name
        tokens = counted(flags(tiny_model, tiny_data, folder, *more)).tokens
        made[name] = folder, sum(tokens[False])
    return made


def sums_of(model: Path, prompt: tuple[int, ...], responses: list[tuple[int, ...]]) -> list[float]:
    """Log-probabilities at temperature 1 by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sums = []
    for response in responses:
        tokens = torch.tensor([prompt + response])
        with torch.no_grad():
            log_probs = policy(tokens).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        sums.append(log_probs.gather(-1, torch.tensor(response)[:, None]).sum().item())
    return sums


def stages_of(folder: Path, number: int = 1) -> dict:
    return json.loads((folder / f"round_{number}/manifest.json").read_text())["stages"]


def chat_of(model: Path):
    from openrlhf_sgpo.data.tokens import ChatFormat, load_tokenizer

    return ChatFormat(load_tokenizer(str(model), False, "model.model_name_or_path"), 128)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_reports_log_probabilities_of_the_policy_itself(runs, tiny_model):
    """At temperature 1 and without the nucleus, whatever it samples with; the answers are the same as without them."""
    folder, _ = runs["with"]
    chat = chat_of(tiny_model)
    prompts = {row["id"]: chat.prompt(row["prompt"]) for row in read_jsonl(folder / "round_1/prompts.jsonl")}
    rows = read_jsonl(folder / "round_1/responses.jsonl")
    assert len(rows) == 12 and sum(len(row["responses"]) for row in rows) == 24
    for row in rows:
        responses = [tuple(answer["token_ids"]) for answer in row["responses"]]
        exact = sums_of(folder / "round_0/policy", prompts[row["id"]], responses)
        for answer, expected in zip(row["responses"], exact, strict=True):
            assert answer["log_prob"] == pytest.approx(expected, abs=1e-4 * answer["tokens"])
    without = read_jsonl(runs["without"][0] / "round_1/responses.jsonl")
    sampled = [answer for row in rows for answer in row["responses"]]
    plain = [answer for row in without for answer in row["responses"]]
    assert [{key: answer[key] for key in other} for answer, other in zip(sampled, plain, strict=True)] == plain


@pytest.mark.slow
def test_pairs_and_margins_are_those_of_the_trainer(runs):
    (folder, _), (expected, _) = runs["with"], runs["without"]
    pairs, others = (read_jsonl(path / "round_1/pairs.jsonl") for path in (folder, expected))
    assert len(pairs) > 6
    for pair, other in zip(pairs, others, strict=True):
        scores = pair.pop("scores"), other.pop("scores")
        assert pair == other
        tokens = max(len(pair["chosen_token_ids"]), len(pair["rejected_token_ids"]))
        assert scores[0] == pytest.approx(scores[1], abs=0.1 * 1e-4 * tokens)
    margins = [json.loads((path / "round_1/worst_case.json").read_text())["margins"] for path in (folder, expected)]
    assert margins[0] == pytest.approx(margins[1], abs=2e-4)
    assert np.abs(margins[0]).max() > 0.01, "a policy that has not moved would prove little"


@pytest.mark.slow
def test_the_policy_is_not_asked_for_what_the_engine_has_said(runs, tiny_model):
    """The sweep over its answers is all that is missing, in the ledger as in the forward passes."""
    (folder, tokens), (expected, of_trainer) = runs["with"], runs["without"]
    chat = chat_of(tiny_model)
    prompts = {row["id"]: len(chat.prompt(row["prompt"])) for row in read_jsonl(folder / "round_1/prompts.jsonl")}
    distinct = {
        row["id"]: {answer["text"]: answer["tokens"] for answer in row["responses"] if answer["text"].strip()}
        for row in read_jsonl(folder / "round_1/responses.jsonl")
    }
    asked = {key: answers for key, answers in distinct.items() if len(answers) > 1}
    sweep = sum(prompts[key] + sum(answers.values()) for key, answers in asked.items())
    assert of_trainer - tokens == sweep > 0
    ledgers = [json.loads((path / "ledger.json").read_text())["stages"] for path in (folder, expected)]
    scored = [ledger["round_1/annotate"]["tokens_scored"] for ledger in ledgers]
    assert scored[1] - scored[0] == sweep and ledgers[0]["round_1/score"]["tokens_scored"] == 0
    facts, others = stages_of(folder)["pairs"], stages_of(expected)["pairs"]
    taken = facts["engine_log_probs"]
    assert taken["taken"] == taken["reported"] == sum(map(len, asked.values())) and "engine_log_probs" not in others
    probe = json.loads((folder / "round_0/evaluation.json").read_text())["probe"]
    assert 0 < probe["noise"] <= taken["noise"] < 0.1 * taken["spread"]
    # With two answers to a prompt the variance within it is half the squared difference; equal rewards are no pair.
    rewards = [pair["scores"] for pair in read_jsonl(expected / "round_1/pairs.jsonl")]
    squares = [((row["chosen"] - row["rejected"]) / 0.1) ** 2 / 2 for row in rewards]
    assert taken["spread"] == pytest.approx((sum(squares) / len(asked)) ** 0.5, rel=1e-3)


@pytest.mark.slow
def test_a_resumed_run_has_the_figures_that_the_engine_reported(runs, tiny_model, tiny_data, tmp_path):
    """Killed after the answers were written, and before anything was made of them."""
    whole, place = runs["with"][0], tmp_path / "killed"
    shutil.copytree(whole, place)
    manifest = RunFolder(str(place)).manifest(1)
    shutil.rmtree(place / "round_1/policy")
    for name in ("pairs.jsonl", "worst_case.json", "evaluation.json", "held_out.jsonl", "samples.jsonl"):
        (place / "round_1" / name).unlink()
    shutil.rmtree(place / "log_probs")
    kept = {"generate": manifest["stages"]["generate"]}
    write_sealed(place / "round_1/manifest.json", manifest | {"stages": kept})
    process = train(*flags(tiny_model, tiny_data, place, *REUSE), "--resume")
    assert process.returncode == 0, process.stderr[-3000:]
    assert "answers come from the engine: " in process.stdout
    for name in ("responses.jsonl", "pairs.jsonl", "worst_case.json", "policy/model.safetensors", "held_out.jsonl"):
        assert (place / "round_1" / name).read_bytes() == (whole / "round_1" / name).read_bytes(), name
    assert stages_of(place)["pairs"] == stages_of(whole)["pairs"]


@pytest.mark.slow
def test_noise_does_not_rank_the_answers_of_a_policy_that_has_not_moved(tiny_model, tiny_data, tmp_path):
    """The trainer's rewards are all 0; those of the engine, its noise, would rank every answer."""
    process = train(*flags(tiny_model, tiny_data, tmp_path, *REUSE, **{"seed.lr": "1e-12"}))
    assert process.returncode == 2 and "has not moved from" in process.stderr, process.stderr[-3000:]
    (line,) = [line for line in process.stdout.splitlines() if "answers come from the trainer: " in line]
    noise, spread = (float(figure) for figure in re.findall(r"\d\S*(?= nats|$)", line))
    assert 0 < 0.1 * spread < noise < 1e-3, line


@pytest.mark.slow
def test_other_oracles_leave_the_margins(tiny_model, tiny_data, tmp_path):
    """The policy scores pairs alone: those of the round the engine, the human ones the trainer. Margins are those of
    transformers."""
    from openrlhf_sgpo.data.records import load_run_pairs

    changes = {"oracle": "toy_oracles:Letters", "rounds.data": "all", "eval.max_samples": "4"}
    process = train(*flags(tiny_model, tiny_data, tmp_path, *REUSE, **changes), PYTHONPATH=TESTS)
    assert process.returncode == 0, process.stderr[-3000:]
    stages = stages_of(tmp_path)
    taken, pairs = stages["train"]["engine_log_probs"], stages["pairs"]["pairs"]
    assert taken["taken"] == taken["reported"] == 2 * pairs and "engine_log_probs" not in stages["pairs"]
    assert f"log-probabilities of {2 * pairs} of {2 * (pairs + 24)} answers come from the engine" in process.stdout
    margins = json.loads((tmp_path / "round_1/worst_case.json").read_text())["margins"]
    chat, rows = chat_of(tiny_model), []
    for number in (0, 1):
        rows += [chat.pair(pair) for pair in load_run_pairs(str(tmp_path / f"round_{number}/pairs.jsonl"))]
    policy, start = (
        [sums_of(model, group.prompt, list(group.responses)) for group in rows]
        for model in (tmp_path / "round_0/policy", tiny_model)
    )
    exact = [0.1 * ((p[0] - p[1]) - (q[0] - q[1])) for p, q in zip(policy, start, strict=True)]
    assert margins == pytest.approx(exact, abs=1e-4)
