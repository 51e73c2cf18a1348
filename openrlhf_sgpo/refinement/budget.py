"""How many independent answers fit into the token budget of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def affordable(lengths: Sequence[int], budget: int) -> int:
    """The largest n with lengths[0] + ... + lengths[n - 1] <= budget, and at least 1: there must be an answer."""
    return max(1, sum(total <= budget for total in accumulate(lengths)))


def further(lengths: Sequence[int], budget: int, depth: int, most: int) -> int:
    """How many answers to sample next; 0 once ``lengths`` suffices for ``affordable``.

    lengths: tokens of the answers so far. depth: length of the chain, and size of the first batch. Later batches fill the
    budget at the mean length, with at most as many answers as there are, rounded up to a power of two, so a few engine calls
    serve prompts with different needs. most: limit on the number of answers.
    """
    left, room = budget - sum(lengths), most - len(lengths)
    if not lengths:
        return min(depth, room)
    if left <= 0 or room <= 0:
        return 0
    needed = min(-(-left * len(lengths) // sum(lengths)), len(lengths))
    return min(1 << (needed - 1).bit_length(), room)
