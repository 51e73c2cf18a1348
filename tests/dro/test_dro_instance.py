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
    ({"window": (0.6, 1.5)}, r"contains no sample; the nearest is sample 0 at 0.5"),
    ({"window": (0.9, 1.0), "space": "probability"}, r"contains no sample; the nearest is sample 2 at 0.88"),
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


def test_margins_are_clipped_into_the_window_first():
    narrow = solve_worst_case(MARGINS, 0.1, window=(-0.5, 1.0))
    clipped = solve_worst_case(MARGINS.clamp(-0.5, 1.0), 0.1, window=(-0.5, 1.0))
    assert narrow.value == clipped.value
    assert torch.equal(narrow.moved, clipped.moved)
    assert torch.equal(narrow.margins, MARGINS.double())


def test_default_windows():
    assert solve_worst_case(MARGINS, 0.1, window_pad=0.5).window == (-1.5, 2.5)
    assert solve_worst_case(MARGINS, 0.1, space="probability").window == (0.0, 1.0)
    assert solve_worst_case(MARGINS, 0.1, space="probability").pieces == 6
