"""The best case: optimality against a transport program, cvxpy and a brute-force dual, then what training relies on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch.nn import functional

from openrlhf_sgpo.dro import BestCase, solve_best_case, solve_worst_case
from openrlhf_sgpo.dro.losses import best_case_loss

QUICK = settings(max_examples=80)
SPACES = ["margin", "probability"]


@st.composite
def instances(draw, saturating=False, spaces=SPACES):
    """Arguments of solve_best_case: few samples, often tied, radii from 0 to where everything is raised."""
    number = st.one_of(st.floats(-8, 8), st.integers(-3, 3).map(float), st.floats(-1e-6, 1e-6))
    margins = draw(st.one_of(st.lists(number, min_size=1, max_size=12), number.map(lambda x: [x] * 5)))
    margins = torch.tensor(margins, dtype=torch.float64)
    space = draw(st.sampled_from(spaces))
    shares = [0.0, 1e-6, 0.01, 0.3, 0.9] + ([1.0 + 1e-9, 1.5] if saturating else [])
    share = draw(st.one_of(st.sampled_from(shares), st.floats(0.0, max(shares))))
    everything = float(torch.sigmoid(-margins).mean()) if space == "probability" else 8.0
    return margins, share * everything, space


def in_space(margins, space):
    return torch.sigmoid(margins) if space == "probability" else margins


def plain(values, space):
    """The loss at the variable of the space, written out."""
    return -torch.log(values) if space == "probability" else torch.log1p(torch.exp(-values))


def tolerance(solution):
    return 1e-12 * max(1.0, solution.empirical)


def spread(count=40, seed=3):
    return 1.5 * torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_two_margins_in_closed_form():
    margins = torch.tensor([2.0, 0.0], dtype=torch.float64)
    solution = solve_best_case(margins, 0.25)  # the budget 0.5 raises the second one to 0.5
    assert isinstance(solution, BestCase)
    far, raised = math.log1p(math.exp(-2.0)), math.log1p(math.exp(-0.5))
    assert solution.raised.tolist() == [0.0, 0.5]
    assert solution.value == pytest.approx((far + raised) / 2, abs=1e-15)
    assert solution.empirical == pytest.approx((far + math.log(2.0)) / 2, abs=1e-15)
    assert solution.slope == pytest.approx(1 / (1 + math.exp(0.5)), abs=1e-15)
    assert (solution.level, solution.threshold, solution.fraction_moved, solution.budget_used) == (0.5, 0.5, 0.5, 1.0)
    assert solution.bound == pytest.approx(solution.empirical - 0.5 * 0.25)  # the steepest sample has the slope 1/2
    both = solve_best_case(margins, 1.5)  # 2 to the other margin, and half of the last 1 for each
    assert both.level == pytest.approx(2.5)
    assert both.value == pytest.approx(math.log1p(math.exp(-2.5)), abs=1e-15)
    assert both.fraction_moved == 1.0


def test_two_probabilities_in_closed_form():
    solution = solve_best_case(torch.logit(torch.tensor([0.6, 0.2]).double()), 0.1, space="probability")
    assert solution.level == pytest.approx(0.4)
    assert solution.slope == pytest.approx(2.5)
    assert solution.threshold == pytest.approx(math.log(0.4 / 0.6))
    assert solution.value == pytest.approx(-(math.log(0.6) + math.log(0.4)) / 2)
    assert solution.bound == pytest.approx(max(0.0, solution.empirical - 0.1 / 0.2))


@pytest.mark.parametrize(("space", "radius", "level"), [("margin", 0.7, -0.3), ("probability", 0.25, None)])
def test_one_sample_takes_the_whole_budget(space, radius, level):
    solution = solve_best_case(torch.tensor([-1.0]), radius, space=space)
    level = 1 / (1 + math.e) + radius if level is None else level
    assert solution.level == pytest.approx(level, abs=1e-7)
    assert solution.raised.tolist() == [pytest.approx(radius)]
    assert abs(solution.gap) < 1e-15


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_against_the_transport_program_on_a_grid(space, share):
    """min sum_ij pi_ij l(z_j) over all transports pi to a grid: mass may split and move either way."""
    margins = 2 * spread(7)
    radius = share * (1.0 if space == "margin" else float(torch.sigmoid(-margins).mean()))
    solution = solve_best_case(margins, radius, space=space)
    values = in_space(margins, space).numpy()
    low, high = (values.min() - 1, values.max() + 1) if space == "margin" else (1e-3, 1.0)
    grid = np.unique(np.concatenate([np.linspace(low, high, 800), values]))
    cost = np.abs(values[:, None] - grid[None, :])
    loss = plain(torch.from_numpy(grid), space).numpy()
    stays = np.kron(np.eye(7), np.ones(len(grid)))
    optimum = linprog(
        np.tile(loss, 7) / 7,
        A_ub=cost.reshape(1, -1) / 7,
        b_ub=[radius],
        A_eq=stays,
        b_eq=np.ones(7),
        bounds=(0, None),
        method="highs",
    )
    assert optimum.status == 0
    # The grid forbids the level itself: its program is worse, by the square of the step times the curvature.
    step = (high - low) / 799
    curvature = 0.25 if space == "margin" else 1 / solution.level**2
    assert solution.value - 1e-9 <= optimum.fun <= solution.value + step**2 * curvature


@pytest.mark.parametrize("space", SPACES)
def test_against_cvxpy(space):
    cvxpy = pytest.importorskip("cvxpy")
    margins = spread(25)
    radius = 0.4 if space == "margin" else 0.1
    solution = solve_best_case(margins, radius, space=space)
    values = in_space(margins, space).numpy()
    place = cvxpy.Variable(25)
    objective = cvxpy.logistic(-place) if space == "margin" else -cvxpy.log(place)
    limits = [cvxpy.norm1(place - values) <= 25 * radius] + ([place <= 1] if space == "probability" else [])
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(objective) / 25), limits)
    problem.solve(solver=cvxpy.CLARABEL)
    assert solution.value == pytest.approx(problem.value, abs=1e-7)
    assert np.allclose(np.maximum(values, solution.level), place.value, atol=1e-3)
    assert solution.slope == pytest.approx(25 * limits[0].dual_value, rel=1e-4)  # an interior point


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("radius", [0.02, 0.2])
def test_against_a_brute_force_dual(space, radius):
    """Every lam gives a lower bound, and the best of many is the value: psi minimised over a fine list of places."""
    margins = spread(9)
    solution = solve_best_case(margins, radius, space=space)
    values = in_space(margins, space)
    ends = (-9, 12) if space == "margin" else (1e-4, 1)
    places = torch.cat([torch.linspace(*ends, 20_001, dtype=torch.float64), values])
    losses, distances = plain(places, space), (values[:, None] - places).abs()
    steepest = 1.0 if space == "margin" else float(1 / values.min())
    slopes = torch.linspace(0.0, steepest, 301).tolist() + [solution.slope]
    bounds = [-lam * radius + float((losses + lam * distances).amin(1).mean()) for lam in slopes]
    assert max(bounds) <= solution.value + 1e-6  # the list of places overestimates psi a little
    assert bounds[-1] == pytest.approx(solution.value, abs=1e-6)
    assert bounds[-1] >= max(bounds) - 1e-6


@QUICK
@given(instances(saturating=True))
def test_certified_feasible_and_between_its_bounds(instance):
    margins, radius, space = instance
    solution = solve_best_case(margins, radius, space=space)
    allowed = tolerance(solution)
    assert -allowed <= solution.gap <= allowed
    values = in_space(margins, space)
    assert torch.equal(solution.raised, (solution.level - values).clamp_min(0))
    spent = float(solution.raised.mean())
    assert spent <= radius * (1 + 1e-9) + 1e-15
    if not solution.saturated:
        assert spent == pytest.approx(radius, rel=1e-9, abs=1e-15)
    if radius > 1e-5 and not solution.saturated:
        assert solution.budget_used == pytest.approx(1.0, abs=1e-9)
    attained = float(plain(values + solution.raised, space).mean())
    assert solution.value == pytest.approx(attained, abs=allowed)
    assert solution.empirical == pytest.approx(float(plain(values, space).mean()), abs=allowed)
    assert solution.bound - allowed <= solution.value <= solution.empirical + allowed
    if space == "margin":
        assert solution.bound >= solution.empirical - radius - allowed  # the steepest slope is at most 1
    assert solution.fraction_moved == pytest.approx(float((values < solution.level).double().mean()))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("error", [-0.05, 0.05])
def test_the_certificate_sees_a_wrong_level(space, error, monkeypatch):
    right = solve_best_case(spread(), 0.1, space=space)
    monkeypatch.setattr("openrlhf_sgpo.dro.best._level", lambda *_: right.level + error)
    wrong = solve_best_case(spread(), 0.1, space=space)
    assert wrong.gap * error < -1e-4  # too low a level wastes budget, too high a one is not in the ball
    assert wrong.dual_value < right.value


@QUICK
@given(instances(spaces=["margin"]))
def test_the_plain_loss_lies_between_best_and_worst(instance):
    margins, radius, _ = instance
    best, worst = solve_best_case(margins, radius), solve_worst_case(margins, radius)
    assert best.empirical == pytest.approx(worst.empirical, abs=tolerance(best))
    assert best.value <= best.empirical + tolerance(best)
    assert worst.empirical <= worst.value + tolerance(best)
    if radius > 1e-3:
        assert best.value < worst.value


@QUICK
@given(instances(saturating=True), st.floats(0.0, 1.0), st.floats(0.0, 2.0))
def test_value_falls_and_is_convex_in_the_radius(instance, weight, factor):
    margins, radius, space = instance
    radii = [radius, weight * radius + (1 - weight) * factor * radius, factor * radius]
    first, middle, last = (solve_best_case(margins, each, space=space) for each in radii)
    assert middle.value <= weight * first.value + (1 - weight) * last.value + tolerance(first)
    small, large = (first, last) if factor >= 1 else (last, first)
    assert large.value <= small.value + tolerance(first)
    assert large.slope <= small.slope * (1 + 1e-9)
    # The tangent at one radius, whose slope is -lam, lies below the value at every other one.
    assert last.value >= first.value - first.slope * (radii[2] - radii[0]) - 1e-9 * max(1.0, first.slope)


@pytest.mark.parametrize("space", SPACES)
def test_slope_is_what_more_budget_saves(space):
    values = [solve_best_case(spread(), 0.15 + step, space=space).value for step in (-1e-6, 1e-6)]
    assert solve_best_case(spread(), 0.15, space=space).slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-7)


@QUICK
@given(instances(saturating=True), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_equal_margins_share(instance, random):
    margins, radius, space = instance
    order = list(range(len(margins)))
    random.shuffle(order)
    solution = solve_best_case(margins, radius, space=space)
    shuffled = solve_best_case(margins[order], radius, space=space)
    assert torch.equal(shuffled.raised, solution.raised[order])
    assert (shuffled.level, shuffled.slope, shuffled.threshold) == (solution.level, solution.slope, solution.threshold)
    assert shuffled.value == pytest.approx(solution.value, abs=tolerance(solution))
    for value in margins.unique():
        assert solution.raised[margins == value].unique().numel() == 1


@QUICK
@given(instances())
def test_robust_loss_averages_to_the_value(instance):
    margins, radius, space = instance
    solution = solve_best_case(margins, radius, space=space)
    mean = float(solution.robust_loss(margins).mean())
    assert mean - solution.slope * radius == pytest.approx(solution.value, abs=tolerance(solution))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("radius", [0.06, 0.2])
def test_gradient_against_central_differences_of_the_value(space, radius):
    margins = spread()
    solution = solve_best_case(margins, radius, space=space)
    assert 0.05 < solution.fraction_moved < 0.9

    def value(index, shift):
        moved = margins.clone()
        moved[index] += shift
        return solve_best_case(moved, radius, space=space).value

    differences = [(value(index, 1e-5) - value(index, -1e-5)) / 2e-5 for index in range(len(margins))]
    torch.testing.assert_close(solution.gradient, torch.tensor(differences, dtype=torch.float64), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("space", SPACES)
def test_gradient_is_that_of_the_robust_loss(space):
    margins = spread().requires_grad_()
    solution = solve_best_case(margins, 0.1, space=space)
    (gradient,) = torch.autograd.grad(solution.robust_loss(margins).mean(), margins)
    torch.testing.assert_close(gradient, solution.gradient, rtol=1e-12, atol=1e-16)
    grid = torch.linspace(-12, 12, 30, dtype=torch.float64).reshape(5, 6).requires_grad_()
    assert solution.robust_loss(grid).shape == (5, 6)
    assert torch.autograd.gradcheck(solution.robust_loss, (grid,))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radius_zero_is_the_logistic_loss_exactly(space, dtype):
    margins = spread(200).to(dtype)
    solution = solve_best_case(margins, 0.0, space=space)
    later = 3 * spread(50, seed=5).to(dtype)  # below the level as well
    assert torch.equal(solution.robust_loss(later), -functional.logsigmoid(later))
    assert not solution.raised.any()
    assert solution.value == solution.empirical == pytest.approx(solution.dual_value, abs=1e-15)
    assert solution.bound == solution.empirical
    assert solution.level == float(in_space(margins.double(), space).min())
    assert (solution.fraction_moved, solution.budget_used, solution.saturated) == (0.0, 0.0, False)
    torch.testing.assert_close(solution.gradient, -torch.sigmoid(-margins) / 200)


def test_margin_space_caps_the_gradient_at_the_level():
    solution = solve_best_case(spread(), 0.2)
    margins = torch.linspace(-30, 10, 401, dtype=torch.float64, requires_grad=True)
    loss = solution.robust_loss(margins)
    (gradient,) = torch.autograd.grad(loss.sum(), margins)
    logistic = torch.sigmoid(-margins.detach())
    torch.testing.assert_close(-gradient, logistic.clamp(max=solution.slope), rtol=1e-12, atol=0.0)
    above = margins.detach() >= solution.level
    assert torch.equal(loss[above], -functional.logsigmoid(margins)[above])
    assert (loss[~above] <= -functional.logsigmoid(margins)[~above]).all()


def test_probability_space_lets_the_gradient_of_very_wrong_pairs_fade():
    solution = solve_best_case(spread(), 0.1, space="probability")
    margins = torch.linspace(-30, 10, 401, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(solution.robust_loss(margins).sum(), margins)
    margins, gradient = margins.detach(), -gradient
    below = margins < solution.threshold
    expected = torch.sigmoid(margins) * torch.sigmoid(-margins) / solution.level
    torch.testing.assert_close(gradient[below], expected[below], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient[~below], torch.sigmoid(-margins[~below]), rtol=1e-12, atol=0.0)
    assert gradient[0] < 1e-11 and (gradient[margins < -2].diff() > 0).all()


@pytest.mark.parametrize("space", SPACES)
def test_levels_per_sample_equal_each_group_alone(space):
    margins, group = spread(), torch.arange(40) % 3
    levels = torch.tensor([0.2, 0.5, 0.9] if space == "probability" else [-1.0, 0.3, 2.0], dtype=torch.float64)
    losses = best_case_loss(margins, levels[group], space=space)
    for index, level in enumerate(levels.tolist()):
        members = group == index
        assert torch.equal(losses[members], best_case_loss(margins[members], level, space=space))
    single = best_case_loss(margins.float(), levels[group], space=space)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), losses, rtol=1e-5, atol=1e-6)


EXTREME = [-700.0, -50.0, -1.0, 0.0, 50.0, 700.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("space", "radius"),
    [("margin", 100.0), *((space, radius) for space in SPACES for radius in (0.0, 1e-30, 1e-3, 0.2))],
)
def test_extreme_margins(space, radius, dtype):
    margins = torch.tensor(EXTREME, dtype=dtype, requires_grad=True)
    solution = solve_best_case(margins, radius, space=space)
    numbers = [solution.value, solution.dual_value, solution.slope, solution.level, solution.threshold, solution.bound]
    assert all(map(math.isfinite, numbers))
    assert abs(solution.gap) <= 1e-12 * solution.empirical
    loss = solution.robust_loss(margins)
    (gradient,) = torch.autograd.grad(loss.sum(), margins)
    assert loss.isfinite().all() and gradient.isfinite().all() and solution.gradient.isfinite().all()
    small = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(gradient / len(margins), solution.gradient, rtol=10 * small, atol=small)
    for margin, each in zip(EXTREME, loss.tolist(), strict=True):
        below = margin < solution.threshold and radius > 0
        if not below:
            expected = math.log1p(math.exp(-margin)) if margin > -700 else 700.0
        elif space == "margin":
            at_level = math.log1p(math.exp(-solution.level))
            expected = at_level + solution.slope * (solution.level - margin)
        else:
            expected = -math.log(solution.level) + 1 - math.exp(margin) / (1 + math.exp(margin)) / solution.level
        assert each == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-13, abs=1e-300)


@pytest.mark.parametrize("level", [1e-300, 1e-12, 1 - 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_at_the_ends_of_probability_space(level, dtype):
    margins = torch.tensor([*EXTREME, -745.0, 745.0], dtype=dtype, requires_grad=True)
    loss = best_case_loss(margins, level, space="probability")
    (gradient,) = torch.autograd.grad(loss.sum(), margins)
    assert loss.isfinite().all() and gradient.isfinite().all() and (gradient <= 0).all()
    assert (gradient >= -1).all()


@pytest.mark.parametrize("level", [-700.0, -40.0, 40.0, 700.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_far_out_in_margin_space(level, dtype):
    margins = torch.tensor([*EXTREME, -3000.0], dtype=dtype, requires_grad=True)
    loss = best_case_loss(margins, level, space="margin")
    (gradient,) = torch.autograd.grad(loss.sum(), margins)
    assert loss.isfinite().all() and gradient.isfinite().all()
    expected = torch.sigmoid(-margins.detach()).clamp(max=1 / (1 + math.exp(level)))
    torch.testing.assert_close(-gradient, expected)


def test_a_radius_beyond_all_margins_leaves_no_loss_and_no_nan():
    solution = solve_best_case(spread(), 1e300)
    assert not solution.saturated
    assert (solution.value, solution.dual_value, solution.slope, solution.bound) == (0.0, 0.0, 0.0, 0.0)
    assert not solution.robust_loss(spread()).any()


def test_wrong_pairs_whose_probability_underflows():
    solution = solve_best_case(torch.tensor([-900.0, 2.0]), 0.0, space="probability")
    assert solution.value == solution.dual_value == pytest.approx(450.0, rel=1e-3)
    assert math.isfinite(solution.slope)
    helped = solve_best_case(torch.tensor([-900.0, 2.0]), 0.1, space="probability")
    assert helped.level == pytest.approx(0.2)
    assert helped.bound == 0.0


@pytest.mark.parametrize("radius", [0.5, 0.8])
def test_a_ball_that_raises_everything_to_one_refuses_to_train(radius):
    margins = torch.zeros(7)
    solution = solve_best_case(margins, radius, space="probability")
    assert solution.saturated
    assert (solution.value, solution.dual_value, solution.slope, solution.level) == (0.0, 0.0, 0.0, 1.0)
    assert solution.threshold == math.inf
    assert solution.budget_used == pytest.approx(0.5 / radius)
    assert not solution.gradient.any()
    assert (solution.raised == 0.5).all()
    with pytest.raises(ValueError, match=f"radius {radius:g} is saturated.*use a smaller radius"):
        solution.robust_loss(margins)
    assert not solve_best_case(margins, 0.499, space="probability").saturated
    assert not solve_best_case(margins, radius).saturated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margins": torch.tensor([])}, r"N >= 1, got \(0,\)"),
        ({"margins": torch.zeros(2, 2)}, r"shape \(N,\).*got \(2, 2\)"),
        ({"margins": torch.tensor([1, 2])}, r"floating-point tensor, got a tensor of torch.int64; convert"),
        ({"margins": [1.0, 2.0]}, "floating-point tensor, got list"),
        ({"margins": torch.tensor([0.0, 1.0, math.nan])}, "margin of sample 2 is nan"),
        ({"margins": torch.tensor([0.0, -math.inf])}, "margin of sample 1 is -inf"),
        ({"radius": -0.1}, "radius must be finite and not negative, got -0.1"),
        ({"radius": math.nan}, "radius must be finite"),
        ({"radius": math.inf}, "radius must be finite"),
        ({"space": "logit"}, "unknown space 'logit'; valid spaces: margin, probability"),
    ],
)
def test_rejected_input(change, message):
    arguments = {"margins": torch.tensor([0.5, -1.0]), "radius": 0.1} | change
    with pytest.raises(ValueError, match=message):
        solve_best_case(**arguments)


def test_the_loss_rejects_an_unknown_space():
    with pytest.raises(ValueError, match="unknown space 'logit'"):
        best_case_loss(torch.zeros(2), 0.1, space="logit")


@pytest.mark.parametrize("space", SPACES)
def test_float32_in_float32_out_and_solved_in_float64(space):
    margins = torch.randn(500, generator=torch.Generator().manual_seed(1))
    single, double = (solve_best_case(each, 0.02, space=space) for each in (margins, margins.double()))
    assert single.raised.dtype == single.gradient.dtype == single.robust_loss(margins).dtype == torch.float32
    assert (single.value, single.slope, single.level) == (double.value, double.slope, double.level)


def test_solution_does_not_change_with_the_callers_buffer():
    buffer = torch.linspace(-1, 1, 9, dtype=torch.float64)
    solution = solve_best_case(buffer, 0.1)
    before = solution.gradient
    buffer.zero_()
    assert torch.equal(solution.gradient, before)


def test_a_hundred_thousand_samples_keep_the_certificate():
    margins = spread(100_000)
    for space in SPACES:
        solution = solve_best_case(margins, 0.1, space=space)
        assert abs(solution.gap) < 1e-12
        assert solution.budget_used == pytest.approx(1.0, abs=1e-10)
