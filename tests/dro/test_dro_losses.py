"""The losses against closed forms and against the maximum over all tangents, written out."""

import math

import pytest
import torch
from torch.nn import functional

from openrlhf_sgpo.dro.losses import (
    active_piece,
    chord_slope,
    danskin_loss,
    loss_slope,
    loss_value,
    piece_tangents,
    released_loss,
    transport_loss,
)

CHOICES = [("margin", 1), ("margin", 2), ("margin", 6), ("margin", 33), *(("probability", k) for k in (1, 2, 6, 64))]
WINDOW = {"margin": (-2.5, 3.0), "probability": (0.0, 1.0)}


def written_out(values, space, pieces, window):
    """Every tangent at every x, shape (N, K), with nested knots in margin space, uniform ones in probability space, and
    derivatives from autograd."""
    places = sorted([0.0, 1.0, 0.5, 0.25, 0.75, *((2 * k + 1) / 8 for k in (0, 2, 1, 3))][:pieces])
    if pieces == 33:
        places = [k / 32 for k in range(33)]  # all thirty-seconds: here nested knots are uniform
    knots = window[0] + (window[1] - window[0]) * torch.tensor(places, dtype=torch.float64)
    if space == "probability":
        knots = torch.arange(1, pieces + 1, dtype=torch.float64) / pieces
    knots.requires_grad_()
    heights = -torch.log(knots) if space == "probability" else torch.log(1 + torch.exp(-knots))
    (slopes,) = torch.autograd.grad(heights.sum(), knots)
    return (heights + slopes * (values[:, None] - knots)).detach(), slopes


