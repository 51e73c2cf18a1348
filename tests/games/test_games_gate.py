"""The gate as a user starts it: the table, the picture, and an algorithm that misses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.games import GAMES, gate, regularised_nash


@pytest.mark.slow
def test_every_algorithm_reaches_its_own_solution(tmp_path, capsys):
    assert main(["games", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [check.title for check in gate.CHECKS]
    assert [line.split("  ")[0] for line in lines[1 : 1 + len(titles)]] == titles
    assert {check.algorithm.name for check in gate.CHECKS} >= {
        "slhf",
        "nash_md",
        "online_ipo",
        "ipo_md",
        "rloo",
        "inpo",
        "sppo",
    }
    assert not any("MISSED" in line for line in lines)
    assert (tmp_path / "policy_paths.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_a_wrong_target_is_missed(monkeypatch, capsys):
    rloo = next(check for check in gate.CHECKS if check.title == "rloo")
    monkeypatch.setattr(gate, "CHECKS", (replace(rloo, target=lambda game: regularised_nash(game, 0.2)),))
    assert main(["games"]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_the_paths_begin_where_they_say():
    result = gate.play(replace(gate.CHECKS[2], steps=3))
    assert result.path.shape == (4, GAMES["condorcet"]().size)
    assert np.allclose(result.path[0], gate.SKEWED)
    assert not result.passed
