"""Every on-policy algorithm's own loss on tabular games: at rest exactly at its solution, and drawn there from elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from openrlhf_sgpo import flags, games
from openrlhf_sgpo.algorithms.inpo import INPO, INPOSettings
from openrlhf_sgpo.algorithms.ipo_md import IPOMD, IPOMDSettings
from openrlhf_sgpo.algorithms.nash_md import NashMD, NashMDSettings
from openrlhf_sgpo.algorithms.online_ipo import OnlineIPO
from openrlhf_sgpo.algorithms.plays import Plays
from openrlhf_sgpo.algorithms.rloo import RLOO, RLOOSettings
from openrlhf_sgpo.algorithms.slhf import SLHF, SLHFSettings
from openrlhf_sgpo.algorithms.sppo import SPPO, SPPOSettings
from openrlhf_sgpo.games.drive import drive, expected_loss, start

pytestmark = pytest.mark.slow

TAU = 0.1
GAME = games.GAMES["condorcet"]()
SKEWED = (0.1, 0.2, 0.7)


def gradients(game, algorithm, policy, follower=None):
    """Gradients of the expected loss at policies with these probabilities."""
    policies = start(game, policy, follower)
    parameters = [policies.policy, policies.follower]
    derivatives = torch.autograd.grad(expected_loss(game, algorithm, policies), parameters, allow_unused=True)
    return [torch.zeros(()) if derivative is None else derivative for derivative in derivatives]


def solution_of(algorithm, game=GAME, tau=TAU):
    if isinstance(algorithm, (NashMD, IPOMD)):
        return games.nash_md(game, tau, algorithm.mixture).policy
    return games.regularised_nash(game, tau).policy


SELF_PLAY = [
    NashMD(NashMDSettings(mixture=0.0), TAU),
    NashMD(NashMDSettings(mixture=0.125), TAU),
    NashMD(NashMDSettings(mixture=0.5), TAU),
    OnlineIPO(None, TAU),
    IPOMD(IPOMDSettings(mixture=0.125), TAU),
    IPOMD(IPOMDSettings(mixture=0.5), TAU),
    RLOO(RLOOSettings(answers=2), TAU),
    RLOO(RLOOSettings(answers=4), TAU),
    INPO(INPOSettings(inverse_step=0.3), TAU),
]


def label(algorithm):
    return f"{algorithm.name}-{getattr(algorithm, 'mixture', 0)}-{len(algorithm.roles)}"


@pytest.mark.parametrize("algorithm", SELF_PLAY, ids=label)
def test_at_rest_at_its_own_solution_and_nowhere_else(algorithm):
    target = solution_of(algorithm)
    here, _ = gradients(GAME, algorithm, target)
    assert here.abs().max() < 1e-10
    others = [games.nash_md(GAME, TAU, 0.25).policy, games.stackelberg(GAME, TAU, TAU).policy, np.full(3, 1 / 3)]
    if abs(target - games.regularised_nash(GAME, TAU).policy).max() > 1e-4:
        others.append(games.regularised_nash(GAME, TAU).policy)
    for other in others:
        away, _ = gradients(GAME, algorithm, other)
        assert away.abs().max() > 1e-5


@pytest.mark.parametrize(
    ("algorithm", "learning_rate"),
    [(SELF_PLAY[1], 2.0), (SELF_PLAY[3], 0.02), (SELF_PLAY[4], 0.02), (SELF_PLAY[6], 2.0)],
    ids=lambda value: value if isinstance(value, float) else label(value),
)
def test_reaches_its_solution(algorithm, learning_rate):
    path = drive(GAME, algorithm, steps=1500, learning_rate=learning_rate, policies=start(GAME, SKEWED))
    assert abs(path.policies[0] - SKEWED).max() < 1e-12
    assert abs(path.policies[-1] - solution_of(algorithm)).max() < 1e-4


@pytest.mark.parametrize("credit", [True, False])
def test_slhf_leader_and_follower(credit):
    algorithm = SLHF(SLHFSettings(follower_kl_credit=credit), TAU)
    exact = games.stackelberg(GAME, TAU, TAU, follower_kl_credit=credit)
    leader, follower = gradients(GAME, algorithm, exact.policy, exact.follower)
    assert max(leader.abs().max(), follower.abs().max()) < 1e-10
    path = drive(GAME, algorithm, steps=2000, learning_rate=1.0, policies=start(GAME, SKEWED))
    assert abs(path.policies[-1] - exact.policy).max() < 1e-4
    # The reply to a draft that is rarely given is learnt more slowly.
    assert abs(path.followers[-1] - exact.follower).max() < 1e-3


def test_slhf_taus_are_independent_and_several_followers_change_nothing_in_expectation():
    exact = games.stackelberg(GAME, 0.2, 0.05)
    for followers in (1, 2):
        algorithm = SLHF(SLHFSettings(follower_beta=0.05, followers=followers), 0.2)
        leader, follower = gradients(GAME, algorithm, exact.policy, exact.follower)
        assert max(leader.abs().max(), follower.abs().max()) < 1e-10


def test_kappa_weighs_the_follower_alone():
    plain, scaled = (gradients(GAME, SLHF(SLHFSettings(kappa=kappa), TAU), SKEWED) for kappa in (1.0, 5.0))
    assert torch.allclose(plain[0], scaled[0], atol=1e-14)
    assert torch.allclose(5 * plain[1], scaled[1], atol=1e-14)
    assert plain[1].abs().max() > 1e-3


def test_alternating_steps_are_the_two_losses_in_turn():
    settings = SLHFSettings(kappa=2.0, kappa_mode="alternate")
    assert SLHF.option_problems(settings) == [] and SLHF.option_problems(
        SLHFSettings(kappa=0.5, kappa_mode="alternate")
    )
    plays = Plays(*(torch.rand(4, 2, 1) for _ in range(3)), torch.rand(4, 2, 2))
    alternating = SLHF(settings, TAU)
    losses = [alternating.loss(replace(plays, step=step)) for step in range(1, 7)]
    assert [torch.equal(loss, losses[0]) for loss in losses] == [True, True, False, True, True, False]
    assert torch.allclose(losses[0] + losses[2], SLHF(SLHFSettings(kappa=1.0), TAU).loss(plays))


@pytest.mark.parametrize("level", ["reward_to_go", "token_local", "full_vocabulary"])
def test_every_divergence_has_the_same_fixed_point_for_answers_of_one_token(level):
    exact = games.stackelberg(GAME, TAU, TAU)
    leader, follower = gradients(GAME, SLHF(SLHFSettings(kl_level=level), TAU), exact.policy, exact.follower)
    assert max(leader.abs().max(), follower.abs().max()) < 1e-10
    nash = games.nash_md(GAME, TAU, 0.25).policy
    moved, _ = gradients(GAME, NashMD(NashMDSettings(0.25, level), TAU), nash)
    assert moved.abs().max() < 1e-8


@pytest.mark.slow
def test_sampled_votes_tell_the_two_slhf_gradients_apart():
    """Single votes and 256 plays a step, the mean of the second half: about .500 with the credit, .565 without."""
    means = {}
    for credit in (True, False):
        algorithm = SLHF(SLHFSettings(follower_kl_credit=credit), TAU)
        path = drive(GAME, algorithm, steps=4000, learning_rate=0.1, samples=256, seed=1)
        means[credit] = path.policies[2000:].mean(0)
        exact = games.stackelberg(GAME, TAU, TAU, follower_kl_credit=credit).policy
        assert abs(means[credit] - exact).max() < 0.015
    assert means[False][0] - means[True][0] > 0.04


def test_sppo_circles_and_its_average_arrives():
    """Multiplicative steps on rock-paper-scissors, each round's regression solved: the average nears Nash, the last not."""
    game = games.GAMES["rock_paper_scissors"]()
    algorithm = SPPO(SPPOSettings(answers=2, step=0.5, train_on="all"), TAU)
    path = drive(game, algorithm, steps=15, learning_rate=1.0, rounds=200, policies=start(game, (0.5, 0.3, 0.2)))
    ends = path.rounds[1:]
    # With itself among two answers, an answer's win rate moves half as far from one half: the step is 0.25.
    assert abs(ends[0] - games.mirror_step(game, (0.5, 0.3, 0.2), 0.25)).max() < 1e-3
    assert abs(ends[-1] - 1 / 3).max() > 0.1
    assert abs(ends.mean(0) - 1 / 3).max() < 0.03


