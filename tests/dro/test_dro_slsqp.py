"""The re-statement of the released follower: what it returns is what it says, and where it falls back."""

import math

import pytest
import scipy.optimize
import torch

from openrlhf_sgpo.dro import slsqp, solve_worst_case
from openrlhf_sgpo.dro.losses import piece_tangents

MARGINS = torch.tensor([0.1, 0.4, 0.8, 1.3, 2.0], dtype=torch.float64)


def test_reports_describe_the_returned_law():
    solution = slsqp(MARGINS, 0.05)
    s, displacement = solution.s, solution.displacement
    atoms = torch.sigmoid(MARGINS)[:, None] - displacement
    slopes, offsets = piece_tangents("probability", 6, (0.0, 1.0))
    every = offsets + slopes * atoms[..., None]  # (N, K, K): every piece at every atom
    assert solution.value == pytest.approx(float((s * every.amax(-1)).sum()) / 5)
    assert solution.objective == pytest.approx(float((s * every.diagonal(dim1=1, dim2=2)).sum()) / 5)
    assert solution.objective <= solution.value
    assert solution.distance == pytest.approx(float((s * displacement).abs().sum()) / 5)
    assert 0 < solution.iterations <= 50
    assert float(s.min()) >= 1e-5 - 1e-12 and float((s * displacement).abs().max()) <= 0.05 + 1e-12


def test_attacks_but_not_beyond_the_exact_value_of_the_ball_it_used():
    solution = slsqp(MARGINS, 0.05)
    exact = solve_worst_case(MARGINS, solution.distance, space="probability")
    plain = solve_worst_case(MARGINS, 0.0, space="probability").value
    assert plain < solution.value
    slack = 6 * float((solution.s.sum(1) - 1).abs().mean())  # weights that do not sum to 1 are not a law
    assert solution.value <= exact.value + slack + 1e-6


def test_iteration_limit():
    solution = slsqp(MARGINS, 0.05, maximum_iterations=1)
    assert (solution.iterations, solution.success) == (1, False)


def check_is_the_start(solution, pieces):
    assert torch.equal(solution.s, torch.full((5, pieces), 1 / pieces, dtype=torch.float64))
    assert not solution.displacement.any() and solution.distance == 0.0
    plain = solve_worst_case(MARGINS, 0.0, space="probability", pieces=pieces).value
    assert solution.value == pytest.approx(plain)


def test_tiny_radius_keeps_the_start():
    solution = slsqp(MARGINS, 1e-5, pieces=4)
    check_is_the_start(solution, 4)
    assert (solution.success, solution.iterations) == (True, 0)


def test_value_error_of_the_solver_falls_back_to_the_start(monkeypatch):
    def fail(*_, **__):
        raise ValueError("`x0` violates bound constraints.")

    monkeypatch.setattr(scipy.optimize, "minimize", fail)
    solution = slsqp(MARGINS, 0.05)
    check_is_the_start(solution, 6)
    assert (solution.success, solution.iterations) == (False, 0)


def test_released_settings_reach_the_solver(monkeypatch):
    seen = {}

    def record(objective, start, **keywords):
        seen.update(keywords, objective=objective, start=start)
        raise ValueError

    monkeypatch.setattr(scipy.optimize, "minimize", record)
    slsqp(MARGINS, 0.05, pieces=2)
    assert seen["method"] == "SLSQP" and seen["options"] == {"maxiter": 50}
    assert seen["bounds"] == [(1e-5, 1.0)] * 10 + [(-0.05, 0.05)] * 10
    equality, ball = (constraint["fun"](seen["start"]) for constraint in seen["constraints"])
    assert equality.tolist() == [0.0] * 5 and ball == pytest.approx(0.25)
    inside = seen["objective"](seen["start"])
    outside = seen["start"].copy()
    outside[0] = 0.4  # row 0 then sums to 0.9: penalty 1e5 * K * 0.1
    assert seen["objective"](outside) - inside == pytest.approx(2e4, rel=1e-4)
    below = seen["start"].copy()
    below[10] = 0.5 * (float(torch.sigmoid(MARGINS[0])) + 0.01)  # atom at -0.01
    assert seen["objective"](below) - inside == pytest.approx(1e3, rel=1e-2)


@pytest.mark.parametrize("bad", [-0.1, math.nan])
def test_rejects_a_bad_radius(bad):
    with pytest.raises(ValueError, match="radius"):
        slsqp(MARGINS, bad)
