"""Oracles that are models: heads that vote, the pairwise model, the frozen implicit reward, and models that stay in memory."""

from __future__ import annotations

import json
import math
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from openrlhf_sgpo.data.pairwise import fitted
from openrlhf_sgpo.finite import NotFiniteError
from openrlhf_sgpo.oracle import Answer, Question
from openrlhf_sgpo.oracle.reward_heads import RewardHeads, votes

pytestmark = pytest.mark.slow

QUESTIONS = [
    Question(
        f"q-{number}",
        [{"role": "user", "content": "Say " + "yes " * number}],
        (Answer("yes" * (1 + number)), Answer("no"), Answer("no" * 9, truncated=True), Answer("no")),
    )
    for number in range(3)
]


def check(matrix, answers):
    for i in range(len(answers)):
        for j in range(len(answers)):
            assert matrix[i][j] + matrix[j][i] == pytest.approx(1, abs=1e-12)
            assert matrix[i][j] == 0.5 or answers[i] != answers[j]


REWARD = st.integers(-2, 2).map(float)


@given(st.lists(st.tuples(REWARD, REWARD), min_size=1, max_size=7))
def test_votes(rewards):
    share = votes(rewards, 0, 1)
    assert share == sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in rewards) / len(rewards)
    assert share + votes(rewards, 1, 0) == pytest.approx(1)


def test_three_transitive_heads_make_the_condorcet_paradox():
    """Each head has an order; by majority A beats B beats C beats A, with two votes of three."""
    heads = [(3, 2, 1), (1, 3, 2), (2, 1, 3)]  # rewards of A, B, C
    assert [votes(heads, i, j) for i, j in ((0, 1), (1, 2), (2, 0))] == [pytest.approx(2 / 3)] * 3


@pytest.fixture(scope="module")
def heads(tiny_model, tmp_path_factory):
    from reward_models import make_reward_model

    folder = tmp_path_factory.mktemp("heads")
    return [str(make_reward_model(tiny_model, folder / str(seed), seed=seed)) for seed in range(3)]


def test_heads_vote_with_the_rewards_of_openrlhfs_class(heads, make_resources):
    from reward_models import conversation, rewards_alone

    from openrlhf_sgpo.oracle.reward_heads import RewardHeads

    resources = make_resources(reward__heads=heads)
    judge = RewardHeads(resources)
    RewardHeads.check(resources.config)
    matrices = judge.preferences(QUESTIONS, "test")
    assert judge.calls == len(heads) * 3 * len(QUESTIONS), "one per head and distinct answer"
    for question, matrix in zip(QUESTIONS, matrices, strict=True):
        check(matrix, [answer.text for answer in question.answers])
        rows = [
            conversation(Path(heads[0]), question.prompt[0]["content"], answer.text, not answer.truncated)
            for answer in question.answers
        ]
        rewards = [rewards_alone(Path(head), rows) for head in heads]
        for i, j in combinations(range(4), 2):
            if (i, j) != (1, 3):
                assert matrix[i][j] == sum(row[i] > row[j] for row in rewards) / 3
    assert {p for matrix in matrices for row in matrix for p in row} > {0.5, 1 / 3}, "the heads disagree"
    assert judge.rewards(QUESTIONS, "test")[0][0] == pytest.approx(sum(matrices[0][0][1:]) / 3)
    again = RewardHeads(resources)
    assert again.preferences(QUESTIONS, "test") == matrices and again.calls == 0


def test_heads_are_checked(heads, tiny_model, make_resources):
    from openrlhf_sgpo.oracle.reward_heads import RewardHeads

    def problem(*given):
        return RewardHeads.problems(make_resources(reward__heads=list(given)).config)

    assert problem(*heads) == []
    assert problem(heads[0])[0].startswith("--reward.heads: 1 given, --oracle reward_heads needs 2")
    assert "a model that is named twice" in problem(*heads, heads[0])[0]
    with pytest.raises(ValueError, match=f"--reward.heads {tiny_model} has no weights score.weight"):
        RewardHeads.check(make_resources(reward__heads=[heads[0], str(tiny_model)]).config)


