"""Offline optima against the package's own losses, and what holds for every solver."""

import itertools
import math

import numpy as np
import pytest
import torch
from games.finite_games import DIGITS, QUICK, UNIFORM, games, minimised
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.ipo import ipo_loss
from openrlhf_sgpo.games import (
    GAMES,
    Game,
    NotConverged,
    best_response,
    bradley_terry_rewards,
    dpo,
    exploitability,
    mirror_step,
    nash,
    nash_md,
    offline_ipo,
    regularised_nash,
    solutions,
    stackelberg,
)
from openrlhf_sgpo.games.tabular import condorcet, two_actions

SOLVERS = {
    "stackelberg": lambda game: stackelberg(game, 0.1, 0.2),
    "stackelberg, no credit": lambda game: stackelberg(game, 0.1, 0.2, follower_kl_credit=False),
    "regularised_nash": lambda game: regularised_nash(game, 0.1),
    "nash_md": lambda game: nash_md(game, 0.1, 0.3),
    "offline_ipo": lambda game: offline_ipo(game, 0.1),
    "dpo": lambda game: dpo(game, 0.5),
}


def permuted(game, order):
    """The same game with its actions listed in another order."""
    return Game(
        game.preferences[np.ix_(order, order)],
        tuple(game.actions[index] for index in order),
        game.leader_reference[order],
        game.follower_reference[np.ix_(order, order)],
        game.behaviour[order],
    )


def labelled(game, weights, loss):
    """Population loss of pairs with the given weights and soft labels; loss maps differences of log-ratios to losses."""
    reference, chances = torch.tensor(game.leader_reference), torch.tensor(game.preferences)

    def objective(log_policy):
        ratios = log_policy - reference.log()
        differences = ratios[:, None] - ratios[None, :]
        return (torch.tensor(weights) * (chances * loss(differences) + (1 - chances) * loss(-differences))).sum()

    return objective


@pytest.mark.parametrize("name", ["condorcet", "offline_ipo", "bradley_terry"])
def test_offline_ipo_by_minimising_the_package_s_loss(name):
    game, tau = GAMES[name](), 0.1
    weights = np.outer(game.behaviour, game.behaviour)
    policy = minimised(labelled(game, weights, lambda differences: ipo_loss(differences, tau)), 3)
    solution = offline_ipo(game, tau)
    assert solution.policy == pytest.approx(policy, abs=1e-7)
    assert solution.residual < 1e-13


def test_offline_ipo_digits():
    assert offline_ipo(GAMES["offline_ipo"](), 0.1).policy == pytest.approx([0.365639, 0.247834, 0.386527], abs=DIGITS)
    assert offline_ipo(condorcet(), 0.1).policy == pytest.approx([0.371088, 0.438389, 0.190523], abs=DIGITS)


def test_offline_ipo_with_an_answer_that_the_data_lack():
    game = condorcet()
    solution = offline_ipo(game, 0.1, [0.75, 0.25, 0.0])
    scores = game.preferences @ [0.75, 0.25, 0.0]
    assert solution.policy == pytest.approx(np.exp(scores / 0.1) / np.exp(scores / 0.1).sum(), abs=1e-14)
    assert solution.residual < 1e-13


@pytest.mark.parametrize("weighted", [False, True])
def test_dpo_by_minimising_the_package_s_loss(weighted):
    game, beta = Game(condorcet().preferences, (), [0.2, 0.5, 0.3], behaviour=UNIFORM), 0.5
    weights = np.array([[9.0, 2.0, 0.0], [2.0, 9.0, 1.0], [0.0, 1.0, 9.0]]) if weighted else np.ones((3, 3))
    policy = minimised(labelled(game, weights, lambda differences: dpo_loss(beta * differences)), 3)
    solution = dpo(game, beta, weights if weighted else None)
    assert solution.policy == pytest.approx(policy, abs=1e-7)
    assert solution.residual <= 1e-12


def test_dpo_digits():
    rewards, residual, _ = bradley_terry_rewards(condorcet())
    assert residual <= 1e-12
    assert rewards == pytest.approx([0.067194, 0.134383, -0.201577], abs=DIGITS)
    # Printed from rewards of six digits, which beta = 0.1 makes five of the policy: (.330472 .647043 .022484).
    assert dpo(condorcet(), 0.1).policy == pytest.approx([0.330472, 0.647043, 0.022484], abs=5e-6)
    assert dpo(condorcet(), 0.1).policy == pytest.approx([0.330471, 0.647045, 0.022484], abs=DIGITS)
    without = np.array([[1.0, 1, 0], [1, 1, 1], [0, 1, 1]])
    rewards, _, _ = bradley_terry_rewards(condorcet(), without)  # a chain is fitted exactly: its logits
    assert rewards[0] - rewards[1] == pytest.approx(math.log(0.65 / 0.35), abs=1e-10)
    assert rewards[1] - rewards[2] == pytest.approx(math.log(3), abs=1e-10)


