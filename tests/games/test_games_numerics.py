"""Regularised choices: optimality, limits, digits that survive; Newton's method: it says when it failed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_sgpo.games import NotConverged, kl, mixture, tilted
from openrlhf_sgpo.games.numerics import newton, regret, soft_value

QUICK = settings(max_examples=80)
REFERENCE, SCORES = np.array([0.2, 0.5, 0.3]), np.array([0.7, 0.4, 0.7])


@st.composite
def choices(draw):
    """(reference, scores, tau, another policy)"""
    size = draw(st.integers(1, 6))
    reference, other = (np.array(draw(st.lists(st.floats(0.01, 1), min_size=size, max_size=size))) for _ in range(2))
    scores = np.array(draw(st.lists(st.floats(-1, 1), min_size=size, max_size=size)))
    return reference / reference.sum(), scores, draw(st.sampled_from([0.003, 0.1, 1.0, 30.0])), other / other.sum()


def objective(policy, reference, scores, tau):
    """E_pi[scores] - tau KL, written out."""
    return sum(p * (s - tau * math.log(p / r)) for p, r, s in zip(policy, reference, scores, strict=True) if p > 0)


def test_kl():
    assert kl([0.5, 0.5], [0.25, 0.75]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-15)
    assert kl([1.0, 0.0], [0.25, 0.75]) == pytest.approx(math.log(4), abs=1e-15)
    assert kl([0.5, 0.5], [1.0, 0.0]) == math.inf
    assert kl([1.0, 0.0], [1.0, 0.0]) == 0.0
    assert kl([[0.5, 0.5], [0.25, 0.75]], [0.25, 0.75]).tolist() == pytest.approx([kl([0.5, 0.5], [0.25, 0.75]), 0.0])


def test_a_tiny_divergence_keeps_its_digits():
    shift = 2.0**-30
    assert kl([0.5 + shift, 0.5 - shift], [0.5, 0.5]) == pytest.approx(2 * shift**2, rel=1e-6)
    assert kl([1e-300, 1.0], [0.5, 0.5]) == pytest.approx(math.log(2))


@QUICK
@given(choices())
def test_tilted_is_the_best_choice_and_soft_value_its_worth(choice):
    reference, scores, tau, other = choice
    policy = tilted(reference, scores, tau)
    assert policy.sum() == pytest.approx(1, abs=1e-14)
    best = objective(policy, reference, scores, tau)
    assert soft_value(reference, scores, tau) == pytest.approx(best, abs=1e-12)
    for share in (1.0, 0.1, 0.001):
        rival = (1 - share) * policy + share * other
        assert objective(rival, reference, scores, tau) <= best + 1e-12
    loss = best - objective(other, reference, scores, tau)
    assert regret(other, reference, scores, tau) == pytest.approx(loss, abs=1e-11)
    assert loss == pytest.approx(tau * kl(other, policy), rel=1e-6, abs=1e-9)  # the three-point identity


def test_limits_of_the_strength():
    assert tilted(REFERENCE, SCORES, 0).tolist() == pytest.approx([0.4, 0.0, 0.6])
    assert tilted(REFERENCE, SCORES, 1e-4).tolist() == pytest.approx([0.4, 0.0, 0.6])
    assert tilted(REFERENCE, SCORES, np.inf).tolist() == REFERENCE.tolist()
    assert soft_value(REFERENCE, SCORES, 0) == 0.7
    assert soft_value(REFERENCE, SCORES, np.inf) == pytest.approx(0.55)
    mean, variance = 0.55, 0.25 * 0.09
    for tau in (1e3, 1e6, 1e9):  # the next term of the expansion in 1 / tau, which a plain log(mean(exp)) loses
        assert (soft_value(REFERENCE, SCORES, tau) - mean) * tau == pytest.approx(
            variance / 2, rel=1e-3, abs=tau * 1e-15
        )
    assert regret(REFERENCE, REFERENCE, SCORES, np.inf) == pytest.approx(0, abs=1e-15)
    assert regret(tilted(REFERENCE, SCORES, 0), REFERENCE, SCORES, 0) == pytest.approx(0, abs=1e-15)
    for tau in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="the regularisation strength is"):
            tilted(REFERENCE, SCORES, tau)
        with pytest.raises(ValueError, match="the regularisation strength is"):
            soft_value(REFERENCE, SCORES, tau)


def test_an_action_without_reference_is_never_chosen():
    reference, scores = [0.0, 0.5, 0.5], [9.0, 1.0, 0.0]
    for tau in (0.0, 1e-3, 1.0):
        assert tilted(reference, scores, tau)[0] == 0.0
    assert soft_value(reference, scores, 0) == 1.0
    assert soft_value(reference, scores, 1.0) == pytest.approx(math.log((math.e + 1) / 2))


def test_mixture():
    policy, reference = np.array([0.7, 0.3, 0.0]), np.array([0.2, 0.3, 0.5])
    assert mixture(policy, reference, 0).tolist() == policy.tolist()
    assert mixture(policy, reference, 1).tolist() == reference.tolist()
    half = np.sqrt(policy * reference)
    assert mixture(policy, reference, 0.5) == pytest.approx(half / half.sum(), abs=1e-15)
    logits = 0.75 * np.log(policy[:2]) + 0.25 * np.log(reference[:2])
    assert mixture(policy, reference, 0.25)[:2] == pytest.approx(np.exp(logits) / np.exp(logits).sum(), abs=1e-15)
    with pytest.raises(ValueError, match="mixture is 1.5"):
        mixture(policy, reference, 1.5)
    with pytest.raises(ValueError, match="share no action"):
        mixture([1.0, 0.0], [0.0, 1.0], 0.5)


def test_newton_converges_where_full_steps_do_not_and_says_when_it_fails():
    def arctangent(point):
        value = np.arctan(point)
        return value, np.diag(1 / (1 + point**2)), float(np.abs(value).max())

    point, residual, iterations = newton(arctangent, np.array([3.0]), 1e-14, 50, "arctangent")  # full steps diverge
    assert abs(point[0]) <= residual * 1.1 <= 1.1e-14 and iterations < 50
    with pytest.raises(NotConverged, match="arctangent: the residual is"):
        newton(arctangent, np.array([3.0]), 1e-14, 2, "arctangent")

    def without_root(point):
        return point**2 + 1, np.diag(2 * point), float(np.abs(point**2 + 1).max())

    with pytest.raises(NotConverged, match="without root: the residual is"):
        newton(without_root, np.array([3.0]), 1e-12, 1000, "without root")
