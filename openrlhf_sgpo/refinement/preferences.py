"""The oracle's preferences: the best of n samples, and each answer of a chain against other answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from openrlhf_sgpo.data.records import Answer, Prompt
from openrlhf_sgpo.oracle.base import Matrix, Oracle, Question

# The opponents of a chain's answers; figures have the same names.
OPPONENTS = ("first", "previous", "iid", "best_of_n")


@dataclass(frozen=True)
class Answers:
    """All answers to one prompt. chain: by depth. samples: independent answers. counts: by depth, how many samples, from the
    first on, have together no more tokens than the chain up to that depth. draft_by: the model that wrote the chain's first
    answer, if that is a draft."""

    prompt: Prompt
    chain: list[Answer]
    samples: list[Answer]
    counts: list[int]
    draft_by: str = ""

    def question(self, samples: Sequence[Answer]) -> Question:
        return Question(self.prompt.id, self.prompt.messages, tuple(samples), self.prompt.template_kwargs)


def best_of(matrix: Matrix, count: int) -> int:
    """The index of the answer, among the first ``count``, with the largest mean preference over the others; the earlier answer
    wins a tie. With preferences sigmoid(r - r') of a reward r it is the answer with the largest reward."""

    def mean_preference(index: int) -> float:
        return fmean(share for column, share in enumerate(matrix[index][:count]) if column != index)

    return max(range(count), key=mean_preference) if count > 1 else 0


def choose(oracle: Oracle, answers: Sequence[Answers]) -> list[dict[str, Any]]:
    """For each prompt, by depth, the index of the best sample within the depth's budget. Collective."""
    questions = [row.question(row.samples[: row.counts[-1]]) for row in answers if row.counts[-1] > 1]
    matrices = oracle.preferences(questions, "best of n") if questions else []
    by_id = {question.id: matrix for question, matrix in zip(questions, matrices, strict=True)}
    return [
        {"id": row.prompt.id, "best": [best_of(by_id.get(row.prompt.id, [[0.5]]), count) for count in row.counts]}
        for row in answers
    ]


def chain_preferences(
    oracle: Oracle, answers: Sequence[Answers], random_sample: bool, best: Sequence[Sequence[int]], seed: int
) -> list[dict[str, Any]]:
    """A row per prompt and depth: the preference for the chain's answer over each of its opponents, and the indices, from 1, of
    opponents that are samples.

    first and previous: answers of the chain, from depth 2 on. iid: a random sample within the depth's budget, if
    ``random_sample``. best_of_n: the best sample within it, if ``best`` is not empty. Collective.
    """
    questions: dict[tuple[int, int, str, int], Question] = {}
    rows = []
    for number, row in enumerate(answers):
        for level, sample in enumerate(row.chain):
            opponents = {"first": ("chain", 0), "previous": ("chain", level - 1)} if level else {}
            if random_sample:
                drawn = random.Random(f"{seed} {row.prompt.id} {level}").randrange(row.counts[level])
                opponents["iid"] = ("samples", drawn)
            if best:
                opponents["best_of_n"] = ("samples", best[number][level])
            keys = {name: (number, level, *opponent) for name, opponent in opponents.items()}
            questions |= {key: row.question([sample, getattr(row, key[2])[key[3]]]) for key in keys.values()}
            rows.append((row.prompt.id, level, keys))
    matrices = oracle.preferences(list(questions.values()), "preferences") if questions else []
    wins = {key: matrix[0][1] for key, matrix in zip(questions, matrices, strict=True)}
    return [
        {"id": name, "depth": level + 1}
        | {f"over_{opponent}": wins.get(keys[opponent]) if opponent in keys else None for opponent in OPPONENTS}
        | {f"{opponent}_index": keys[opponent][3] + 1 if opponent in keys else None for opponent in OPPONENTS[2:]}
        for name, level, keys in rows
    ]
