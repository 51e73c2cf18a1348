"""SymPO's loss: symmetric, clipped, and the limit of ROPO."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_batches import BETA, batch, draw

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms.base import PairBatch
from openrlhf_sgpo.algorithms.ropo import ropo_loss
from openrlhf_sgpo.algorithms.sym_po import SymPO, SymPOSettings, sym_po_loss

REWARDS = st.floats(-30, 30).map(lambda value: torch.tensor([value], dtype=torch.float64))


@given(chosen=REWARDS, rejected=REWARDS, clip=st.floats(0.1, 20))
def test_both_labels_of_a_pair_sum_to_1(chosen, rejected, clip):
    total = sym_po_loss(chosen, rejected, clip) + sym_po_loss(rejected, chosen, clip)
    assert torch.allclose(total, torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-15)


@given(rate=st.floats(0, 0.49))
def test_flips_scale_the_gradient_of_every_pair_alike(rate):
    rewards = (3 * draw(12).view(6, 2)).requires_grad_()
    clean = sym_po_loss(rewards[:, 0], rewards[:, 1], 10.0).sum()
    flipped = sym_po_loss(rewards[:, 1], rewards[:, 0], 10.0).sum()
    (expected,) = torch.autograd.grad(clean, rewards, retain_graph=True)
    (gradient,) = torch.autograd.grad((1 - rate) * clean + rate * flipped, rewards)
    assert torch.allclose(gradient, (1 - 2 * rate) * expected, rtol=0, atol=1e-12)


def test_inside_the_clip_it_is_the_limit_of_ropo():
    margins = draw(40)
    loss = SymPO(SymPOSettings(), BETA).loss(batch(margins))
    assert torch.allclose(loss, torch.sigmoid(-margins), rtol=0, atol=1e-15)
    assert torch.allclose(4 * loss, ropo_loss(margins, 1e9), rtol=0, atol=1e-7)


def test_each_reward_is_clipped_by_itself():
    policy = torch.tensor([[30.0, 0.0], [0.0, -30.0], [30.0, -30.0], [1.0, 0.5]], dtype=torch.float64).requires_grad_()
    none = torch.zeros(4, dtype=torch.float64)
    loss = SymPO(SymPOSettings(clip=2.0), 1.0).loss(PairBatch(policy[:, 0], policy[:, 1], none, none))
    assert torch.allclose(loss, torch.sigmoid(-torch.tensor([2.0, 2.0, 4.0, 0.5], dtype=torch.float64)))
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert (gradient != 0).tolist() == [[False, True], [True, False], [False, False], [True, True]]


def test_gradient():
    rewards = draw(10).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: sym_po_loss(values[:5], values[5:], 10.0), rewards)


def test_the_clip_is_positive():
    (problem,) = flags.out_of_range({"sym_po": SymPOSettings(0.0)})
    assert problem == "--sym_po.clip: 0.0 is out of range, use more than 0"
    with pytest.raises(RuntimeError):
        sym_po_loss(torch.zeros(2), torch.zeros(3), 1.0)
