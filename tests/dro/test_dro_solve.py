"""The exact solution: optimality is checked (feasible, certified by the dual, stationary), not stored numbers."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch.nn import functional

from openrlhf_sgpo.dro import solve_worst_case
from openrlhf_sgpo.dro.losses import active_piece, loss_value

QUICK = settings(max_examples=80)
SPACES = st.sampled_from(["margin", "probability"])


@st.composite
def instances(draw, prices=True, saturating=True):
    """Arguments of solve_worst_case: few samples, often tied, some left of the edge, radii from 0 to beyond saturation."""
    number = st.one_of(st.floats(-6, 6), st.integers(-3, 3).map(float), st.floats(-1e-6, 1e-6))
    margins = draw(st.one_of(st.lists(number, min_size=1, max_size=12), number.map(lambda x: [x] * 5)))
    margins = torch.tensor(margins, dtype=torch.float64)
    space = draw(SPACES)
    pieces = draw(st.one_of(st.none(), st.integers(1, 64)))
    price = None
    if prices and draw(st.booleans()):
        each = st.one_of(st.floats(0.2, 5.0), st.sampled_from([1.0, 2.0]))
        price = torch.tensor(draw(st.lists(each, min_size=len(margins), max_size=len(margins))), dtype=torch.float64)
    keywords = {"space": space, "pieces": pieces, "price": price}
    if space == "margin":
        edge = draw(st.one_of(st.floats(0.1, 4.0).map(lambda pad: float(margins.min()) - pad), st.floats(-6, 6)))
        keywords["window"] = (edge, max(edge, float(margins.max())) + 0.5)
    shares = [0.0, 1e-6, 0.01, 0.3, 0.9] + ([1.0, 1.5] if saturating else [])
    share = draw(st.one_of(st.sampled_from(shares), st.floats(0.0, max(shares))))
    return margins, share * total_cost(margins, keywords), keywords


def total_cost(margins, keywords):
    """Mean cost of moving everything to the edge: radii from here on saturate the ball."""
    if keywords["space"] == "margin":
        cost = (margins - keywords["window"][0]).clamp_min(0)
    else:
        cost = torch.sigmoid(margins)
    return float((cost if keywords["price"] is None else cost * keywords["price"]).mean())


def scale(solution):
    """Magnitude against which rounding counts: values of the loss reach from the edge's to the samples'."""
    corner = torch.tensor(solution.edge, dtype=torch.float64)
    return max(
        solution.value, float(loss_value(corner, space=solution.space, pieces=solution.pieces, window=solution.window))
    )


def space_values(solution):
    return torch.sigmoid(solution.margins) if solution.space == "probability" else solution.margins


def unit_prices(solution):
    return torch.ones_like(solution.margins) if solution.price is None else solution.price


def test_two_samples_in_closed_form():
    solution = solve_worst_case(torch.tensor([2.0, 0.0]).double(), 0.25, window=(-1.0, 3.0))
    # The budget 0.5 moves half of sample 1, whose way to the edge costs 1.
    edge, here, far = math.log1p(math.e), math.log(2.0), math.log1p(math.exp(-2.0))
    assert solution.moved.tolist() == [0.0, 0.5]
    assert solution.value == pytest.approx((far + 0.5 * here + 0.5 * edge) / 2, abs=1e-15)
    assert solution.empirical == pytest.approx((far + here) / 2, abs=1e-15)
    assert solution.slope == pytest.approx(edge - here, abs=1e-15)
    assert (solution.edge, solution.threshold, solution.budget_used, solution.fraction_moved) == (-1.0, 0.0, 1.0, 0.25)
    assert solution.bound == pytest.approx(solution.empirical + 0.25)
    assert not solution.saturated


def test_budget_that_just_pays_for_a_sample_makes_the_next_one_marginal():
    solution = solve_worst_case(torch.tensor([1.0, 0.0, 1.5]).double(), 1 / 3, window=(-1.0, 3.0))
    assert solution.moved.tolist() == [0.0, 1.0, 0.0]
    assert solution.threshold == 1.0
    assert solution.slope == pytest.approx((math.log1p(math.e) - math.log1p(math.exp(-1.0))) / 2, abs=1e-15)


@QUICK
@given(instances())
def test_no_duality_gap_and_feasible(instance):
    margins, radius, keywords = instance
    solution = solve_worst_case(margins, radius, **keywords)
    assert abs(solution.gap) <= 1e-12 * scale(solution)
    assert ((solution.moved >= 0) & (solution.moved <= 1)).all()
    values = space_values(solution)
    cost = unit_prices(solution) * (values - solution.edge).clamp_min(0)
    spent = float((solution.moved * cost).mean())
    assert spent <= radius * (1 + 1e-12)
    assert solution.budget_used == pytest.approx(spent / radius if radius else 0.0, abs=1e-12)
    if radius > 0 and not solution.saturated:
        assert solution.budget_used == pytest.approx(1.0, abs=1e-12)
    losses = loss_value(values, space=solution.space, pieces=solution.pieces, window=solution.window)
    corner = torch.tensor(solution.edge, dtype=torch.float64)
    at_edge = loss_value(corner, space=solution.space, pieces=solution.pieces, window=solution.window)
    attained = float((losses + solution.moved * (at_edge - losses)).mean())
    assert solution.value == pytest.approx(attained, rel=1e-13)
    assert solution.empirical == pytest.approx(float(losses.mean()), rel=1e-13)
    assert solution.value <= solution.bound + 1e-13 * abs(solution.bound)  # tangents may be negative
    assert solution.value >= solution.empirical - 1e-13 * abs(solution.empirical)


@QUICK
@given(instances())
def test_every_slope_bounds_the_value_and_the_reported_one_attains_it(instance):
    margins, radius, keywords = instance
    solution = solve_worst_case(margins, radius, **keywords)
    dual = dual_function(solution)
    tolerance = 1e-12 * scale(solution)
    assert dual(solution.slope) == pytest.approx(solution.value, abs=tolerance)
    for factor in (0.0, 0.5, 0.99, 1.01, 2.0):
        assert dual(factor * solution.slope) >= solution.value - tolerance


def dual_function(solution):
    """lam -> lam * radius + mean max(l, chord), written out for one solved instance."""
    values = space_values(solution)
    losses = loss_value(values, space=solution.space, pieces=solution.pieces, window=solution.window)
    corner = torch.tensor(solution.edge, dtype=torch.float64)
    at_edge = loss_value(corner, space=solution.space, pieces=solution.pieces, window=solution.window)
    cost = unit_prices(solution) * (values - solution.edge).clamp_min(0)
    return lambda slope: slope * solution.radius + float(torch.maximum(losses, at_edge - slope * cost).mean())


@settings(max_examples=40)
@given(instances())
def test_exact_loss_against_a_one_dimensional_minimisation(instance):
    margins, radius, keywords = instance
    window = keywords.get("window", (float(margins.min()) - 1, float(margins.max()) + 1))
    keywords = keywords | {"space": "margin", "pieces": None, "window": window}
    solution = solve_worst_case(margins, radius, **keywords)
    first = window[0]
    price = unit_prices(solution).numpy()

    def dual(slope):
        numbers = zip(margins.tolist(), price.tolist(), strict=True)
        chord = math.log1p(math.exp(-first))
        phi = [max(math.log1p(math.exp(-x)), chord - slope * weight * max(x - first, 0)) for x, weight in numbers]
        return slope * radius + sum(phi) / len(phi)

    steepest = 1.0 / price.min()
    best, low, high = 0.0, 0.0, steepest
    for _ in range(3):
        # SciPy resolves its variable to the square root of rounding only, so later searches are for what remains.
        optimum = minimize_scalar(
            lambda shift, centre: dual(centre + shift),
            args=(best,),
            bounds=(low - best, high - best),
            method="bounded",
            options={"xatol": 1e-15},
        )
        best += optimum.x
        low, high = max(0.0, best - 1e-3 * (high - low)), best + 1e-3 * (high - low)
    assert solution.value == pytest.approx(min(optimum.fun, dual(0.0), dual(steepest)), abs=1e-10)


@QUICK
@given(instances(), st.randoms(use_true_random=False))
def test_order_does_not_matter(instance, random):
    margins, radius, keywords = instance
    order = list(range(len(margins)))
    random.shuffle(order)
    solution = solve_worst_case(margins, radius, **keywords)
    if keywords["price"] is not None:
        keywords = keywords | {"price": keywords["price"][order]}
    shuffled = solve_worst_case(margins[order], radius, **keywords)
    assert torch.equal(shuffled.moved, solution.moved[order])
    assert (shuffled.slope, shuffled.threshold) == (solution.slope, solution.threshold)
    assert shuffled.saturated == solution.saturated
    assert shuffled.value == pytest.approx(solution.value, rel=1e-13)


@pytest.mark.parametrize("seed", range(20))
def test_order_does_not_matter_to_the_last_bit_when_equal_ratios_have_unequal_costs(seed):
    generator = torch.Generator().manual_seed(seed)
    margins = torch.randn(300, dtype=torch.float64, generator=generator)
    order = torch.randperm(300, generator=generator)
    keywords = {"pieces": 1, "price": torch.ones(300)}  # a straight loss: every sample has the same ratio
    solution = solve_worst_case(margins, 0.3, **keywords)
    assert solution.moved.unique().numel() == 1 and 0 < solution.moved[0] < 1
    assert torch.equal(solve_worst_case(margins[order], 0.3, **keywords).moved, solution.moved)


@QUICK
@given(instances(prices=False))
def test_equal_margins_share_and_smaller_ones_come_first(instance):
    margins, radius, keywords = instance
    solution = solve_worst_case(margins, radius, **keywords)
    values = space_values(solution)
    order = values.argsort()[(values <= solution.edge).sum() :]
    assert (solution.moved[order].diff() <= 0).all()
    for value in values.unique():
        assert solution.moved[values == value].unique().numel() == 1
    if radius > 0 and not solution.saturated:
        assert (solution.moved[margins > solution.threshold] == 0).all()
        marginal = values[margins == solution.threshold][0]
        assert (solution.moved[(values < marginal) & (values > solution.edge)] == 1).all()
    assert not solution.moved[values <= solution.edge].any()
    split = (solution.moved > 0) & (solution.moved < 1)
    assert values[split].unique().numel() <= 1


@QUICK
@given(instances(), st.floats(1.0, 3.0))
def test_value_rises_and_slope_falls_with_the_radius(instance, factor):
    margins, radius, keywords = instance
    small = solve_worst_case(margins, radius, **keywords)
    large = solve_worst_case(margins, factor * radius, **keywords)
    assert large.value >= small.value - 1e-12 * scale(small)
    assert large.slope <= small.slope * (1 + 1e-9)


@QUICK
@given(instances(), st.integers(1, 5), st.integers(2, 4))
def test_value_rises_with_nested_knots(instance, pieces, factor):
    margins, radius, keywords = instance
    if keywords["space"] == "probability":
        numbers = (pieces, factor * pieces)
    else:
        numbers = (3 * pieces - 2, 3 * pieces - 2 + factor - 1)  # Proposition 3.2: one more knot is never less
    coarse, fine = (solve_worst_case(margins, radius, **keywords | {"pieces": number}) for number in numbers)
    assert fine.value >= coarse.value - 1e-12 * scale(fine)
    if keywords["space"] == "margin":
        exact = solve_worst_case(margins, radius, **keywords | {"pieces": None})
        assert exact.value >= fine.value - 1e-12 * scale(exact)


@QUICK
@given(instances(saturating=False))
def test_robust_loss_averages_to_the_value(instance):
    margins, radius, keywords = instance
    solution = solve_worst_case(margins, radius, **keywords)
    assume(not solution.saturated)
    loss = solution.robust_loss(margins, price=keywords["price"])
    paid = solution.slope * radius
    assert float(loss.mean()) + paid == pytest.approx(solution.value, abs=1e-12 * scale(solution))


@pytest.mark.parametrize("space", ["margin", "probability"])
@pytest.mark.parametrize("pieces", [None, 2, 6])
@pytest.mark.parametrize("priced", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_gradient_against_central_differences(space, pieces, priced, narrow):
    torch.manual_seed(3)
    window = {"margin": (-5.0, 5.0), "probability": (0.0, 1.0)}[space]
    if narrow:  # than the samples
        window = {"margin": (-1.0, 1.0), "probability": (0.3, 0.7)}[space]
    margins = 1.5 * torch.randn(40, dtype=torch.float64)
    near = (torch.sigmoid(margins) if space == "probability" else margins)[:, None] + torch.tensor([-1e-3, 1e-3])
    if space == "probability" or pieces is not None:
        number = pieces or 6
        pair = active_piece(near.double(), space=space, pieces=number, window=window)
        margins = margins[pair[:, 0] == pair[:, 1]]  # away from the kinks of the loss
    price = 0.5 + torch.rand(len(margins), dtype=torch.float64) if priced else None
    keywords = {"space": space, "pieces": pieces, "window": window, "price": price}
    everything = solve_worst_case(margins, 1e9, **keywords).budget_used * 1e9
    solved = [solve_worst_case(margins, share / 100 * everything, **keywords) for share in range(20, 60)]
    solution = next(each for each in solved if ((each.moved > 0.2) & (each.moved < 0.8)).sum() == 1)
    assert (solution.moved == 1).sum() > 3 and (solution.moved == 0).sum() > 3

    def value(index, shift):
        moved = margins.clone()
        moved[index] += shift
        return solve_worst_case(moved, solution.radius, **keywords).value

    differences = [(value(index, 1e-6) - value(index, -1e-6)) / 2e-6 for index in range(len(margins))]
    torch.testing.assert_close(solution.gradient, torch.tensor(differences, dtype=torch.float64), rtol=1e-6, atol=5e-10)
    if narrow:
        values = space_values(solution)
        outside = values < window[0]
        assert outside.any() and (values > window[1]).any() and not solution.moved[outside].any()


@pytest.mark.parametrize("space", ["margin", "probability"])
def test_gradient_is_that_of_the_robust_loss(space):
    torch.manual_seed(4)
    margins = torch.randn(50, dtype=torch.float64, requires_grad=True)
    solution = solve_worst_case(margins, 0.05, space=space, pieces=None)
    (gradient,) = torch.autograd.grad(solution.robust_loss(margins).mean(), margins)
    whole = (solution.moved == 0) | (solution.moved == 1)  # at the split sample the loss has its kink
    torch.testing.assert_close(gradient[whole], solution.gradient[whole], rtol=1e-12, atol=1e-15)
    kinkless = margins.detach()[whole].requires_grad_()
    assert torch.autograd.gradcheck(solution.robust_loss, (kinkless,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radius_zero_is_the_logistic_loss_exactly(dtype):
    margins = 4 * torch.randn(200, dtype=dtype, generator=torch.Generator().manual_seed(0))
    solution = solve_worst_case(margins, 0.0)
    assert torch.equal(solution.robust_loss(margins), -functional.logsigmoid(margins))
    assert not solution.moved.any()
    assert (solution.threshold, solution.slope, solution.budget_used) == (-math.inf, 1.0, 0.0)
    assert solution.value == solution.empirical
    assert not solution.saturated
    torch.testing.assert_close(solution.gradient, -torch.sigmoid(-margins) / 200)


def test_radius_zero_in_probability_space_with_prices():
    margins, price = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([2.0, 0.5, 1.0])
    solution = solve_worst_case(margins, 0.0, space="probability", pieces=4, price=price)
    assert solution.slope == 8.0  # steepest piece K over the smallest price
    assert abs(solution.gap) < 1e-15
    expected = loss_value(torch.sigmoid(margins), space="probability", pieces=4)
    for factor in (1.0, 0.1):  # cheaper samples than any that was solved must not meet a chord either
        assert torch.equal(solution.robust_loss(margins, price=factor * price), expected)


@pytest.mark.parametrize("space", ["margin", "probability"])
def test_saturated_ball_moves_everything_and_refuses_to_train(space):
    margins = torch.zeros(7, dtype=torch.float64)
    solution = solve_worst_case(margins, 1.0, space=space)
    assert solution.saturated and (solution.moved == 1).all()
    assert (solution.slope, solution.threshold) == (0.0, math.inf)
    assert solution.budget_used == (1.0 if space == "margin" else 0.5)
    assert solution.value == pytest.approx(math.log1p(math.e) if space == "margin" else 1 + math.log(6))
    assert not solution.gradient.any()
    with pytest.raises(ValueError, match="saturated.*smaller radius or a wider window"):
        solution.robust_loss(margins)


def test_price_orders_the_attack():
    margins = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64)
    solution = solve_worst_case(margins, 0.5, price=torch.tensor([3.0, 1.0, 2.0]))
    torch.testing.assert_close(solution.moved, torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64))
    assert solution.robust_loss(margins, price=solution.price).argmax() == 1
    with pytest.raises(ValueError, match="prices"):
        solution.robust_loss(margins)


def test_samples_at_and_near_the_edge():
    margins = torch.tensor([-9.0, -1.0, -1.0 + 1e-13, -1.0 + 1e-9, -0.5, 4.0], dtype=torch.float64)
    for price in (None, torch.tensor([1.0, 2.0, 1.0, 1.5, 1.0, 1.0])):
        for pieces in (None, 2, 9):
            for radius in (1e-14, 1e-12, 1e-10, 1e-3):
                solution = solve_worst_case(margins, radius, pieces=pieces, window=(-1.0, 5.0), price=price)
                assert abs(solution.gap) <= 1e-12
                assert solution.budget_used == pytest.approx(1.0, abs=1e-9)


def test_float32_in_float32_out_and_solved_in_float64():
    margins = torch.randn(500, generator=torch.Generator().manual_seed(1))
    single, double = (solve_worst_case(each, 0.02) for each in (margins, margins.double()))
    assert single.moved.dtype == single.gradient.dtype == torch.float32
    assert all(each.dtype == torch.float32 for each in single.transport())
    assert (single.value, single.slope, single.threshold) == (double.value, double.slope, double.threshold)
    assert torch.equal(single.moved, double.moved.float())
    assert single.robust_loss(margins).dtype == torch.float32


def test_solution_does_not_change_with_the_callers_buffer():
    buffer = torch.linspace(-1, 1, 9, dtype=torch.float64)
    solution = solve_worst_case(buffer, 0.1)
    before = solution.gradient
    buffer.zero_()
    assert torch.equal(solution.gradient, before)