@pytest.mark.parametrize(("space", "pieces"), CHOICES)
def test_piecewise_loss_is_the_maximum_over_all_tangents(space, pieces):
    values = torch.linspace(-4.0, 5.0, 997, dtype=torch.float64)
    window = WINDOW[space]
    tangents, slopes = written_out(values, space, pieces, window)
    torch.testing.assert_close(
        loss_value(values, space=space, pieces=pieces, window=window), tangents.amax(1), rtol=1e-13, atol=1e-13
    )
    chosen = active_piece(values, space=space, pieces=pieces, window=window).long()
    torch.testing.assert_close(tangents.gather(1, chosen[:, None])[:, 0], tangents.amax(1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(loss_slope(values, space=space, pieces=pieces, window=window), slopes[chosen])
    table_slopes, offsets = piece_tangents(space, pieces, window)
    torch.testing.assert_close(offsets + values[:, None] * table_slopes, tangents, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pieces", [1, 2, 6, 64])
def test_probability_loss_at_zero_and_one(pieces):
    ends = loss_value(torch.tensor([0.0, 1.0], dtype=torch.float64), space="probability", pieces=pieces)
    torch.testing.assert_close(ends, torch.tensor([1 + math.log(pieces), 0.0], dtype=torch.float64))


def test_probability_loss_has_six_pieces_by_default():
    values = torch.linspace(0, 1, 50)
    assert torch.equal(
        loss_value(values, space="probability", pieces=None), loss_value(values, space="probability", pieces=6)
    )


def test_exact_loss_keeps_its_digits_in_both_tails():
    values = torch.tensor([-800.0, -25.0, -21.0, 0.0, 40.0, 600.0], dtype=torch.float64)
    expected = [800.0, 25 + math.log1p(math.exp(-25)), 21 + math.log1p(math.exp(-21)), math.log(2)]
    expected += [math.log1p(math.exp(-40)), math.exp(-600)]
    value = loss_value(values, space="margin", pieces=None)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0.0)


def test_tangents_in_margin_space_need_a_window():
    with pytest.raises(ValueError, match="window"):
        loss_value(torch.zeros(2), space="margin", pieces=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pieces", [None, 1, 6])
def test_windows_slopes_and_edges_per_sample_equal_solving_each_group_alone(pieces, dtype):
    torch.manual_seed(0)
    margins = 2 * torch.randn(40, dtype=dtype)
    group = torch.arange(40) % 2
    settings = [(0.4, -2.0, (-2.0, 2.5)), (0.2, -3.5, (-3.5, 6.0))]
    expected = torch.empty_like(margins)
    for index, (slope, edge, window) in enumerate(settings):
        members = group == index
        expected[members] = danskin_loss(margins[members], slope, edge, space="margin", pieces=pieces, window=window)

    def per_sample(numbers):
        return torch.tensor(numbers, dtype=torch.float64)[group]

    got = danskin_loss(
        margins,
        per_sample([0.4, 0.2]),
        per_sample([-2.0, -3.5]),
        space="margin",
        pieces=pieces,
        window=(per_sample([-2.0, -3.5]), per_sample([2.5, 6.0])),
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)


def test_chord_slope_close_to_the_edge():
    edge = -0.7
    values = edge + torch.tensor([0.0, 1e-12, 1e-9, 1e-5, 0.5, 30.0], dtype=torch.float64)
    slopes = chord_slope(values, edge, space="margin", pieces=None)
    cost = values - edge
    start, bend, twist = (1 / (1 + math.exp(edge)), 0.25 / math.cosh(edge / 2) ** 2, math.tanh(edge / 2))
    taylor = start - bend * cost / 2 + bend * twist * cost**2 / 6
    torch.testing.assert_close(slopes[:4], taylor[:4], rtol=1e-13, atol=0.0)
    quotient = (
        loss_value(torch.tensor(edge, dtype=torch.float64), space="margin", pieces=None) + functional.logsigmoid(values)
    ) / cost
    torch.testing.assert_close(slopes[4:], quotient[4:], rtol=1e-12, atol=0.0)


def test_danskin_loss_in_closed_form():
    edge, slope = -1.0, 0.6
    margins = torch.tensor([-3.0, -1.0, -0.5, 4.0], dtype=torch.float64, requires_grad=True)
    price = torch.tensor([1.0, 1.0, 1.0, 0.01], dtype=torch.float64)
    loss = danskin_loss(margins, slope, edge, space="margin", pieces=None, window=None, price=price)
    at_edge = math.log1p(math.exp(1.0))
    # Left of the edge the loss is on top, just right of it the chord, far right the loss again, unless a low price keeps
    # the chord on top.
    expected = [math.log1p(math.exp(3.0)), at_edge, at_edge - 0.6 * 0.5, at_edge - 0.6 * 0.01 * 5]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss[[0, 2, 3]].sum(), margins)
    left = -1 / (1 + math.exp(-3.0))
    torch.testing.assert_close(gradient, torch.tensor([left, 0.0, -0.6, -0.006], dtype=torch.float64))
    plain = danskin_loss(margins, slope, edge, space="margin", pieces=None, window=None)
    assert plain[3] == -functional.logsigmoid(margins[3])


@pytest.mark.parametrize(
    ("space", "pieces", "edge"), [("margin", None, -2.0), ("margin", 5, -2.0), ("probability", 6, 0.2)]
)
def test_danskin_loss_gradcheck(space, pieces, edge):
    torch.manual_seed(1)
    margins = (3 * torch.randn(12, dtype=torch.float64)).requires_grad_()
    window = (-2.0, 4.0) if space == "margin" else (0.2, 1.0)
    slope = 0.5 if space == "margin" else 3.0
    assert torch.autograd.gradcheck(
        lambda m: danskin_loss(m, slope, edge, space=space, pieces=pieces, window=window), (margins,)
    )


def test_transport_loss_in_closed_form_and_gradcheck():
    margins = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    displacement = torch.tensor([[0.0, 2.0], [0.5, math.inf]], dtype=torch.float64)
    loss = transport_loss(margins, s, displacement)
    expected = [0.25 * math.log1p(math.exp(-0.3)) + 0.75 * math.log1p(math.exp(1.7)), math.log1p(math.exp(1.7))]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda m: transport_loss(m, s, displacement), (margins,))


def test_released_loss_in_closed_form_and_gradcheck():
    margins = torch.tensor([0.0, math.log(3.0), 0.0], dtype=torch.float64, requires_grad=True)  # p = 1/2, 3/4, 1/2
    s = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    displacement = torch.tensor([[0.0, 0.1], [-0.25, 0.5], [0.6, math.nan]], dtype=torch.float64)
    loss = released_loss(margins, s, displacement)
    expected = [-0.25 * math.log(0.5) - 0.75 * math.log(0.4), -0.5 * math.log(0.25), -math.log(1e-6)]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), margins, retain_graph=True)
    assert gradient[2] == 0  # clamped
    assert torch.autograd.gradcheck(lambda m: released_loss(m, s, displacement), (margins,))


@pytest.mark.parametrize("leader", [transport_loss, released_loss])
@pytest.mark.parametrize("displacement", [math.inf, -math.inf, math.nan, 1e300])
def test_an_entry_without_mass_counts_for_nothing(leader, displacement):
    margins = torch.tensor([0.4], requires_grad=True)
    loss = leader(margins, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.1, displacement]]))
    alone = leader(margins, torch.tensor([[1.0]]), torch.tensor([[0.1]]))
    assert torch.equal(loss, alone)
    assert torch.equal(*(torch.autograd.grad(each.sum(), margins)[0] for each in (loss, alone)))
