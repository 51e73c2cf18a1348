"""Provably robust DPO: the mean over random flips is DPO's loss on the true labels, exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms.base import PairBatch
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.rdpo import RDPO, RDPOSettings, rdpo_loss

RATES = st.floats(0, 0.45)
MARGINS = st.lists(st.floats(-30, 30), min_size=1, max_size=8).map(lambda values: torch.tensor(values).double())


@given(margins=MARGINS, rate=RATES)
def test_unbiased_under_flips_at_the_assumed_rate(margins, rate):
    """A flip swaps chosen and rejected, so that the margin changes its sign."""
    expectation = (1 - rate) * rdpo_loss(margins, rate) + rate * rdpo_loss(-margins, rate)
    assert torch.allclose(expectation, dpo_loss(margins), rtol=0, atol=1e-10)


@given(margins=MARGINS, rate=st.floats(0.05, 0.45))
def test_it_is_biased_at_another_rate(margins, rate):
    """At flip rate r instead of e the mean is l(m) + (r - e) / (1 - 2 e) * m: the label's side pays or gains."""
    actual = rate / 2
    expectation = (1 - actual) * rdpo_loss(margins, rate) + actual * rdpo_loss(-margins, rate)
    bias = (actual - rate) / (1 - 2 * rate) * margins
    assert torch.allclose(expectation, dpo_loss(margins) + bias, rtol=0, atol=1e-10)


@given(margins=MARGINS)
def test_rate_0_is_dpo_to_the_last_bit(margins):
    assert torch.equal(rdpo_loss(margins, 0.0), dpo_loss(margins))
    assert torch.equal(rdpo_loss(margins.float(), 0.0), dpo_loss(margins.float()))


@given(rate=st.floats(0.01, 0.45))
def test_one_pair_alone_has_no_minimum(rate):
    margins = torch.linspace(-20, 200, 100, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(rdpo_loss(margins, rate).sum(), margins)
    assert bool((gradient <= -rate / (1 - 2 * rate) + 1e-12).all())


def test_flipped_data_have_the_gradient_of_clean_data_on_average():
    """By enumeration of all flips of three pairs, weighted by their probability."""
    rate = 0.3
    margins = torch.tensor([-1.5, 0.2, 4.0], dtype=torch.float64, requires_grad=True)
    algorithm = RDPO(RDPOSettings(rate), 0.5)
    zero = torch.zeros(3, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for pattern in range(8):
        flipped = torch.tensor([bool(pattern >> pair & 1) for pair in range(3)])
        chosen, rejected = torch.where(flipped, zero, margins / 0.5), torch.where(flipped, margins / 0.5, zero)
        probability = rate ** int(flipped.sum()) * (1 - rate) ** int((~flipped).sum())
        total = total + probability * algorithm.loss(PairBatch(chosen, rejected, zero, zero)).mean()
    (gradient,) = torch.autograd.grad(total, margins)
    assert torch.allclose(gradient, -torch.sigmoid(-margins.detach()) / 3, rtol=0, atol=1e-12)


def test_gradient():
    margins = torch.linspace(-4, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: rdpo_loss(values, 0.2), margins)


@pytest.mark.parametrize("rate", [-0.1, 0.5, 1.0])
def test_out_of_range(rate):
    (problem,) = flags.out_of_range({"rdpo": RDPOSettings(rate)})
    assert problem == f"--rdpo.flip_rate: {rate} is out of range, use at least 0, less than 0.5"


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.49])
def test_in_range(rate):
    assert flags.out_of_range({"rdpo": RDPOSettings(rate)}) == []
