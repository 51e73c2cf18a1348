"""COMAL: INPO without a reset, a proximal step for each reset, and the reference of a real run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from openrlhf_sgpo import games
from openrlhf_sgpo.algorithms.comal import COMAL, COMALSettings
from openrlhf_sgpo.algorithms.inpo import INPO, INPOSettings
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.games.drive import drive, start

TAU, ETA = 0.1, 0.12
GAME = games.GAMES["condorcet"]()
SKEWED = (0.1, 0.2, 0.7)


def driven(algorithm, rounds):
    settings = {"steps": 2000, "learning_rate": 1.0, "rounds": rounds, "settled": 1e-8}
    return drive(GAME, algorithm, policies=start(GAME, SKEWED), **settings)


def test_without_a_reset_it_is_inpo():
    inpo = driven(INPO(INPOSettings(ETA), TAU), 4)
    for never in (0, 4):
        assert np.array_equal(driven(COMAL(COMALSettings(ETA, never), TAU), 4).policies, inpo.policies)
    assert not np.array_equal(driven(COMAL(COMALSettings(ETA, 3), TAU), 4).policies[-1], inpo.policies[-1])


@pytest.mark.slow
def test_a_reset_is_a_proximal_step():
    """Forty rounds solve the game that is regularised by the reference; its solution is the next reference."""
    reached = driven(COMAL(COMALSettings(0.3, 40), TAU), 80).rounds[40::40]
    game = GAME
    for policy in reached:
        assert np.allclose(policy, games.regularised_nash(game, TAU).policy, atol=1e-5)
        game = replace(game, leader_reference=policy)
    nash = games.nash(GAME).policy
    distances = [games.kl(nash, policy) for policy in reached]
    assert np.all(np.diff(distances) < 0)  # what the proof of convergence rests on


def test_a_reset_after_every_round_is_multiplicative_weights():
    ends = driven(COMAL(COMALSettings(ETA, 1), TAU), 3).rounds
    # The first round is relative to the initial reference as well.
    for before, after in pairwise(ends[1:]):
        assert np.allclose(after, games.mirror_step(GAME, before, 1 / ETA), atol=1e-7)


def test_a_reference_that_is_never_reset_is_an_error():
    config = Config()
    config.rounds.count = 3
    (problem,) = COMAL(COMALSettings(0.0075, 3), 0.0025).problems(config)
    assert problem.startswith("--comal.reference_rounds: 3") and "--algo inpo" in problem
    assert COMAL(COMALSettings(0.0075, 2), 0.0025).problems(config) == []
    with pytest.raises(ValueError, match=r"--comal.inverse_step 0.1 must be larger"):
        COMAL(COMALSettings(0.1), 0.1)
