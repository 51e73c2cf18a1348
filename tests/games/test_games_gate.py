"""The gate as a user starts it: the table, the picture, and an algorithm that misses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from openrlhf_sgpo import algorithms
from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.games import GAMES, gate, last_iterates, regularised_nash


@pytest.mark.slow
def test_every_algorithm_reaches_its_own_solution(tmp_path, capsys):
    assert main(["games", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [check.title for check in gate.CHECKS]
    assert [line.split("  ")[0] for line in lines[1 : 1 + len(titles)]] == titles
    assert not any("MISSED" in line for line in lines)
    for picture in ("policy_paths", "last_iterates"):
        assert (tmp_path / f"{picture}.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_last_iterates_arrive_or_circle():
    """Half steps and moving references, where long steps keep the others away from the equilibrium."""
    errors = {check.algorithm.name: gate.play(check).error for check in last_iterates.RUNS}
    assert errors["egpo"] < 1e-6 and errors["comal"] < 1e-3
    assert errors["nash_md"] > 0.1 and errors["inpo"] > 0.1


def test_every_algorithm_that_minimises_a_value_has_a_row():
    """Not those whose follower is frozen for a round by its own rule, which minimise none, nor the one that trains a judge, nor
    the one whose penalty is on embeddings, which games do not have."""
    others = {"sgpo_transport", "sgpo_released", "preference_model", "w_dpo"}
    assert {check.algorithm.name for check in gate.CHECKS} == algorithms.BUILT_INS.keys() - others


def test_a_wrong_target_is_missed(monkeypatch, capsys):
    monkeypatch.setattr(gate, "CHECKS", (replace(_check("rloo"), target=lambda game: regularised_nash(game, 0.2)),))
    assert main(["games"]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_the_paths_begin_where_they_say():
    result = gate.play(replace(_check("nash_md, mixture 0"), steps=3))
    assert result.path.shape == (4, GAMES["condorcet"]().size)
    assert np.allclose(result.path[0], gate.SKEWED)
    assert not result.passed


def _check(title):
    return next(check for check in gate.CHECKS if check.title == title)
