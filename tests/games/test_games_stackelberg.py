"""SLHF's equilibrium: each player's own objective minimised, gradients played until they rest, limits, printed digits."""

import math

import numpy as np
import pytest
import torch
from games.finite_games import DIGITS, QUICK, UNIFORM, games, minimised, torch_kl
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_sgpo.games import (
    GAMES,
    Game,
    dpo,
    kl,
    nash_md,
    offline_ipo,
    regularised_nash,
    stackelberg,
    stackelberg_value,
    tilted,
)
from openrlhf_sgpo.games.tabular import condorcet, two_actions


@pytest.mark.parametrize("credit", [True, False])
@pytest.mark.parametrize("strengths", [(0.1, 0.1), (0.3, 0.05)])
def test_stackelberg_by_minimising_each_player_s_own_objective(credit, strengths):
    tau_leader, tau_follower = strengths
    game = Game(condorcet().preferences, (), [0.2, 0.5, 0.3], [[0.1, 0.3, 0.6], [0.4, 0.4, 0.2], [0.3, 0.1, 0.6]])
    preferences = torch.tensor(game.preferences)

    def answers(log_follower):  # the follower: E p + tau KL for every draft, minimised
        return (log_follower.exp() * preferences).sum(-1) + tau_follower * torch_kl(
            log_follower, game.follower_reference
        )

    follower = minimised(lambda log_follower: answers(log_follower).sum(), 3, 3)
    log_follower = torch.tensor(follower).log()
    scores = answers(log_follower) if credit else (log_follower.exp() * preferences).sum(-1)
    leader = minimised(
        lambda log_leader: tau_leader * torch_kl(log_leader, game.leader_reference) - log_leader.exp() @ scores, 3
    )
    solution = stackelberg(game, tau_leader, tau_follower, follower_kl_credit=credit)
    assert solution.follower == pytest.approx(follower, abs=1e-7)
    assert solution.scores == pytest.approx(scores.numpy(), abs=1e-9)
    assert solution.policy == pytest.approx(leader, abs=1e-7)
    assert abs(solution.residual) < 1e-12
    value = leader @ answers(log_follower).numpy() - tau_leader * kl(leader, game.leader_reference)
    assert solution.value == pytest.approx(value, abs=1e-9)


@QUICK
@given(games(), st.sampled_from([0.03, 0.2, 1.0]), st.sampled_from([0.03, 0.2, 1.0]), st.integers(0, 2**32 - 1))
def test_stackelberg_is_a_saddle_of_the_stated_value(game, tau_leader, tau_follower, seed):
    solution = stackelberg(game, tau_leader, tau_follower)
    generator = np.random.default_rng(seed)
    for share in (1.0, 0.1, 0.01):
        rival = (1 - share) * solution.policy + share * generator.dirichlet(np.ones(game.size))
        revised = (1 - share) * solution.follower + share * generator.dirichlet(np.ones(game.size), game.size)
        assert stackelberg_value(game, rival, solution.follower, tau_leader, tau_follower) <= solution.value + 1e-12
        assert stackelberg_value(game, solution.policy, revised, tau_leader, tau_follower) >= solution.value - 1e-12


def test_without_credit_is_where_the_uncredited_gradients_rest():
    """Exact gradient play from elsewhere: the leader ascends E p - tau KL without the follower's KL, the follower descends."""
    game, tau = condorcet(), 0.1
    leader, follower = np.zeros(3), np.zeros((3, 3))
    for _ in range(4000):
        pi, omega = tilted(UNIFORM, leader, 1), tilted(UNIFORM, follower, 1)
        gain = (omega * game.preferences).sum(1) - tau * np.log(pi)
        loss = game.preferences + tau * np.log(omega)
        leader = leader + 2.0 * pi * (gain - pi @ gain)
        follower = follower - 2.0 * omega * (loss - (omega * loss).sum(1, keepdims=True))
    solution = stackelberg(game, tau, tau, follower_kl_credit=False)
    assert pi == pytest.approx(solution.policy, abs=1e-9)
    assert pi == pytest.approx([0.566194, 0.321278, 0.112529], abs=DIGITS)


