"""The human seed: selecting its pairs, and flipping a share of their labels on purpose."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from openrlhf_sgpo.data.records import Pair

if TYPE_CHECKING:
    from torch import Tensor

_OTHER = {"chosen": "rejected", "rejected": "chosen"}


def farthest_points(embeddings: Tensor, count: int, first: int) -> list[int]:
    """Greedy max-min selection: each new point is the farthest (in cosine distance, in float32) from all points chosen so far.

    embeddings: (N, D), none zero. Cost O(N * count * D) time, O(N) memory besides the embeddings; ties go to the lower
    index. (Gonzalez 1985. The code released with arXiv 2502.18099 picks the largest *sum* of distances instead, which
    prefers the rim of the cloud and may choose near-duplicates.)
    Raises ValueError unless 1 <= count <= N.
    """
    import torch

    if not 1 <= count <= len(embeddings):
        raise ValueError(f"cannot select {count} of {len(embeddings)} points")
    directions = torch.nn.functional.normalize(embeddings.float(), dim=1)
    chosen = [first]
    nearest = 1 - directions @ directions[first]
    for _ in range(count - 1):
        nearest[chosen[-1]] = -1.0  # otherwise rounding could choose a point twice
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, 1 - directions @ directions[chosen[-1]])
    return chosen


def select_seed(pairs: list[Pair], size: int, seed: int, embeddings: Tensor | None = None) -> list[Pair]:
    """``size`` pairs (0: all, in their order): at random, or farthest points if embeddings (N, D) are given."""
    if not size:
        return list(pairs)
    if size > len(pairs):
        raise ValueError(f"--seed.size {size} exceeds the {len(pairs)} pairs of --data.dataset")
    generator = random.Random(seed)
    if embeddings is None:
        return [pairs[index] for index in sorted(generator.sample(range(len(pairs)), size))]
    return [pairs[index] for index in farthest_points(embeddings, size, first=generator.randrange(len(pairs)))]


def flip_labels(pairs: list[Pair], rate: float, seed: int) -> list[Pair]:
    """Swaps chosen and rejected, and every field that refers to them, in exactly round(rate * N) pairs, marked ``flipped``."""
    flipped = set(random.Random(f"flip {seed}").sample(range(len(pairs)), round(rate * len(pairs))))
    return [
        replace(
            pair,
            chosen=pair.rejected,
            rejected=pair.chosen,
            chosen_truncated=pair.rejected_truncated,
            rejected_truncated=pair.chosen_truncated,
            chosen_token_ids=pair.rejected_token_ids,
            rejected_token_ids=pair.chosen_token_ids,
            scores={_OTHER.get(name, name): score for name, score in pair.scores.items()},
            flipped=True,
        )
        if index in flipped
        else pair
        for index, pair in enumerate(pairs)
    ]
