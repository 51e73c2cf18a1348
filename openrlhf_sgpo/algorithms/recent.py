"""The latest margins of training, for algorithms whose loss depends on how margins are distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def drawn(margins: Tensor, count: int, seed: int) -> Tensor:
    """Up to ``count`` of these margins, shape (N,), until later ones replace them: drawn at random, so that which ones does not
    depend on the order of the data."""
    import torch

    order = torch.randperm(len(margins), generator=torch.Generator().manual_seed(seed))
    return margins.detach()[order[:count]]


def followed_by(recent: Tensor | None, latest: Tensor, count: int) -> Tensor:
    """The last ``count`` of the recent margins and the latest, shape (n,), oldest first, on the CPU, where checkpoints are
    loaded. A copy: a view would put all earlier steps into checkpoints."""
    import torch

    latest = latest.detach().cpu()
    return (latest if recent is None else torch.cat([recent, latest]))[-count:].clone()
