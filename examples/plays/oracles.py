"""Two oracles with a known optimum, to see within minutes that a policy moves in the right direction.

They replace a reward model or a judge: --oracle examples.plays.oracles:TheCount, or :Paradox.
"""

from __future__ import annotations

from openrlhf_sgpo import games
from openrlhf_sgpo.oracle import PreferenceOracle, RewardOracle

CONDORCET = games.GAMES["condorcet"]().preferences


class TheCount(RewardOracle):
    """Transitive: every "the" counts, up to six, in an answer of at most twenty words; a longer one is worth nothing."""

    name = "the_count"

    def score(self, prompt, answer):
        words = answer.lower().split()
        return float(min(words.count("the"), 6)) if len(words) <= 20 else 0.0


class Paradox(PreferenceOracle):
    """Intransitive: answers are of three kinds by the length of their first word, and kind 0 beats 1 beats 2 beats 0 with the
    probabilities of the Condorcet paradox (``openrlhf-sgpo games``)."""

    name = "paradox"

    def prefer(self, prompt, first, second):
        return float(CONDORCET[kind(first), kind(second)])


def kind(answer: str) -> int:
    """0, 1 or 2: the first word has at most three letters, four or five, or more."""
    length = len((answer.split() or [""])[0])
    return (length > 3) + (length > 5)
