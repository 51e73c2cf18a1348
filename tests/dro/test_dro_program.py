"""The exact solution against the paper's program, solved by cvxpy and HiGHS; the package's lazy names."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_sgpo.dro import program, solve_worst_case
from openrlhf_sgpo.dro.losses import loss_slope, loss_value, piece_tangents


@st.composite
def instances(draw):
    count = draw(st.sampled_from([1, 2, 5, 9]))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    margins = draw(st.sampled_from([0.3, 1.0, 3.0])) * torch.randn(count, dtype=torch.float64, generator=generator)
    kind = draw(st.sampled_from(["any", "ties", "equal"]))
    if kind == "ties":
        margins = margins.round()
    elif kind == "equal":
        margins = margins[:1].repeat(count)
    space = draw(st.sampled_from(["margin", "probability"]))
    keywords = {"space": space, "pieces": draw(st.one_of(st.none(), st.integers(1, 8), st.integers(9, 64)))}
    if draw(st.booleans()):
        keywords["price"] = 0.3 + 3 * torch.rand(count, dtype=torch.float64, generator=generator)
    if draw(st.booleans()):
        values = margins if space == "margin" else torch.sigmoid(margins)
        middle = float(values.median())  # samples may lie on both sides of the window
        keywords["window"] = (middle - 0.5, middle + 0.4) if space == "margin" else (middle / 2, (1 + middle) / 2)
    radius = draw(st.sampled_from([0.0, 0.001, 0.05, 0.2, 0.6, 8.0]))
    return margins, radius, keywords


@pytest.mark.slow
@settings(max_examples=80)
@given(instances())
def test_value_equals_the_program_and_transport_solves_it(instance):
    margins, radius, keywords = instance
    solution = solve_worst_case(margins, radius, **keywords)
    reference = program(margins, radius, **keywords)
    assert solution.value == pytest.approx(reference.value, abs=1e-8)

    s, q = solution.transport()
    values = (torch.sigmoid(margins) if solution.space == "probability" else margins)[:, None]
    edge, last = solution.window
    first, last = values.clamp(max=edge), values.clamp(min=last)  # a sample outside the window may stay there
    price = torch.ones_like(margins) if solution.price is None else solution.price
    assert (s >= 0).all()
    torch.testing.assert_close(s.sum(1), torch.ones_like(margins), rtol=0, atol=1e-15)
    assert float((price[:, None] * q.abs()).sum()) <= len(margins) * radius * (1 + 1e-12)
    assert (first * s <= s * values - q + 1e-13).all() and (s * values - q <= last * s + 1e-13).all()
    if solution.pieces is None:
        # Two columns: the tangent of the loss at the sample for what stays, and at the edge for what moves.
        points = torch.cat([values, torch.full_like(values, edge)], dim=1)
        slopes = loss_slope(points, space="margin", pieces=None)
        offsets = loss_value(points, space="margin", pieces=None) - slopes * points
    else:
        slopes, offsets = piece_tangents(solution.space, solution.pieces, solution.window)
    attained = float((s * (offsets + slopes * values) - slopes * q).sum()) / len(margins)
    assert attained == pytest.approx(solution.value, rel=1e-12)


@pytest.mark.parametrize(("space", "pieces"), [("margin", 6), ("probability", 6)])
def test_agreement_at_a_few_hundred_samples(space, pieces):
    margins = np.random.default_rng(0).normal(size=300)
    solution = solve_worst_case(torch.from_numpy(margins), 0.05, space=space, pieces=pieces)
    reference = program(margins, 0.05, space=space, pieces=pieces)
    assert reference.status == "optimal"
    assert solution.value == pytest.approx(reference.value, abs=1e-8)
    assert reference.s.shape == reference.q.shape == (300, 6)
    assert float(reference.q.abs().sum()) <= 300 * 0.05 * (1 + 1e-8)


def test_program_says_when_the_solver_fails(monkeypatch):
    import cvxpy

    monkeypatch.setattr(cvxpy.Problem, "solve", lambda self, **_: None)
    with pytest.raises(RuntimeError, match="did not solve the program of 2 samples and 3 pieces"):
        program(torch.zeros(2), 0.1, pieces=3)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_importing_the_room_loads_neither_cvxpy_nor_scipy():
    code = "import sys, openrlhf_sgpo.dro; assert not {'cvxpy', 'scipy'} & set(sys.modules), 'loaded'"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["pass", "import openrlhf_sgpo.dro.program, openrlhf_sgpo.dro.slsqp"])
def test_lazy_names_are_functions_even_after_their_files_were_imported(first):
    result = run_python(
        f"{first}; from openrlhf_sgpo.dro import program, slsqp; assert program.__call__ and slsqp.__call__"
    )
    assert result.returncode == 0, result.stderr


def test_unknown_name_is_an_attribute_error():
    import openrlhf_sgpo.dro

    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        openrlhf_sgpo.dro.missing  # noqa: B018
