"""Conservative DPO: DPO at smoothing 0, and a minimum where the policy believes a label as much as it was told to."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms.base import PairBatch
from openrlhf_sgpo.algorithms.cdpo import CDPO, CDPOSettings, cdpo_loss
from openrlhf_sgpo.algorithms.dpo import dpo_loss

RATES = st.floats(0, 0.49)
MARGINS = st.lists(st.floats(-60, 60), min_size=1, max_size=8).map(lambda values: torch.tensor(values).double())


@given(margins=MARGINS)
def test_no_smoothing_is_dpo_to_the_last_bit(margins):
    assert torch.equal(cdpo_loss(margins, 0.0), dpo_loss(margins))
    assert torch.equal(cdpo_loss(margins.float(), 0.0), dpo_loss(margins.float()))


@given(margins=MARGINS, rate=RATES)
def test_smoothing_adds_its_share_of_the_margin(margins, rate):
    """log sigmoid(m) - log sigmoid(-m) = m, so that the loss is DPO's plus e * m."""
    assert torch.allclose(cdpo_loss(margins, rate), dpo_loss(margins) + rate * margins, rtol=0, atol=1e-12)


@given(rate=st.floats(0.001, 0.499), step=st.floats(-20, 20).filter(lambda value: abs(value) > 1e-3))
def test_the_minimum_is_the_logit_of_the_trust_in_a_label(rate, step):
    best = torch.tensor(math.log((1 - rate) / rate), dtype=torch.float64, requires_grad=True)
    loss = cdpo_loss(best, rate)
    (gradient,) = torch.autograd.grad(loss, best)
    assert abs(gradient.item()) < 1e-12
    assert cdpo_loss(best.detach() + step, rate) > loss
    # The value there is the entropy of a coin with that bias.
    assert loss.item() == pytest.approx(-rate * math.log(rate) - (1 - rate) * math.log(1 - rate), abs=1e-12)


@given(margins=MARGINS, rate=RATES)
def test_it_is_the_expectation_of_dpo_over_flips(margins, rate):
    """What the flips of the training data would do on average, done to every pair."""
    expected = -(1 - rate) * torch.sigmoid(margins).log() - rate * torch.sigmoid(-margins).log()
    finite = margins.abs() < 30  # beyond that sigmoid rounds to 1 or 0
    assert torch.allclose(cdpo_loss(margins, rate)[finite], expected[finite], rtol=1e-9, atol=1e-9)


def test_the_algorithm_takes_beta_and_its_setting():
    values = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = PairBatch(*values)
    margins = 0.3 * ((values[0] - values[2]) - (values[1] - values[3]))
    loss = CDPO(CDPOSettings(0.2), 0.3).loss(batch)
    assert loss.shape == (5,)
    assert torch.allclose(loss, dpo_loss(margins) + 0.2 * margins, rtol=0, atol=1e-12)


def test_gradient():
    margins = torch.linspace(-4, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: cdpo_loss(values, 0.15), margins)


@pytest.mark.parametrize("rate", [-0.1, 0.5, 1.0])
def test_out_of_range(rate):
    (problem,) = flags.out_of_range({"cdpo": CDPOSettings(rate)})
    assert problem == f"--cdpo.label_smoothing: {rate} is out of range, use at least 0, less than 0.5"


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.49])
def test_in_range(rate):
    assert flags.out_of_range({"cdpo": CDPOSettings(rate)}) == []