def log_odds(folder, chat, messages) -> float:
    """log pi(A) - log pi(B) behind the comparison, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    a, b = (chat.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB")
    with torch.no_grad():
        logits = model(torch.tensor([chat.prompt(messages)])).logits[0, -1].double()
    return (logits[a] - logits[b]).item()


@pytest.mark.parametrize("layout", ["padded", "auto"])
def test_the_pairwise_model_is_asked_in_both_orders(other_tiny_model, make_resources, layout):
    from openrlhf_sgpo.oracle.preference_model import PreferenceModelOracle

    resources = make_resources(reward__model_name_or_path=str(other_tiny_model), train__layout=layout)
    judge = PreferenceModelOracle(resources)
    PreferenceModelOracle.check(resources.config)
    matrices = judge.preferences(QUESTIONS, "test")
    assert judge.calls == len(QUESTIONS) * 6, "three pairs of distinct answers, in two orders"
    for question, matrix in zip(QUESTIONS, matrices, strict=True):
        texts = [answer.text for answer in question.answers]
        check(matrix, texts)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            odds = [
                log_odds(other_tiny_model, judge.chat, messages)
                for messages in fitted(question.prompt, texts[i], texts[j], judge.chat)
            ]
            share, other = (1 / (1 + math.exp(-value)) for value in odds)
            assert matrix[i][j] == pytest.approx((share + 1 - other) / 2, abs=1e-4)
        assert matrix[1][3] == 0.5
    used = judge.usage()
    assert used["judge_calls"] == 18 and used["judge_tokens"] > 18 * 200, "a comparison has some 200 letters of its own"
    again = PreferenceModelOracle(resources)
    assert again.preferences(QUESTIONS, "test") == matrices
    assert again.usage() == {"judge_calls": 0, "judge_tokens": 0}


def test_the_pairwise_model_is_checked(tiny_model, tiny_reward_model, make_resources):
    from openrlhf_sgpo.oracle.preference_model import PreferenceModelOracle

    def config(model, **changes):
        return make_resources(reward__model_name_or_path=str(model), **changes).config

    assert PreferenceModelOracle.problems(config("")) and not PreferenceModelOracle.problems(config(tiny_model))
    with pytest.raises(ValueError, match=f"--reward.model_name_or_path {tiny_reward_model} is a reward model; use"):
        PreferenceModelOracle.check(config(tiny_reward_model))
    with pytest.raises(ValueError, match="leaves no room within 64; raise --data.max_len"):
        PreferenceModelOracle.check(config(tiny_model, reward__max_len=64))
    with pytest.raises(ValueError, match="--reward.model_name_or_path no/such model cannot be loaded"):
        PreferenceModelOracle.check(config("no/such model"))


def test_a_frozen_implicit_reward_is_that_of_the_two_models(tiny_model, other_tiny_model, make_resources):
    from openrlhf_sgpo.oracle.implicit import ImplicitReward, as_group

    resources = make_resources(resident=True, reward__model_name_or_path=str(other_tiny_model), model__beta=0.02)
    ImplicitReward.check(resources.config)
    judge = ImplicitReward(resources)
    matrices = judge.preferences(QUESTIONS, "")
    assert judge.calls == 3 * len(QUESTIONS), "one per distinct answer, not per model"
    groups = [as_group(question, resources.chat) for question in QUESTIONS]
    policy, reference = (resources.scorer.score(str(model), groups, "") for model in (other_tiny_model, tiny_model))
    for question, matrix, p, r in zip(QUESTIONS, matrices, policy, reference, strict=True):
        check(matrix, [answer.text for answer in question.answers])
        gain = 0.02 * ((p[0] - r[0]) - (p[1] - r[1]))
        assert matrix[0][1] == pytest.approx(1 / (1 + math.exp(-gain)), abs=1e-9)
    judge.close()


def test_an_answer_without_text_is_an_answer(tiny_model, make_resources):
    """What the policy said is that it ends; also where the length limit cut nothing but special tokens."""
    from openrlhf_sgpo.oracle.implicit import as_group

    chat = make_resources().chat
    group = as_group(Question("q", QUESTIONS[0].prompt, (Answer(""), Answer("", truncated=True), Answer("yes"))), chat)
    assert group.responses[0] == group.responses[1] == chat.end_of_turn != ()


def test_a_frozen_policy_must_share_the_vocabulary(tiny_model, make_resources, tmp_path):
    from transformers import AutoTokenizer

    from openrlhf_sgpo.oracle.implicit import ImplicitReward

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="does not have the vocabulary of --model.model_name_or_path"):
        ImplicitReward.check(make_resources(reward__model_name_or_path=str(tmp_path / "other")).config)


@pytest.mark.parametrize("resident", [False, True])
def test_resident_models_are_loaded_once_and_given_back(tiny_reward_model, make_resources, monkeypatch, resident):
    from openrlhf_sgpo.oracle.reward_model import RewardModel
    from openrlhf_sgpo.training.scoring import RewardScorer

    loads = []
    load = RewardScorer._load
    monkeypatch.setattr(RewardScorer, "_load", lambda self, model: loads.append(model) or load(self, model))
    judge = RewardModel(make_resources(resident=resident, reward__model_name_or_path=str(tiny_reward_model)))
    one_by_one = [judge.rewards([question], "")[0] for question in QUESTIONS]
    assert loads == [str(tiny_reward_model)] * (1 if resident else 3)
    assert len(judge.scorer._held) == resident
    judge.close()
    assert not judge.scorer._held
    # The same figures either way, and an oracle that was closed answers again.
    new = Question("new", QUESTIONS[0].prompt, (Answer("other"), Answer("answers")))
    assert len(judge.rewards([new], "")[0]) == 2 and len(loads) == (2 if resident else 4)
    judge.close()
    assert judge.rewards(QUESTIONS, "") == one_by_one, "out of what is kept"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [("weight", "the model {} has values in score.weight that are not finite"), ("std", "reward .* under {}")],
)
def test_one_head_that_is_not_finite_does_not_vote(damage, problem, heads, make_resources, tmp_path):
    """Two heads, one of them damaged: its votes would go to whatever answer comes later. A deviation of 0 divides by 0."""
    damaged = Path(shutil.copytree(heads[1], tmp_path / "damaged"))
    if damage == "weight":
        state = load_file(damaged / "model.safetensors")
        state["score.weight"].view(-1)[0] = torch.nan
        save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    else:
        settings = json.loads((damaged / "config.json").read_text())
        (damaged / "config.json").write_text(json.dumps(settings | {"mean": 0.0, "std": 0.0}))
    oracle = RewardHeads(make_resources(reward__heads=[heads[0], str(damaged)]))
    with pytest.raises(NotFiniteError, match=problem.format(damaged)):
        oracle.preferences(QUESTIONS, "round 1: score")
    assert len(list((tmp_path / "rewards").iterdir())) == 1, "those of the other head"
