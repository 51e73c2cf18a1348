"""The implicit reward and a reward model of OpenRLHF's, and the pairs that they pick."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.oracle import Answer, Question, Resources
from openrlhf_sgpo.oracle.base import agreement, best_and_worst, rank
from openrlhf_sgpo.oracle.implicit import implicit_rewards

NUMBERS = st.floats(-1e3, 1e3)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=6), st.floats(0.01, 10))
def test_rewards_are_beta_times_the_log_ratio(pairs, beta):
    policy, reference = [trained for trained, _ in pairs], [other for _, other in pairs]
    rewards = implicit_rewards(policy, reference, beta)
    for reward, trained, other in zip(rewards, policy, reference, strict=True):
        assert reward / beta + other == pytest.approx(trained, abs=1e-9)
    # Only differences count: the prompt's constant drops out, and so does the common part of both models.
    assert implicit_rewards(policy, policy, beta) == [0.0] * len(policy)


def test_rewards_need_one_reference_each():
    with pytest.raises(ValueError):
        implicit_rewards([1.0, 2.0], [1.0], 0.1)


@given(st.lists(NUMBERS | st.sampled_from([0.0, 1.0]), min_size=2, max_size=8))
def test_best_and_worst_are_the_extremes_and_differ(rewards):
    best, worst = best_and_worst(rewards)
    assert best != worst
    assert rewards[best] == max(rewards) and rewards[worst] == min(rewards)
    assert best == rewards.index(max(rewards))  # the earlier sample wins a tie
    assert worst == len(rewards) - 1 - rewards[::-1].index(min(rewards))


@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_no_preference_among_fewer_than_two(rewards):
    with pytest.raises(ValueError, match=f"two answers, got {len(rewards)}"):
        best_and_worst(rewards)


def test_a_ranked_pair_keeps_what_belongs_to_its_answers():
    prompt = [{"role": "user", "content": "?"}]
    answers = (Answer("middle"), Answer("worst", truncated=True), Answer("best"), Answer("also middle"))
    pair = rank(Question("q-7", prompt, answers), [0.25, -3.0, 1.5, 0.25], "reward_model", 2)
    assert (pair.id, pair.prompt, pair.source, pair.round) == ("round_2/q-7", prompt, "reward_model", 2)
    assert (pair.chosen, pair.chosen_truncated) == ("best", False)
    assert (pair.rejected, pair.rejected_truncated) == ("worst", True)
    assert pair.scores == {"chosen": 1.5, "rejected": -3.0} and not pair.flipped
    turned = rank(Question("q-7", prompt, answers), [-0.25, 3.0, -1.5, -0.25], "implicit", 1)
    assert (turned.chosen, turned.chosen_truncated, turned.rejected) == ("worst", True, "best")
    assert (turned.source, turned.round) == ("implicit", 1)


def test_agreement():
    assert agreement([(1.0, 0.0), (2.0, -1.0), (0.0, 1.0), (5.0, 4.0)]) == 0.75
    assert agreement([(1.0, 1.0)]) == 0.5
    assert agreement([(1.0, 1.0), (0.0, 1.0)]) == 0.25


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0])] * 2), min_size=1, max_size=9))
def test_agreement_with_the_opposite_labels_is_the_rest(rewards):
    assert agreement(rewards) + agreement([(rejected, chosen) for chosen, rejected in rewards]) == pytest.approx(1)


QUESTIONS = [
    Question(
        f"q-{number}",
        [{"role": "user", "content": "Say " + "yes " * number}],
        (Answer("yes" * (1 + number)), Answer("no"), Answer("no" * 9, truncated=True)),
    )
    for number in range(5)
]


def oracle(folder, tmp_path, max_len=128, reward_max_len=0):
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.oracle.reward_model import RewardModel

    config = Config()
    config.reward.model_name_or_path = str(folder)
    config.ds.param_dtype, config.ds.zero_stage, config.data.max_len = "fp32", 0, max_len
    # Batches of different lengths, so that there is padding.
    config.train.batch_size = config.train.micro_batch_size = 2
    config.reward.max_len = reward_max_len
    strategy = build_strategy(config)
    return RewardModel(Resources(config, strategy, None, None, tmp_path))


def test_rewards_are_those_of_openrlhfs_class(tiny_reward_model, tmp_path):
    from reward_models import conversation, rewards_alone

    judge = oracle(tiny_reward_model, tmp_path)
    rewards = judge.rewards(QUESTIONS, "test")
    every = [
        conversation(tiny_reward_model, question.prompt[0]["content"], answer.text, not answer.truncated)
        for question in QUESTIONS
        for answer in question.answers
    ]
    expected = rewards_alone(tiny_reward_model, every)
    assert [reward for row in rewards for reward in row] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.5, "too alike to tell"
    # Stored: another process reads the very numbers and loads no model.
    again = oracle(tiny_reward_model, tmp_path)
    assert again.rewards(QUESTIONS, "test") == rewards and again.calls == 0 < judge.calls == len(every)


def test_mean_and_deviation_of_the_folder_count(tiny_reward_model, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(tiny_reward_model, plain)
    settings = json.loads((plain / "config.json").read_text())
    mean, deviation = settings.pop("mean"), settings.pop("std")
    (plain / "config.json").write_text(json.dumps(settings))
    raw = oracle(plain, tmp_path).rewards(QUESTIONS, "test")
    normalised = oracle(tiny_reward_model, tmp_path).rewards(QUESTIONS, "test")
    assert (mean, deviation) == (2.0, 4.0)
    for row, other in zip(raw, normalised, strict=True):
        assert other == pytest.approx([(reward - mean) / deviation for reward in row], abs=1e-5)


@pytest.mark.parametrize("lengths", [{"max_len": 500, "reward_max_len": 40}, {"max_len": 40}])
def test_what_does_not_fit_is_cut_at_the_beginning_of_the_prompt(tiny_reward_model, tmp_path, lengths):
    """One cut for all answers to a prompt, so that they reply to the same; an answer that does not fit itself keeps its
    beginning, and one token of the prompt."""
    from reward_models import rewards_alone
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_model)
    limit = 40
    judge = oracle(tiny_reward_model, tmp_path, **lengths)
    prompt = [{"role": "user", "content": "0123456789" * 5}]
    long, endless = Answer("a" * 20), Answer("b" * 60)
    rewards = judge.rewards(
        [Question("1", prompt, (Answer("short"), long)), Question("2", prompt, (endless, long))], "test"
    )
    start = tokenizer(
        f"<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    cut = start[-(limit - 21) :]  # 20 letters and the end of the turn
    expected = [
        [*cut, *ids("short"), end],
        [*cut, *ids("a" * 20), end],
        [*start[-1:], *ids("b" * (limit - 1))],
        [*start[-1:], *ids("a" * 20), end],
    ]
    assert max(map(len, expected)) == limit
    flat = [reward for row in rewards for reward in row]
    assert flat == pytest.approx(rewards_alone(tiny_reward_model, expected), abs=1e-4)


def test_a_language_model_is_no_reward_model(tiny_model, tmp_path):
    judge = oracle(tiny_model, tmp_path)
    with pytest.raises(ValueError, match=r"has no weights score.weight: it is not a reward model") as caught:
        judge.rewards(QUESTIONS, "test")
    assert f"--reward.model_name_or_path {tiny_model}" in str(caught.value)
    assert not (tmp_path / "rewards").exists()
