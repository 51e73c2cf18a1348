"""Questions in, rewards out: what every oracle offers, and how rewards become pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from openrlhf_sgpo.data.records import Messages, Pair


@dataclass(frozen=True)
class Answer:
    """truncated: the length limit stopped it, so that no end of turn follows."""

    text: str
    truncated: bool = False


@dataclass(frozen=True)
class Question:
    """A prompt with the answers to compare."""

    id: str
    prompt: Messages
    answers: tuple[Answer, ...]


class Oracle(Protocol):
    """``name`` is kept as the source of the pairs that the oracle ranks."""

    name: str

    def rewards(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        """A reward for each answer of each question; only differences within a question mean something. Collective."""


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int]:
    """Indices of the largest and the smallest reward; the earlier sample wins a tie, so that they always differ.

    Raises ValueError for fewer than two rewards.
    """
    if len(rewards) < 2:
        raise ValueError(f"a preference needs two responses, got {len(rewards)}")
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    return order[0], order[-1]


def rank(question: Question, rewards: Sequence[float], source: str, number: int) -> Pair:
    """The pair of best and worst answer, of round ``number``; the rewards are kept as scores."""
    best, worst = best_and_worst(rewards)
    chosen, rejected = question.answers[best], question.answers[worst]
    return Pair(
        id=f"round_{number}/{question.id}",
        prompt=question.prompt,
        chosen=chosen.text,
        rejected=rejected.text,
        source=source,
        round=number,
        chosen_truncated=chosen.truncated,
        rejected_truncated=rejected.truncated,
        scores={"chosen": rewards[best], "rejected": rewards[worst]},
    )


def agreement(rewards: Sequence[Sequence[float]]) -> float:
    """Share of questions (chosen, rejected) in which the oracle prefers the first answer, a tie counting one half."""
    points = sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in rewards)
    return points / len(rewards)
