"""Every input that the follower rejects, with the message that a user reads."""

import math

import pytest
import torch

from openrlhf_sgpo.dro import solve_worst_case

MARGINS = torch.tensor([0.5, -1.0, 2.0])

REJECTED = [
    ({"margins": torch.tensor([])}, r"N >= 1, got \(0,\)"),
    ({"margins": torch.zeros(2, 2)}, r"shape \(N,\).*got \(2, 2\)"),
    ({"margins": torch.tensor(1.0)}, r"shape \(N,\)"),
    ({"margins": torch.tensor([1, 2])}, r"floating-point tensor, got a tensor of torch.int64; convert"),
    ({"margins": [1.0, 2.0]}, "floating-point tensor, got list"),
    ({"margins": torch.tensor([0.0, 1.0, math.nan, math.nan])}, "margin of sample 2 is nan"),
    ({"margins": torch.tensor([0.0, -math.inf])}, "margin of sample 1 is -inf"),
    ({"radius": -0.1}, "radius must be finite and not negative, got -0.1"),
    ({"radius": math.nan}, "radius must be finite"),
    ({"radius": math.inf}, "radius must be finite"),
    ({"window_pad": -1.0}, "window_pad must be finite and not negative, got -1.0"),
    ({"space": "logit"}, "unknown space 'logit'; valid spaces: margin, probability"),
    ({"pieces": 0}, "pieces must be a whole number of at least 1, got 0"),
    ({"pieces": 2.5}, "pieces must be a whole number"),
    ({"window": (1.0, 1.0)}, r"a < b, got \(1.0, 1.0\)"),
    ({"window": (2.0, -2.0)}, r"a < b"),
    ({"window": (-math.inf, 2.0)}, "window must be finite"),
    ({"window": (-0.1, 1.0), "space": "probability"}, r"must lie in \[0, 1\]"),
    ({"window": (0.0, 1.1), "space": "probability"}, r"must lie in \[0, 1\]"),
    ({"margins": torch.zeros(3), "window_pad": 0.0}, "raise window_pad"),
    ({"price": torch.ones(2)}, r"shape \(3,\); got \(2,\)"),
    ({"price": torch.tensor(1.0)}, r"shape \(3,\); got \(\)"),
    ({"price": torch.tensor([1.0, 0.0, -1.0])}, "price of sample 1 is 0.0"),
    ({"price": torch.tensor([1.0, 1.0, math.nan])}, "price of sample 2 is nan"),
    ({"price": torch.tensor([math.inf, 1.0, 1.0])}, "price of sample 0 is inf"),
]


@pytest.mark.parametrize(("change", "message"), REJECTED, ids=[str(index) for index in range(len(REJECTED))])
def test_rejected_input(change, message):
    arguments = {"margins": MARGINS, "radius": 0.1} | change
    with pytest.raises(ValueError, match=message):
        solve_worst_case(**arguments)


@pytest.mark.parametrize("price", [None, torch.tensor([1.0, 3.0, 2.0])])
def test_samples_left_of_the_window_stay_with_their_own_loss(price):
    """Without them the follower has the same budget: three samples' worth at two thirds of the mean."""
    solution = solve_worst_case(MARGINS, 0.1, window=(-0.5, 1.0), price=price)  # at 0.5, -1 and 2
    others = torch.tensor([0, 2])
    alone = solve_worst_case(MARGINS[others], 0.15, window=(-0.5, 1.0), price=None if price is None else price[others])
    assert solution.moved[1] == 0 and torch.equal(solution.moved[others], alone.moved)
    assert solution.slope == pytest.approx(alone.slope, rel=1e-14)
    assert solution.value == pytest.approx((2 * alone.value + math.log1p(math.e)) / 3, rel=1e-14)
    assert solution.gradient[1] == pytest.approx(-1 / (1 + math.exp(-1)) / 3, rel=1e-6)
    assert abs(solution.gap) < 1e-15


def test_nothing_can_move_if_all_samples_lie_left_of_the_window():
    solution = solve_worst_case(MARGINS, 0.1, window=(3.0, 4.0))
    assert solution.saturated and not solution.moved.any() and solution.budget_used == 0
    assert solution.value == solution.empirical


def test_default_windows():
    assert solve_worst_case(MARGINS, 0.1, window_pad=0.5).window == (-1.5, 2.5)
    assert solve_worst_case(MARGINS, 0.1, space="probability").window == (0.0, 1.0)
    assert solve_worst_case(MARGINS, 0.1, space="probability").pieces == 6
