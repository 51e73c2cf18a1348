"""Games: what is refused, what the constructors mean, and the facts that follow from a matrix alone."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_sgpo.games import GAMES, Game, condorcet_winner, cycles, win_rate, win_rates
from openrlhf_sgpo.games.tabular import bradley_terry, condorcet, cycle, from_voters, offline_ipo_game

QUICK = settings(max_examples=60)


@st.composite
def tournaments(draw, largest=5):
    """Matrices whose entries are ties, certain or in between, so that cycles of every kind occur."""
    size = draw(st.integers(1, largest))
    preferences = np.full((size, size), 0.5)
    for row, column in itertools.combinations(range(size), 2):
        preferences[row, column] = draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
        preferences[column, row] = 1 - preferences[row, column]
    return Game(preferences)


@pytest.mark.parametrize("name", GAMES)
def test_every_named_game_is_a_game(name):
    game = GAMES[name]()
    assert np.allclose(game.preferences + game.preferences.T, 1, atol=1e-15, rtol=0)
    assert game.preferences.shape == game.follower_reference.shape == (game.size, game.size)
    assert game.leader_reference.tolist() == [1 / game.size] * game.size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preferences": [[0.5, 0.7], [0.4, 0.5]]}, r"p\(A > B\) = 0.7 and p\(B > A\) = 0.4 do not sum to 1"),
        ({"preferences": [[0.5, 0.7], [0.3, 0.6]]}, r"preferences\[1, 1\] is 0.6; the diagonal"),
        ({"preferences": [[0.5, 1.2], [-0.2, 0.5]]}, r"preferences\[0, 1\] = p\(A > B\) is 1.2"),
        ({"preferences": [[0.5, float("nan")], [0.5, 0.5]]}, r"preferences\[0, 1\] .* is nan"),
        ({"preferences": [[0.5, 0.5]]}, "square"),
        ({"preferences": np.zeros((0, 0))}, "square"),
        ({"actions": ("x", "x")}, "2 different names"),
        ({"actions": ("x", "y", "z")}, "2 different names"),
        ({"leader_reference": [0.5, 0.6]}, "leader_reference sums to 1.1"),
        ({"leader_reference": [1.0, 0.0]}, r"leader_reference\[1\] is 0.0; it must be finite and positive"),
        ({"leader_reference": [1.0]}, r"leader_reference has shape \(1,\)"),
        ({"follower_reference": [1.0, 0.0]}, r"follower_reference\[1\] is 0.0"),
        ({"follower_reference": [[0.5, 0.5], [0.0, 1.0]]}, r"follower_reference\[1\]\[0\] is 0.0"),
        ({"follower_reference": [[0.5, 0.5]]}, r"follower_reference has shape \(1, 2\)"),
        ({"follower_reference": 0.5}, r"follower_reference has shape \(\)"),
        ({"behaviour": [1.5, -0.5]}, r"behaviour\[1\] is -0.5"),
        ({"behaviour": [float("inf"), 0.0]}, r"behaviour\[0\] is inf"),
    ],
)
def test_what_is_not_a_game_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Game(**{"preferences": [[0.5, 0.7], [0.3, 0.5]], **arguments})


def test_defaults_and_rows_of_references():
    preferences = [[0.5, 0.7], [0.3, 0.5]]
    plain = Game(preferences, leader_reference=[0.9, 0.1])
    assert plain.actions == ("A", "B")
    assert plain.behaviour.tolist() == [0.9, 0.1]  # data come from the reference unless said otherwise
    assert plain.follower_reference.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert Game(preferences, follower_reference=[0.2, 0.8]).follower_reference.tolist() == [[0.2, 0.8]] * 2
    rows = [[0.2, 0.8], [0.6, 0.4]]
    assert Game(preferences, follower_reference=rows).follower_reference.tolist() == rows
    assert Game(np.full((27, 27), 0.5)).actions[26] == "a26"


def test_a_game_does_not_change_with_its_inputs():
    preferences, reference = np.array([[0.5, 0.7], [0.3, 0.5]]), np.array([0.5, 0.5])
    game = Game(preferences, leader_reference=reference)
    preferences[0, 1] = reference[0] = 0.0
    assert game.preferences[0, 1] == 0.7
    assert game.leader_reference[0] == 0.5
    for array in (game.preferences, game.leader_reference, game.follower_reference, game.behaviour):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0


def test_condorcet_is_the_count_of_voters():
    """20 voters, 8, 7 and 5 of each order, polled pair by pair."""
    voters = ["ABC"] * 8 + ["BCA"] * 7 + ["CAB"] * 5
    for row, column in itertools.permutations(range(3), 2):
        ayes = sum(order.index("ABC"[row]) < order.index("ABC"[column]) for order in voters)
        assert condorcet(0.40, 0.35, 0.25).preferences[row, column] == pytest.approx(ayes / 20, abs=1e-15)
    assert condorcet().preferences == pytest.approx(np.array([[0.5, 0.65, 0.4], [0.35, 0.5, 0.75], [0.6, 0.25, 0.5]]))


def test_voters_may_list_actions_in_another_order():
    game = from_voters((0.75, 0.25), (("no", "yes"), ("yes", "no")), actions=("yes", "no"))
    assert game.actions == ("yes", "no")
    assert game.preferences[0, 1] == 0.25
    with pytest.raises(ValueError, match=r"orders\[1\] is AAC; it must rank each"):
        from_voters((0.5, 0.5), ("ABC", "AAC"))
    with pytest.raises(ValueError, match="shares sums to"):
        from_voters((0.5, 0.6), ("AB", "BA"))


@QUICK
@given(st.lists(st.floats(-800, 800), min_size=1, max_size=6))
def test_bradley_terry_has_the_odds_of_its_rewards(rewards):
    preferences = bradley_terry(rewards).preferences
    for row, column in itertools.permutations(range(len(rewards)), 2):
        if (difference := rewards[row] - rewards[column]) < 30:
            ratio = preferences[row, column] / preferences[column, row]
            assert ratio == pytest.approx(np.exp(max(difference, -700)), rel=1e-9) or difference < -700


def test_cycle_of_chances():
    assert cycle().preferences.tolist() == [[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]
    assert offline_ipo_game().preferences[2, 0] == 5 / 9
    assert offline_ipo_game().behaviour.tolist() == pytest.approx([0.6, 0.3, 0.1])
    with pytest.raises(ValueError, match=r"must be within \[0, 1\]"):
        cycle(1.1)


def test_win_rates_are_averages_over_the_opponent():
    game = condorcet()
    assert win_rates(game, [0, 0, 1]).tolist() == pytest.approx([0.4, 0.75, 0.5])
    assert win_rate(game, [0.5, 0.5, 0], [0, 0, 1]) == pytest.approx(0.575)
    with pytest.raises(ValueError, match="opponent sums to 0.9"):
        win_rates(game, [0.4, 0.4, 0.1])


@QUICK
@given(tournaments(), st.randoms(use_true_random=False))
def test_a_policy_draws_against_itself_and_chances_add_up(game, random):
    first, second = ([random.random() + 0.01 for _ in range(game.size)] for _ in range(2))
    first, second = np.array(first) / sum(first), np.array(second) / sum(second)
    assert win_rate(game, first, first) == pytest.approx(0.5, abs=1e-15)
    assert win_rate(game, first, second) + win_rate(game, second, first) == pytest.approx(1, abs=1e-15)


@QUICK
@given(tournaments())
def test_cycles_and_winner_by_enumeration(game):
    """Every simple cycle of strict majorities, found by trying all sequences, lies in a group, and groups hold no more."""
    beats = game.preferences > 0.5
    on_cycle = {index: set() for index in range(game.size)}
    for length in range(2, game.size + 1):
        for sequence in itertools.permutations(range(game.size), length):
            if all(beats[a, b] for a, b in zip(sequence, sequence[1:] + sequence[:1], strict=True)):
                for index in sequence:
                    on_cycle[index] |= set(sequence)
    groups = cycles(game)
    names = [name for group in groups for name in group]
    assert sorted(names) == [game.actions[index] for index in range(game.size) if on_cycle[index]]
    for group in groups:
        members = {game.actions.index(name) for name in group}
        assert all(on_cycle[index] <= members for index in members)
    winners = [i for i in range(game.size) if all(beats[i, j] for j in range(game.size) if j != i)]
    assert condorcet_winner(game) == (game.actions[winners[0]] if winners else None)


def test_two_separate_circles_are_two_groups():
    preferences = np.ones((6, 6))
    preferences[:3, :3] = preferences[3:, 3:] = cycle().preferences
    preferences[3:, :3] = 0
    assert cycles(Game(preferences)) == (("A", "B", "C"), ("D", "E", "F"))
    assert cycles(bradley_terry()) == ()
    assert condorcet_winner(bradley_terry()) == "A"
    assert condorcet_winner(condorcet()) is None
    assert condorcet_winner(condorcet(0.6, 0.2, 0.2)) == "A"


def test_games_need_numpy_only():
    code = (
        "import sys, openrlhf_sgpo.games; "
        "loaded = [m for m in ('torch', 'scipy', 'matplotlib', 'openrlhf') if m in sys.modules]; assert not loaded, loaded"
    )
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert process.returncode == 0, process.stderr
