"""How many independent answers the tokens of a chain pay for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def affordable(lengths: Sequence[int], budget: int) -> int:
    """The largest n with lengths[0] + ... + lengths[n - 1] <= budget, but 1 if there is none: one answer there must be."""
    return max(1, sum(total <= budget for total in accumulate(lengths)))


def further(lengths: Sequence[int], budget: int, depth: int, most: int) -> int:
    """How many answers to draw next, 0 once ``affordable`` can be told.

    lengths: of those that are there. At first as many as the chain is deep. Then as many as it takes at their mean length, but
    no more than are there already; rounded up to a power of two, so that a few calls serve prompts that need unlike numbers.
    """
    left, room = budget - sum(lengths), most - len(lengths)
    if not lengths:
        return min(depth, room)
    if left <= 0 or room <= 0:
        return 0
    wanted = min(-(-left * len(lengths) // sum(lengths)), len(lengths))
    return min(1 << (wanted - 1).bit_length(), room)