def test_a_round_of_inpo_is_the_mirror_step():
    eta = 0.3
    algorithm = INPO(INPOSettings(inverse_step=eta), TAU)
    path = drive(GAME, algorithm, steps=3000, learning_rate=0.5, policies=start(GAME, SKEWED))
    anchored = (TAU / eta) * np.log(GAME.leader_reference) + (1 - TAU / eta) * np.log(SKEWED)
    expected = np.exp(anchored + games.win_rates(GAME, SKEWED) / eta)
    assert abs(path.policies[-1] - expected / expected.sum()).max() < 1e-6


def test_an_indifferent_oracle_leaves_the_reference():
    game = games.GAMES["indifferent"]()
    for algorithm in [*SELF_PLAY, SLHF(SLHFSettings(), TAU)]:
        for gradient in gradients(game, algorithm, game.leader_reference):
            assert gradient.abs().max() < 1e-12


def test_rloo_counts_the_preference_once():
    """With leave-one-out means of win rates as baseline the preference would count twice with two answers."""
    two, four = (gradients(GAME, RLOO(RLOOSettings(answers=count), TAU), SKEWED)[0] for count in (2, 4))
    assert torch.allclose(two, four, atol=1e-12)


@pytest.mark.parametrize(
    ("algorithm", "options", "flag"),
    [
        (NashMD, NashMDSettings(mixture=1.5), "--nash_md.mixture: 1.5 is out of range"),
        (IPOMD, IPOMDSettings(mixture=-0.1), "--ipo_md.mixture: -0.1 is out of range"),
        (RLOO, RLOOSettings(answers=1), "--rloo.answers: 1 is out of range"),
        (SPPO, SPPOSettings(answers=1), "--sppo.answers: 1 is out of range"),
        (SPPO, SPPOSettings(step=0.0), "--sppo.step: 0.0 is out of range"),
        (INPO, INPOSettings(inverse_step=0.0), "--inpo.inverse_step: 0.0 is out of range"),
        (SLHF, SLHFSettings(followers=0), "--slhf.followers: 0 is out of range"),
        (SLHF, SLHFSettings(follower_prompt=" "), "--slhf.follower_prompt is empty"),
    ],
)
def test_settings_out_of_range_are_named(algorithm, options, flag):
    (problem,) = flags.out_of_range({algorithm.name: options}) or algorithm.option_problems(options)
    assert problem.startswith(flag)
    assert algorithm.option_problems(algorithm.settings()) == []
