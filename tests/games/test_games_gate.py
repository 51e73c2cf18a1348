"""The gate as a user starts it: the table, the picture, and an algorithm that misses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from openrlhf_sgpo import algorithms
from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.games import GAMES, gate, last_iterates, regularised_nash
from openrlhf_sgpo.games.drive import drive, expected_loss, start


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


@pytest.mark.parametrize(
    "check",
    [check for check in gate.CHECKS if getattr(check.algorithm, "steps_per_sync", 0)],
    ids=lambda check: check.title,
)
def test_answers_of_one_step_ago_lead_to_the_same_solution(check):
    """Where the gate's steps are long, a delay makes the path swing around the solution: it takes shorter ones."""
    shorter = 0.5 if check.algorithm.name == "online_dpo" else 1.0
    assert gate.play(replace(check, learning_rate=shorter * check.learning_rate), behind=True).passed


def test_answers_that_are_behind_are_one_step_old():
    """By hand: gradient steps on the expected loss, whose answers are those of the start twice, then of the first step."""
    game, algorithm = GAMES["condorcet"](), _check("rloo").algorithm
    path = drive(game, algorithm, steps=3, learning_rate=1.0, policies=start(game, gate.SKEWED), behind=True).policies
    policies = start(game, gate.SKEWED)
    logits = [policies.policy.detach()]
    for answering in (0, 0, 1):
        policies.answering = logits[answering], policies.follower.detach()
        (gradient,) = torch.autograd.grad(expected_loss(game, algorithm, policies), policies.policy)
        logits.append(logits[-1] - gradient)
        policies.policy = logits[-1].clone().requires_grad_()
    assert np.allclose(path, torch.stack(logits).softmax(-1), rtol=0, atol=1e-12)


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