def test_behaviour_weights_the_pairs_of_dpo():
    game = Game(condorcet().preferences, behaviour=[0.6, 0.3, 0.1])
    by_hand = bradley_terry_rewards(game, [[0, 18, 6], [18, 0, 3], [6, 3, 0]])[0]
    assert bradley_terry_rewards(game)[0] == pytest.approx(by_hand, abs=1e-10)
    assert np.abs(by_hand - bradley_terry_rewards(condorcet())[0]).max() > 0.01
    with_ties = np.outer(game.behaviour, game.behaviour) + 1e13 * np.eye(
        3
    )  # an answer compared with itself says nothing
    assert bradley_terry_rewards(game, with_ties)[0] == pytest.approx(by_hand, abs=1e-10)


@pytest.mark.parametrize(
    ("game", "weights", "message"),
    [
        (two_actions(1.0), None, "not finite and unique"),
        (condorcet(), [[0, 1, 0], [1, 0, 0], [0, 0, 0]], "not finite and unique"),
        (condorcet(), [[0, 1, 1], [0, 0, 1], [1, 1, 0]], "symmetric"),
        (condorcet(), [[0, -1, 1], [-1, 0, 1], [1, 1, 0]], "at least 0"),
        (condorcet(), np.ones((2, 2)), "at least 0"),
    ],
)
def test_rewards_that_do_not_exist_are_refused(game, weights, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry_rewards(game, weights)


@pytest.mark.parametrize("name", SOLVERS)
@QUICK
@given(game=games(certain=False), data=st.data())
def test_names_of_actions_do_not_matter(name, game, data):
    order = np.array(data.draw(st.permutations(range(game.size))))
    policy, other = SOLVERS[name](game).policy, SOLVERS[name](permuted(game, order)).policy
    assert other == pytest.approx(policy[order], abs=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_indifference_leaves_the_reference(name):
    game = Game(np.full((3, 3), 0.5), (), [0.2, 0.5, 0.3], behaviour=[0.6, 0.2, 0.2])
    assert SOLVERS[name](game).policy == pytest.approx(game.leader_reference, abs=1e-12)


def test_the_concepts_differ_on_the_condorcet_game():
    """What makes it a good gate: no algorithm reaches another one's target by mistake."""
    game = condorcet()
    targets = [SOLVERS[name](game).policy for name in SOLVERS] + [nash(game).policy]
    for first, second in itertools.combinations(targets, 2):
        assert np.abs(first - second).max() > 3e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda game: regularised_nash(game, 0.0), "regularised_nash .* is 0.0"),
        (lambda game: nash_md(game, 0.0, 0.5), "tau of nash_md is 0.0"),
        (lambda game: nash_md(game, 0.1, 1.5), "coefficient of nash_md is 1.5"),
        (lambda game: offline_ipo(game, -1.0), "tau of offline_ipo is -1.0"),
        (lambda game: dpo(game, 0.0), "beta of dpo is 0.0"),
        (lambda game: mirror_step(game, UNIFORM, 0.0), "step 0.0"),
        (lambda game: mirror_step(game, UNIFORM, 11.0, 0.1), r"within \[0, 1\]"),
        (lambda game: exploitability(game, [0.5, 0.5]), r"policy has shape \(2,\)"),
        (lambda game: best_response(game, [0.5, 0.5, 0.5]), "opponent sums to 1.5"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(condorcet())


def test_a_solver_that_did_not_converge_says_so():
    with pytest.raises(NotConverged, match="regularised_nash: the residual is"):
        regularised_nash(condorcet(), 0.1, maximum_iterations=1)
    with pytest.raises(NotConverged, match="bradley_terry_rewards: the residual is"):
        bradley_terry_rewards(condorcet(), maximum_iterations=1)


@pytest.mark.parametrize("wrong", [0.1, 0.2])
@pytest.mark.parametrize("credit", [True, False])
def test_certificates_see_a_wrong_player(monkeypatch, wrong, credit):
    """With the leader's (0.1) or the follower's (0.2) choice spoilt, the closed form is not handed out."""
    honest = solutions.tilted
    monkeypatch.setattr(
        solutions, "tilted", lambda reference, scores, tau: honest(reference, scores, tau * (1 + 0.01 * (tau == wrong)))
    )
    with pytest.raises(NotConverged, match="stackelberg: the gap is"):
        stackelberg(condorcet(), 0.1, 0.2, follower_kl_credit=credit)
    assert abs(stackelberg(condorcet(), 0.3, 0.4, follower_kl_credit=credit).residual) < 1e-14


def test_residual_of_a_best_response_is_measured(monkeypatch):
    monkeypatch.setattr(solutions, "tilted", lambda reference, scores, tau: reference)
    assert best_response(condorcet(), UNIFORM, 0.1).residual == pytest.approx(exploitability(condorcet(), UNIFORM, 0.1))
    assert best_response(condorcet(), UNIFORM, 0.1).residual > 0.005