def test_stackelberg_digits_of_the_condorcet_game():
    table = {
        0.5: ((0.506336, 0.507322, 0.427596), (0.350107, 0.350798, 0.299094)),
        0.1: ((0.472707, 0.438234, 0.349220), (0.500181, 0.354331, 0.145488)),
        0.05: ((0.448288, 0.402485, 0.304550), (0.686568, 0.274690, 0.038742)),
        0.01: ((0.410986, 0.360986, 0.260986), (0.993307, 0.006693, 0.000000)),
    }
    for tau, (scores, leader) in table.items():
        solution = stackelberg(condorcet(), tau, tau)
        assert solution.scores == pytest.approx(scores, abs=DIGITS)
        assert solution.policy == pytest.approx(leader, abs=DIGITS)
    solution = stackelberg(condorcet(), 0.1, 0.1)
    rows = [[0.253716, 0.056612, 0.689672], [0.805512, 0.179734, 0.014753], [0.027149, 0.899052, 0.073799]]
    assert solution.follower == pytest.approx(np.array(rows), abs=DIGITS)
    assert solution.value == pytest.approx(0.432125, abs=DIGITS)
    steep = GAMES["condorcet_45_30_25"]()
    assert stackelberg(steep, 0.1, 0.1).policy == pytest.approx([0.653357, 0.214727, 0.131915], abs=DIGITS)
    tied = stackelberg(GAMES["condorcet_tied"](), 0.1, 0.1)
    assert tied.policy == pytest.approx(UNIFORM, abs=1e-14)
    assert tied.follower[0] == pytest.approx([0.154241, 0.029132, 0.816627], abs=DIGITS)
    assert tied.follower[1] == pytest.approx(np.roll(tied.follower[0], 1), abs=1e-14)  # the game's own symmetry


@pytest.mark.parametrize(
    ("tau", "value", "beater"), [(0.5, 0.345503, 0.6652), (0.1, 0.109185, 0.9933), (0.05, 0.054928, 1)]
)
def test_stackelberg_of_rock_paper_scissors(tau, value, beater):
    solution = stackelberg(GAMES["rock_paper_scissors"](), tau, tau)
    tie, loss = math.exp(-0.5 / tau), math.exp(-1 / tau)
    assert solution.policy == pytest.approx(UNIFORM, abs=1e-14)
    assert solution.value == pytest.approx(-tau * math.log((1 + tie + loss) / 3), abs=1e-14)
    assert solution.value == pytest.approx(value, abs=DIGITS)
    assert solution.follower[0, 2] == pytest.approx(1 / (1 + tie + loss), abs=1e-14)
    assert solution.follower[0, 2] == pytest.approx(beater, abs=5e-5)


@QUICK
@given(st.floats(0.02, 0.98), st.sampled_from([0.05, 0.3, 2.0]), st.sampled_from([0.0, 0.01, 0.3, 5.0, np.inf]))
def test_with_two_actions_all_regularised_concepts_agree(chance, tau, tau_follower):
    game = two_actions(chance)
    expected = 1 / (1 + math.exp(-(chance - 0.5) / tau))
    for solution in (
        stackelberg(game, tau, tau_follower),
        regularised_nash(game, tau),
        nash_md(game, tau, 0.4),
        offline_ipo(game, tau, [0.9, 0.1]),
    ):
        assert solution.policy[0] == pytest.approx(expected, abs=1e-12)
    logit = math.log(chance / (1 - chance))
    assert dpo(game, tau).policy[0] == pytest.approx(1 / (1 + math.exp(-logit / tau)), abs=1e-10)


def test_stackelberg_limits():
    game, third = condorcet(), [1 / 3] * 3
    hard = stackelberg(game, 0, 0)
    assert hard.policy.tolist() == [1, 0, 0]  # the largest group's favourite
    assert hard.follower.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]  # whoever beats the draft
    assert hard.scores.tolist() == pytest.approx([0.40, 0.35, 0.25], abs=1e-15)
    assert hard.value == pytest.approx(0.40, abs=1e-15)
    near = stackelberg(game, 1e-3, 1e-3)
    assert near.policy == pytest.approx(hard.policy, abs=1e-9)
    assert near.scores == pytest.approx(hard.scores, abs=2e-3)
    passive = stackelberg(game, 0.1, np.inf)  # a follower that cannot move: rewards are win rates against its reference
    assert passive.follower.tolist() == game.follower_reference.tolist()
    assert passive.policy == pytest.approx(tilted(UNIFORM, game.preferences @ UNIFORM, 0.1), abs=1e-14)
    assert stackelberg(game, 0.1, 1e7).policy == pytest.approx(passive.policy, abs=1e-6)
    assert stackelberg(game, np.inf, 0.1).policy.tolist() == pytest.approx(third, abs=1e-15)
    for credit in (True, False):
        loose = stackelberg(game, 0.1, 1e7, follower_kl_credit=credit)  # the follower's KL vanishes with it
        assert loose.policy == pytest.approx(passive.policy, abs=1e-6)
    with pytest.raises(ValueError, match="the regularisation strength is -1"):
        stackelberg(game, 0.1, -1)
