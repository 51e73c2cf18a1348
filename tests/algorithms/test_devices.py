"""Every loss with tensors of another device than the CPU: torch follows shapes, and a mix of devices is an error."""

from __future__ import annotations

import pytest
import torch

from openrlhf_sgpo import algorithms
from openrlhf_sgpo.algorithms import PlayAlgorithm
from openrlhf_sgpo.algorithms.base import PairBatch, Stage
from openrlhf_sgpo.algorithms.plays import Plays

DEVICE = "meta"  # for a GPU, which need not be there
VARIANTS = {
    "sgpo": [{}, {"space": "probability"}, {"pieces": 6}],
    "slhf": [{}, {"kl_level": "full_vocabulary"}],
}


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device=DEVICE)


def pairs() -> PairBatch:
    """Four pairs; their numbers are on the CPU, where the algorithm looks up what it has stored."""
    return PairBatch(*(empty(4) for _ in range(4)), torch.tensor([0, 3, 5, 9]), *(empty(4) for _ in range(4)))


def plays(count: int) -> Plays:
    return Plays(
        *(empty(4, count, 7) for _ in range(3)), empty(4, count, count), empty(4, count, 7), 3, empty(4, count)
    )


def test_a_mix_of_devices_would_be_seen():
    with pytest.raises(RuntimeError, match="device"):
        empty(3) + torch.rand(3)


# A loss that differentiates within itself needs a device that exists.
NAMES = [name for name in algorithms.names() if not getattr(algorithms.get(name), "reads_embeddings", False)]


@pytest.mark.parametrize("name", NAMES)
def test_losses_stay_on_their_device(name):
    kind = algorithms.get(name)
    for options in VARIANTS.get(name, [{}]):
        algorithm = kind(kind.settings(**options), 0.001)
        if issubclass(kind, PlayAlgorithm):
            batch = plays(len(algorithm.roles))
        else:
            algorithm.begin_stage(Stage(torch.randn(32), 1, 10, 0))
            batch = pairs()
        for values in (algorithm.loss(batch), algorithm.watched(batch)):
            assert (values.device.type, values.shape) == (DEVICE, (4,)), options
