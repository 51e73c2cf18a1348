"""What an oracle says of the answers: the best of some, and each answer of a chain against others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from openrlhf_sgpo.data.records import Prompt
from openrlhf_sgpo.oracle.base import Answer, Matrix, Oracle, Question
from openrlhf_sgpo.rollout.base import Sample

# Against whom an answer of a chain stands; the names are also those of the figures.
OPPONENTS = ("first", "previous", "iid", "best_of_n")


@dataclass(frozen=True)
class Answers:
    """All answers to one prompt. chain: by depth. samples: independent ones. counts: by depth, how many of the samples, from
    the first on, have together no more tokens than the chain up to there. draft_by: who wrote the chain's first answer, if it
    was given."""

    prompt: Prompt
    chain: list[Sample]
    samples: list[Sample]
    counts: list[int]
    draft_by: str = ""

    def question(self, samples: Sequence[Sample]) -> Question:
        answers = tuple(Answer(one.text, one.truncated, one.token_ids) for one in samples)
        return Question(self.prompt.id, self.prompt.messages, answers, self.prompt.template_kwargs)


def best_of(matrix: Matrix, count: int) -> int:
    """Which of the first ``count`` answers has the largest mean preference over the others of them; the earlier wins a tie.

    With preferences sigmoid(r - r') of a reward r it is the one with the largest reward.
    """

    def mean_preference(index: int) -> float:
        return fmean(matrix[index][other] for other in range(count) if other != index)

    return max(range(count), key=mean_preference) if count > 1 else 0


def choose(oracle: Oracle, answers: Sequence[Answers]) -> list[dict[str, Any]]:
    """For each prompt, by depth, the index of the best of the samples that count. Collective."""
    several = [one for one in answers if one.counts[-1] > 1]
    questions = [one.question(one.samples[: one.counts[-1]]) for one in several]
    matrices = oracle.preferences(questions, "best of n") if questions else []
    found = {one.prompt.id: matrix for one, matrix in zip(several, matrices, strict=True)}
    return [
        {"id": one.prompt.id, "best": [best_of(found.get(one.prompt.id, [[0.5]]), count) for count in one.counts]}
        for one in answers
    ]


def chain_preferences(
    oracle: Oracle, answers: Sequence[Answers], random_sample: bool, best: Sequence[Sequence[int]], seed: int
) -> list[dict[str, Any]]:
    """A row per prompt and depth: the preference for the chain's answer over each opponent that it has there, and which of the
    samples that opponent was.

    first and previous: of the chain, from depth 2 on. iid: one of the samples that count, drawn at random, if
    ``random_sample``. best_of_n: the best of them, where ``best`` has it. Collective.
    """
    asked: dict[tuple[int, int, str, int], Question] = {}
    rows = []
    for number, one in enumerate(answers):
        for place, sample in enumerate(one.chain):
            opponents = {"first": ("chain", 0), "previous": ("chain", place - 1)} if place else {}
            if random_sample:
                drawn = random.Random(f"{seed} {one.prompt.id} {place}").randrange(one.counts[place])
                opponents["iid"] = ("samples", drawn)
            if best:
                opponents["best_of_n"] = ("samples", best[number][place])
            keys = {name: (number, place, *opponent) for name, opponent in opponents.items()}
            asked |= {key: one.question([sample, getattr(one, key[2])[key[3]]]) for key in keys.values()}
            rows.append((one.prompt.id, place, keys))
    matrices = oracle.preferences(list(asked.values()), "preferences") if asked else []
    wins = {key: matrix[0][1] for key, matrix in zip(asked, matrices, strict=True)}
    return [
        {"id": name, "depth": place + 1}
        | {f"over_{opponent}": wins.get(keys[opponent]) if opponent in keys else None for opponent in OPPONENTS}
        | {f"{opponent}_index": keys[opponent][3] + 1 if opponent in keys else None for opponent in OPPONENTS[2:]}
        for name, place, keys in rows
    ]
