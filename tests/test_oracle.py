"""The implicit reward and the pair that it picks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_sgpo.oracle.base import best_and_worst
from openrlhf_sgpo.oracle.implicit import implicit_rewards

NUMBERS = st.floats(-1e3, 1e3)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=6), st.floats(0.01, 10))
def test_rewards_are_beta_times_the_log_ratio(pairs, beta):
    policy, reference = [one for one, _ in pairs], [other for _, other in pairs]
    rewards = implicit_rewards(policy, reference, beta)
    for reward, one, other in zip(rewards, policy, reference, strict=True):
        assert reward / beta + other == pytest.approx(one, abs=1e-9)
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
    with pytest.raises(ValueError, match=f"two responses, got {len(rewards)}"):
        best_and_worst(rewards)
