"""Batches of pairs with given margins, for the tests of algorithms that learn from pairs."""

import pytest
import torch

from openrlhf_sgpo.algorithms.base import PairBatch

BETA = 0.5  # a power of two, so that margins come back from a batch exactly


def draw(count, seed=0, dtype=torch.float64):
    return 1.5 * torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def batch(margins, index=None):
    """A batch with these margins, differentiable in them."""
    none = torch.zeros_like(margins)
    index = torch.arange(len(margins)) if index is None else index
    return PairBatch(margins / BETA, none, none, none, index)


def close(expected):
    """Equal to rounding: torch may add up the same numbers in another order."""
    return pytest.approx(expected, rel=0, abs=1e-12)


def gradient_of(algorithm, margins):
    """d(mean loss) / d(margins) of the leader, shape of ``margins``."""
    margins = margins.clone().requires_grad_()
    return torch.autograd.grad(algorithm.loss(batch(margins)).mean(), margins)[0]
