"""The pairwise model: comparisons in both orders, its loss, and that it learns what pairs say, circles included."""

from __future__ import annotations

import json
import math
import random
from itertools import permutations

import pytest
import torch
from running import read_jsonl, train

from openrlhf_sgpo.algorithms.base import PairBatch
from openrlhf_sgpo.algorithms.preference_model import PreferenceModel
from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.data.records import Pair


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def batch_of(chosen, rejected):
    return PairBatch(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(rejected))


def make() -> PreferenceModel:
    return PreferenceModel(PreferenceModel.settings(), 1.0)


def test_the_loss_is_the_cross_entropy_of_the_two_letters():
    """With the two letters' probabilities renormalised, it is BCE with logits, and -log of the right letter's share."""
    right, wrong = draw(2, 9)
    loss = make().loss(batch_of(right, wrong))
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        right - wrong, torch.ones(9, dtype=torch.float64), reduction="none"
    )
    assert loss.shape == (9,) and torch.allclose(loss, bce, rtol=0, atol=1e-12)
    both = torch.stack([right, wrong], dim=1)
    target = torch.zeros(9, dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(both, target, reduction="none")
    assert torch.allclose(loss, expected, rtol=0, atol=1e-12)


def test_gradient():
    points = draw(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: make().loss(batch_of(a, b)), tuple(points.unbind()))


def test_every_pair_is_shown_in_both_orders(tiny_model):
    from openrlhf_sgpo.data.tokens import ChatFormat, load_tokenizer

    chat = ChatFormat(load_tokenizer(str(tiny_model), False, "model.model_name_or_path"), 512)
    pairs = [
        Pair(f"p{i}", [{"role": "user", "content": "?"}], f"good {i}", f"bad {i}", flipped=i == 1) for i in range(3)
    ]
    comparisons = PreferenceModel.pairs(pairs, chat)
    assert [comparison.id for comparison in comparisons[:2]] == ["p0/chosen_first", "p0/rejected_first"] and len(
        {comparison.id for comparison in comparisons}
    ) == 6
    for pair, first, second in zip(pairs, comparisons[::2], comparisons[1::2], strict=True):
        assert (first.chosen, first.rejected, second.chosen, second.rejected) == ("A", "B", "B", "A")
        assert f"[Answer A]\n{pair.chosen}\n\n[Answer B]\n{pair.rejected}\n" in first.prompt[0]["content"]
        assert f"[Answer A]\n{pair.rejected}\n\n[Answer B]\n{pair.chosen}\n" in second.prompt[0]["content"]
        assert first.flipped == second.flipped == pair.flipped
        # A letter is one token, and no end of turn follows: its probability is not that of a whole reply.
        assert [len(response) for response in chat.pair(first).responses] == [1, 1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rounds.count", "1"], "--rounds.count: 1, but --algo preference_model learns from the human pairs alone"),
        (["--model.beta", "0.5"], "--model.beta: --algo preference_model has no reference and would not read it"),
        (["--ref.model_name_or_path", "r"], "--ref.model_name_or_path: --algo preference_model has no reference"),
    ],
)
def test_what_it_has_not(more, message, tiny_data, tmp_path, capsys):
    argv = ["--model.model_name_or_path", "m", "--data.dataset", str(tiny_data["pairs"]), "--ckpt.output_dir"]
    assert main(["train", "--algo", "preference_model", *argv, str(tmp_path / "run"), *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_circle_can_be_learned(tiny_model, make_resources, tmp_path):
    """Rock, paper, scissors: no reward says it, six comparisons teach it, and the oracle repeats it."""
    from transformers import AutoModelForCausalLM

    from openrlhf_sgpo.oracle import Answer, Question
    from openrlhf_sgpo.oracle.preference_model import PreferenceModelOracle as Oracle

    beats = {("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")}
    prompt = [{"role": "user", "content": "?"}]
    resources = make_resources()
    comparisons = PreferenceModel.pairs([Pair(f"{a}-{b}", prompt, a, b) for a, b in sorted(beats)], resources.chat)
    groups = [resources.chat.pair(comparison) for comparison in comparisons]
    width = max(len(group.prompt) for group in groups)
    tokens = torch.tensor([[0] * (width - len(group.prompt)) + list(group.prompt) for group in groups])
    letters = torch.tensor([[response[0] for response in group.responses] for group in groups])
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        logits = model(tokens, attention_mask=(tokens != 0).long()).logits[:, -1].log_softmax(-1)
        right, wrong = logits.gather(1, letters).T
        loss = make().loss(batch_of(right, wrong)).mean()
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    resources.chat.tokenizer.save_pretrained(tmp_path / "trained")
    resources.config.reward.model_name_or_path = str(tmp_path / "trained")
    moves = ("rock", "paper", "scissors")
    (matrix,) = Oracle(resources).preferences([Question("game", prompt, tuple(map(Answer, moves)))], "")
    for (i, a), (j, b) in permutations(enumerate(moves), 2):
        assert (matrix[i][j] > 0.9) == ((a, b) in beats)


@pytest.mark.slow
def test_a_run_learns_the_rule_and_the_oracle_says_the_same(tiny_model, make_resources, tmp_path):
    """The word yes is better than none. Through the command line: the held-out comparisons come out right, the oracle's
    preferences are the averages of both orders, and a second run asks it to rank."""
    from openrlhf_sgpo.oracle import Answer, Question
    from openrlhf_sgpo.oracle.preference_model import PreferenceModelOracle as Oracle

    generator = random.Random(0)

    def pair(number: int) -> dict:
        answers = {"chosen": generator.randint(1, 3), "rejected": 0}
        texts = {side: " ".join(["yes"] * count + ["no"] * (3 - count)) for side, count in answers.items()}
        return {"id": f"pair-{number}", "prompt": f"Say {number}"} | texts

    files = {}
    for name, numbers in {"pairs": range(96), "held_out": range(1000, 1024)}.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(pair(number)) + "\n" for number in numbers))
    folder = tmp_path / "run"
    process = train(
        *("--algo", "preference_model", "--model.model_name_or_path", str(tiny_model)),
        *("--ckpt.output_dir", str(folder), "--ds.param_dtype", "fp32", "--ds.zero_stage", "0"),
        *("--data.dataset", str(files["pairs"]), "--eval.dataset", str(files["held_out"]), "--data.max_len", "400"),
        *("--train.batch_size", "16", "--train.micro_batch_size", "16", "--train.max_epochs", "4", "--adam.lr", "3e-3"),
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "192 pairs" in process.stdout and "loss reference none" in process.stdout
    rows = read_jsonl(folder / "metrics.jsonl")
    assert len(rows) == 4 * 192 // 16
    assert rows[0]["train/rewards/margins"] == pytest.approx(
        rows[0]["train/logps/chosen"] - rows[0]["train/logps/rejected"], abs=1e-5
    ), "no reference and no beta"
    start, end = (json.loads((folder / f"{name}/evaluation.json").read_text()) for name in ("initial", "round_0"))
    assert start["pairs"] == end["pairs"] == 48 and end["accuracy"] > 0.9 > start["accuracy"]
    assert len(read_jsonl(folder / "round_0/pairs.jsonl")) == 96, "what is stored are the pairs themselves"

    # The oracle: the mean of both orders of the very comparisons that were evaluated.
    margins = {row["id"]: row["margin"] for row in read_jsonl(folder / "round_0/held_out.jsonl")}
    held_out = read_jsonl(files["held_out"])
    judge = Oracle(make_resources(reward__model_name_or_path=str(folder / "round_0/policy"), reward__max_len=400))
    questions = [
        Question(
            row["id"], [{"role": "user", "content": row["prompt"]}], (Answer(row["chosen"]), Answer(row["rejected"]))
        )
        for row in held_out
    ]
    shares = [matrix[0][1] for matrix in judge.preferences(questions, "")]
    for row, share in zip(held_out, shares, strict=True):
        both = [margins[f"{row['id']}/{order}"] for order in ("chosen_first", "rejected_first")]
        assert share == pytest.approx(sum(1 / (1 + math.exp(-margin)) for margin in both) / 2, abs=1e-4)
    assert sum(share > 0.5 for share in shares) / len(shares) > 0.9
