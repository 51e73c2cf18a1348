"""Oracles with known optima: --oracle toy_oracles:Letters is transitive, toy_oracles:Condorcet is not."""

from __future__ import annotations

from openrlhf_sgpo import games
from openrlhf_sgpo.oracle import PreferenceOracle, RewardOracle

CONDORCET = games.GAMES["condorcet"]().preferences


class Letters(RewardOracle):
    """The more characters are plain letters, the better."""

    name = "letters"

    def score(self, prompt, answer):
        return float(sum(letter.isascii() and letter.isalpha() for letter in answer))


def kind(text: str) -> int:
    """Which action of the game an answer is, by its first character."""
    return ord(text[0]) % 3 if text else 0


class Condorcet(PreferenceOracle):
    """The Condorcet paradox of three kinds of answers: A beats B beats C beats A."""

    name = "condorcet"

    def prefer(self, prompt, first, second):
        return float(CONDORCET[kind(first), kind(second)])
