"""Nash, regularised and not, with a mixture and by rounds: optimality on grids, play until rest, printed digits."""

import math

import numpy as np
import pytest
import torch
from games.finite_games import DIGITS, QUICK, UNIFORM, games, log_softmax, played
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_sgpo.algorithms.ipo import ipo_loss
from openrlhf_sgpo.games import (
    GAMES,
    Game,
    best_response,
    bradley_terry_rewards,
    condorcet_winner,
    dpo,
    exploitability,
    kl,
    mirror_step,
    mixture,
    nash,
    nash_md,
    offline_ipo,
    regularised_nash,
    stackelberg,
    tilted,
    win_rates,
)
from openrlhf_sgpo.games.tabular import bradley_terry, condorcet


def grid(steps=60):
    """All policies of three actions whose probabilities are multiples of 1 / steps."""
    return np.array([(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]) / steps


@pytest.mark.parametrize("tau", [0.5, 0.1, 0.03])
def test_regularised_nash_by_playing_until_rest(tau):
    """Small steps of mirror ascent in self-play, log pi <- log pi + a (p(y > pi) / tau - log(pi / ref)), written out here."""
    game = Game(condorcet().preferences, (), [0.2, 0.5, 0.3])

    def update(policy):
        moved = np.log(policy) + 0.02 * (game.preferences @ policy / tau - np.log(policy / game.leader_reference))
        return np.exp(moved) / np.exp(moved).sum()

    assert regularised_nash(game, tau).policy == pytest.approx(played(update), abs=1e-12)


def test_regularised_nash_digits():
    rows = {
        0.5: (0.349432, 0.349726, 0.300841),
        0.1: (0.439365, 0.322488, 0.238147),
        0.05: (0.488387, 0.270644, 0.240970),
        0.01: (0.505781, 0.211643, 0.282576),
    }
    for tau, row in rows.items():
        assert regularised_nash(condorcet(), tau).policy == pytest.approx(row, abs=DIGITS)
    steep = GAMES["condorcet_45_30_25"]()
    assert regularised_nash(steep, 0.1).policy == pytest.approx([0.508008, 0.241072, 0.250920], abs=DIGITS)


@QUICK
@given(games(), st.sampled_from([1e-3, 0.01, 0.1, 1.0, 100.0]))
def test_regularised_nash_is_its_own_best_response(game, tau):
    solution = regularised_nash(game, tau)
    assert solution.residual <= 1e-12
    assert np.abs(best_response(game, solution.policy, tau).policy - solution.policy).max() <= 1e-11
    assert abs(exploitability(game, solution.policy, tau)) < 1e-12


@QUICK
@given(games(largest=3), st.sampled_from([0.0, 0.05, 0.5]), st.integers(0, 2**32 - 1))
def test_exploitability_is_the_best_gain_and_never_negative(game, tau, seed):
    """Against all policies of a grid: none gains more, and the best of them nearly as much."""
    policy = np.random.default_rng(seed).dirichlet(np.ones(game.size))
    rivals = grid() if game.size == 3 else np.stack([np.linspace(0, 1, 201), 1 - np.linspace(0, 1, 201)], axis=1)
    rivals = np.vstack([rivals, tilted(game.leader_reference, win_rates(game, policy), tau)])
    penalties = tau * (kl(rivals, game.leader_reference) - kl(policy, game.leader_reference))
    gains = rivals @ game.preferences @ policy - 0.5 - penalties
    value = exploitability(game, policy, tau)
    assert value >= -1e-15
    assert value == pytest.approx(gains.max(), abs=1e-12)
    response = best_response(game, policy, tau)
    assert gains[-1] == pytest.approx(gains.max(), abs=1e-12)
    assert response.policy == pytest.approx(rivals[-1], abs=1e-15) and abs(response.residual) < 1e-12


def test_exploitability_digits():
    game = condorcet()
    for policy, value in ((UNIFORM, 1 / 30), ((0.5, 0.2, 0.3), 0), ((1, 0, 0), 0.10), ((0, 1, 0), 0.15)):
        assert exploitability(game, policy) == pytest.approx(value, abs=1e-6)


@QUICK
@given(st.tuples(*[st.floats(0.01, 1)] * 3).filter(lambda shares: max(shares) < 0.49 * sum(shares)))
def test_nash_of_condorcet_games(shares):
    shares = np.array(shares) / sum(shares)
    solution = nash(condorcet(*shares))
    assert solution.policy == pytest.approx(1 - 2 * shares[[2, 0, 1]], abs=1e-9)
    assert solution.residual == pytest.approx(0, abs=1e-9)


def test_nash_digits_and_the_limit_of_little_regularisation():
    assert nash(condorcet()).policy == pytest.approx([0.5, 0.2, 0.3], abs=1e-12)
    assert nash(GAMES["condorcet_45_30_25"]()).policy == pytest.approx([0.5, 0.1, 0.4], abs=1e-12)
    assert nash(GAMES["offline_ipo"]()).policy == pytest.approx(UNIFORM, abs=1e-12)
    assert regularised_nash(condorcet(), 1e-4).policy == pytest.approx([0.5, 0.2, 0.3], abs=1e-3)
    skewed = Game(condorcet().preferences, (), [0.2, 0.5, 0.3])
    assert regularised_nash(skewed, 1e7).policy == pytest.approx(skewed.leader_reference, abs=1e-6)
    assert regularised_nash(skewed, np.inf).policy == pytest.approx(skewed.leader_reference, abs=1e-15)


@QUICK
@given(games(largest=7))
def test_nash_cannot_be_exploited(game):
    solution = nash(game)
    assert (game.preferences.T @ solution.policy).min() >= 0.5 - 1e-9  # it loses to no action
    assert exploitability(game, solution.policy) == pytest.approx(solution.residual, abs=1e-15)
    assert solution.policy.min() >= 0 and solution.policy.sum() == pytest.approx(1, abs=1e-14)
    if (winner := condorcet_winner(game)) is not None:
        assert solution.policy[game.actions.index(winner)] == pytest.approx(1, abs=1e-9)
        assert stackelberg(game, 0, 0).policy[game.actions.index(winner)] == 1


@QUICK
@given(st.lists(st.integers(-8, 8), min_size=2, max_size=5, unique=True), st.sampled_from([0.05, 0.3]))
def test_with_bradley_terry_preferences_the_concepts_agree(rewards, tau):
    """Unregularised, Stackelberg, Nash and RLHF choose the same answer; regularised, they rank all answers alike."""
    rewards = np.array(rewards) / 4
    game, best = bradley_terry(rewards), int(np.argmax(rewards))
    for choice in (nash(game).policy, stackelberg(game, 0, 0).policy, tilted(game.leader_reference, rewards, 0)):
        assert choice[best] == pytest.approx(1, abs=1e-9)
    fitted = bradley_terry_rewards(game)[0]
    assert fitted == pytest.approx(rewards - rewards.mean(), abs=1e-8)
    order = np.argsort(rewards).tolist()
    assert np.argsort(stackelberg(game, tau, tau).scores).tolist() == order
    assert np.argsort(win_rates(game, regularised_nash(game, tau).policy)).tolist() == order
    assert np.argsort(offline_ipo(game, tau).policy).tolist() == order
    assert dpo(game, 1.0).policy == pytest.approx(tilted(game.leader_reference, rewards, 1.0), abs=1e-8)


def test_bradley_terry_digits():
    solution = stackelberg(bradley_terry((1, 0, -1)), 0.1, 0.1)
    assert solution.scores == pytest.approx([0.5984, 0.3685, 0.2071], abs=5e-5)
    assert solution.policy == pytest.approx([0.8926, 0.0895, 0.0178], abs=5e-5)
    assert stackelberg(bradley_terry((1, 0, -1)), 0, 0).scores == pytest.approx([0.5, 0.2689, 0.1192], abs=5e-5)


@pytest.mark.parametrize("coefficient", [0.0, 0.125, 0.5, 1.0])
def test_nash_md_by_playing_until_rest(coefficient):
    """Small steps along the published gradient p(y > m) - tau log(pi / ref), m mixed per log-probability."""
    game, tau = Game(condorcet().preferences, (), [0.2, 0.5, 0.3]), 0.1

    def update(policy):
        mixed = policy ** (1 - coefficient) * game.leader_reference**coefficient
        gain = game.preferences @ (mixed / mixed.sum()) - tau * np.log(policy / game.leader_reference)
        moved = policy * np.exp(0.2 * gain)
        return moved / moved.sum()

    solution = nash_md(game, tau, coefficient)
    assert solution.policy == pytest.approx(played(update), abs=1e-11)
    if coefficient == 0:
        assert solution.policy == pytest.approx(regularised_nash(game, tau).policy, abs=1e-12)
    if coefficient == 1:
        assert solution.policy == pytest.approx(best_response(game, game.leader_reference, tau).policy, abs=1e-12)
    else:
        mixed = mixture(solution.policy, game.leader_reference, coefficient)
        assert mixed == pytest.approx(regularised_nash(game, tau / (1 - coefficient)).policy, abs=1e-11)


@pytest.mark.parametrize("coefficient", [0.0, 0.125, 0.5])
def test_ipo_md_loss_is_stationary_at_the_fixed_point_of_nash_md(coefficient):
    """Pairs drawn from the mixture without gradient, labelled softly, under the package's own IPO loss."""
    game, tau = condorcet(), 0.1
    solution = nash_md(game, tau, coefficient)
    draws = torch.tensor(mixture(solution.policy, UNIFORM, coefficient))
    logits = torch.tensor(np.log(solution.policy), requires_grad=True)
    ratios = log_softmax(logits) - math.log(1 / 3)
    chances = torch.tensor(game.preferences)
    differences = ratios[:, None] - ratios[None, :]
    losses = chances * ipo_loss(differences, tau) + (1 - chances) * ipo_loss(-differences, tau)
    (torch.outer(draws, draws) * losses).sum().backward()
    assert logits.grad.numpy() == pytest.approx(0, abs=1e-9)


def test_nash_md_digits():
    rows = {
        0.0: (0.439365, 0.322488, 0.238147),
        0.125: (0.441442, 0.329141, 0.229417),
        0.25: (0.441826, 0.337692, 0.220482),
        0.5: (0.434302, 0.362039, 0.203659),
        1.0: (0.371088, 0.438389, 0.190523),
    }
    for coefficient, row in rows.items():
        assert nash_md(condorcet(), 0.1, coefficient).policy == pytest.approx(row, abs=DIGITS)
    mixed = mixture(nash_md(condorcet(), 0.1, 0.5).policy, UNIFORM, 0.5)
    assert mixed == pytest.approx([0.384940, 0.351458, 0.263602], abs=DIGITS)


@pytest.mark.parametrize(
    ("eta", "distances"),
    [(0.3, {3: 5.0e-3, 30: 2.7e-10}), (1.0, {3: 1.7e-2, 30: 7.6e-5}), (5.0, {3: 2.7e-2, 30: 9.3e-3})],
)
def test_rounds_of_inpo_approach_the_regularised_nash(eta, distances):
    game, tau = condorcet(), 0.1
    target, policy = regularised_nash(game, tau).policy, UNIFORM
    for number in range(1, 31):
        written = policy ** (1 - tau / eta) * UNIFORM ** (tau / eta) * np.exp(game.preferences @ policy / eta)
        policy = mirror_step(game, policy, 1 / eta, tau)
        assert policy == pytest.approx(written / written.sum(), abs=1e-14)
        if number in distances:
            assert kl(target, policy) == pytest.approx(distances[number], rel=0.03)


def test_rounds_of_nash_md_stay_within_the_published_bound():
    """KL(pi*, pi_T) <= 8 / (tau^2 (T + 1)) with eta_t = 2 / (tau (t + 2)), and the digits that this game gives."""
    game, tau = condorcet(), 0.1
    target, policy = regularised_nash(game, tau).policy, UNIFORM
    printed = {1: 2.83e-2, 10: 1.37e-3, 100: 8.80e-6, 1000: 9.2e-8}
    for number in range(1000):
        eta = 2 / (tau * (number + 2))
        policy = mirror_step(game, policy, eta, tau, mixture(policy, UNIFORM, eta * tau))
        assert kl(target, policy) <= 8 / (tau**2 * (number + 2))
        if number + 1 in printed:
            assert kl(target, policy) == pytest.approx(printed[number + 1], rel=0.01)


@pytest.mark.slow
def test_the_average_of_sppo_is_nash_and_its_last_iterate_is_not():
    game, policy, total = GAMES["rock_paper_scissors"](), np.array([0.5, 0.3, 0.2]), np.zeros(3)
    for _ in range(20_000):
        policy = mirror_step(game, policy, 0.1)
        total += policy
    assert total / 20_000 == pytest.approx(nash(game).policy, abs=5e-3)
    assert total / 20_000 == pytest.approx([0.3368, 0.3328, 0.3304], abs=1e-4)
    assert policy == pytest.approx([0.337, 0.000, 0.663], abs=1e-3)


def mixed_by_token(policy, reference, share):
    """(2, 2) over two binary tokens: the geometric mixture of each token's distribution, as samplers draw it."""
    first = policy.sum(1) ** (1 - share) * reference.sum(1) ** share
    second = (policy / policy.sum(1, keepdims=True)) ** (1 - share) * (
        reference / reference.sum(1, keepdims=True)
    ) ** share
    return (first / first.sum())[:, None] * second / second.sum(1, keepdims=True)


def test_nash_md_s_mixture_is_an_equilibrium_for_answers_of_one_token_only():
    """Fixed points pi ~ ref exp(p(y > mixture) / tau) by damped iteration. Mixing whole answers gives the equilibrium at
    tau / (1 - b), as ``solutions.nash_md`` says; mixing token by token ends elsewhere."""
    generator, share, tau = np.random.default_rng(0), 0.5, 0.1
    above = np.triu(generator.uniform(0, 1, (4, 4)), 1)
    preferences = above + np.tril(1 - above.T, -1) + np.eye(4) / 2
    reference = generator.dirichlet(np.ones(4)).reshape(2, 2)
    game = Game(preferences, leader_reference=reference.ravel())

    def mixed_whole(policy):
        mixture = policy ** (1 - share) * reference**share
        return mixture / mixture.sum()

    equilibrium = regularised_nash(game, tau / (1 - share)).policy
    mixtures = []
    for mix in (mixed_whole, lambda policy: mixed_by_token(policy, reference, share)):
        policy = reference
        for _ in range(3000):
            target = reference * np.exp(preferences @ mix(policy).ravel() / tau).reshape(2, 2)
            policy = policy**0.9 * (target / target.sum()) ** 0.1
            policy = policy / policy.sum()
        mixtures.append(mix(policy).ravel())
    assert np.abs(mixtures[0] - equilibrium).max() < 1e-9
    assert np.abs(mixtures[1] - equilibrium).max() == pytest.approx(0.1, abs=0.01)
