"""What an oracle says about answers, the two kinds of oracles, and how their word becomes a pair.

This module imports without torch: settings are checked with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from openrlhf_sgpo.content_cache import ContentCache, content_key
from openrlhf_sgpo.data.records import Messages, Pair, Prompt
from openrlhf_sgpo.data.template import today

if TYPE_CHECKING:
    from openrlhf_sgpo.config import Inference
    from openrlhf_sgpo.data.tokens import ChatFormat
    from openrlhf_sgpo.openrlhf import DeepspeedStrategy
    from openrlhf_sgpo.training.scoring import Scorer

Matrix = list[list[float]]
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Answer:
    """truncated: the length limit stopped it, so no end of turn follows. token_ids: as an engine with the policy's tokenizer
    drew them; empty for a text that people wrote."""

    text: str
    truncated: bool = False
    token_ids: tuple[int, ...] = ()

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Answer:
        """The answer in a row that ``Sample.to_row`` made."""
        return cls(row["text"], row["truncated"], tuple(row["token_ids"]))


@dataclass(frozen=True)
class Question:
    """A prompt with the answers to compare. template_kwargs: as in ``Prompt``."""

    id: str
    prompt: Messages
    answers: tuple[Answer, ...]
    template_kwargs: dict[str, Any] = field(default_factory=dict)


class Comparison(NamedTuple):
    """Two answers in the order in which they are shown. question: its id. tools: that the prompt's assistant may call."""

    question: str
    prompt: Messages
    first: Answer
    second: Answer
    tools: Sequence[Any] = ()

    def swapped(self) -> Comparison:
        return self._replace(first=self.second, second=self.first)


@dataclass(frozen=True)
class Resources:
    """What an oracle may work with.

    chat: the policy's. scorer: the run's own, which the policy's figures come from. folder: the run's, where an oracle keeps
    what it found. resident: models stay in memory between calls, until ``close``. moment: that chat templates are
    told, see ``ChatFormat``.
    """

    config: Inference
    strategy: DeepspeedStrategy
    chat: ChatFormat
    scorer: Scorer
    folder: Path
    resident: bool = False
    moment: datetime = field(default_factory=today)


class Oracle:
    """Base of every oracle. An oracle derives from ``RewardOracle`` or ``PreferenceOracle``.

    Class attributes: ``name`` (value of --oracle, and the source of the pairs that it ranks), ``reads`` (the shared settings
    that it reads of those that only oracles read, as beginnings of flag names: giving others is an error).

    calls: judgements that were really made so far, not answered out of what was kept. Everything that takes questions is
    collective: every rank calls it with the same arguments and gets the same result. label: of the progress bar; empty: none.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, resources: Resources | None = None):
        self.resources = resources
        self.calls = 0
        self.scorers: list[Scorer] = []  # those of models of its own
        self._cache: ContentCache | None = None

    @classmethod
    def problems(cls, config: Inference) -> list[str]:
        """Problems with the settings, each naming its flag; empty when all is well. Needs no torch."""
        return []

    @classmethod
    def check(cls, config: Inference) -> None:
        """Raises ValueError for what can be known of folders and servers before a model is loaded."""

    @classmethod
    def check_prompts(cls, config: Inference, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for prompts that a model of the oracle cannot read, before one is loaded."""

    def rewards(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        """A reward for each answer of each question; only differences within a question mean something. Collective."""
        raise NotImplementedError

    def preferences(self, questions: Sequence[Question], label: str) -> list[Matrix]:
        """Of each question the matrix whose entry [i][j] is the probability that answer i is preferred to answer j: 1/2 on
        the diagonal and for equal texts, and [i][j] + [j][i] = 1. Collective."""
        raise NotImplementedError

    def usage(self) -> dict[str, int]:
        """Running totals of what the oracle has cost, by their names in the ledger."""
        tokens = {"judge_tokens": sum(one.tokens_scored for one in self.scorers)} if self.scorers else {}
        return {"judge_calls": self.calls, **tokens}

    def close(self) -> None:
        """Give back models that are held in memory. Collective."""
        for scorer in self.scorers:
            scorer.close()

    def _ask_each(
        self,
        items: Sequence[tuple[str, tuple[Any, ...]]],
        ask: Callable[..., float],
        label: str,
        largest: float = math.inf,
    ) -> list[float]:
        """``ask(*arguments)`` of each (question id, arguments), on rank 0, once per content. Collective.

        largest: that is possible; then the least is 0. Raises ValueError for a figure that is not finite or out of this range,
        and does not keep it.
        """
        from openrlhf_sgpo import ranks
        from openrlhf_sgpo.output import Progress

        def work() -> tuple[list[float], int]:
            if self._cache is None:
                folder = self.resources.folder if self.resources else None
                self._cache = ContentCache(folder and folder / "judgements" / f"{self.name}.jsonl")
            found, calls = [], 0
            for question, arguments in Progress(items, desc=label, unit="call", disable=not label):
                key = content_key(self.name, *arguments)
                if key not in self._cache:
                    start = f"oracle {self.name}, question {question}"
                    self._cache[key] = _number(ask, arguments, start, largest)
                    calls += 1
                found.append(self._cache[key])
            return found, calls

        found, calls = ranks.on_rank_0(work)
        self.calls += calls
        return found


def _number(ask: Callable[..., float], arguments: tuple[Any, ...], start: str, largest: float) -> float:
    """What a foreign function returns. Its failure is an error, never a figure."""
    try:
        value = float(ask(*arguments))
    except Exception as error:
        raise ValueError(f"{start}: {ask.__name__} failed ({type(error).__name__}: {error})") from error
    if not math.isfinite(value) or (largest < math.inf and not 0 <= value <= largest):
        raise ValueError(f"{start}: {ask.__name__} returned {value}{'' if largest == math.inf else ', no probability'}")
    return value


class RewardOracle(Oracle):
    """An oracle that gives each answer a reward r of its own: p(a, b) = sigmoid(r(a) - r(b)), Bradley and Terry's model.

    It defines ``score``, or ``scores`` for many answers at once.
    """

    def score(self, prompt: Messages, answer: str) -> float:
        """The reward of one answer; asked on rank 0, and once per content."""
        raise NotImplementedError

    def scores(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        """Rewards of all answers of all questions. Collective; it adds to ``calls``."""
        items = [(question.id, (question.prompt, one.text)) for question in questions for one in question.answers]
        found = iter(self._ask_each(items, self.score, label))
        return [[next(found) for _ in question.answers] for question in questions]

    def rewards(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        return check_rewards(self.name, questions, self.scores(questions, label))

    def preferences(self, questions: Sequence[Question], label: str) -> list[Matrix]:
        rows = zip(questions, self.rewards(questions, label), strict=True)
        return [
            antisymmetric(len(row), {(i, j): sigmoid(row[i] - row[j]) for i, j in distinct_pairs(question)})
            for question, row in rows
        ]


class PreferenceOracle(Oracle):
    """An oracle that compares two answers at a time, so that its preferences may go round in a circle. As a reward it gives
    an answer's mean preference over the other answers to the question.

    It defines ``prefer``, or ``compare`` for many comparisons at once, or ``matrices``. Answers are shown in both orders:
    p(a, b) = [q(a, b) + 1 - q(b, a)] / 2, with q(first, second) what it says of one order.
    """

    def prefer(self, prompt: Messages, first: str, second: str) -> float:
        """The probability that the first answer is the better one; asked on rank 0, and once per content."""
        raise NotImplementedError

    def compare(self, comparisons: Sequence[Comparison], label: str) -> list[float]:
        """The probability of each comparison's first answer. Collective; it adds to ``calls``."""
        items = [(one.question, (one.prompt, one.first.text, one.second.text)) for one in comparisons]
        return self._ask_each(items, self.prefer, label, largest=1.0)

    def orders(self, comparison: Comparison) -> list[Comparison]:
        """The orders in which two answers are shown."""
        return [comparison, comparison.swapped()]

    def matrices(self, questions: Sequence[Question], label: str) -> list[Matrix]:
        asked = []
        for number, question in enumerate(questions):
            tools = question.template_kwargs.get("tools", ())
            for pair in distinct_pairs(question):
                first, second = (question.answers[place] for place in pair)
                for one in self.orders(Comparison(question.id, question.prompt, first, second, tools)):
                    asked.append((number, pair, one, one.first is first))
        comparisons = [one for _, _, one, _ in asked]
        said = check_shares(self.name, comparisons, self.compare(comparisons, label) if asked else [])
        shares: list[dict[tuple[int, int], list[float]]] = [{} for _ in questions]
        for (number, pair, _, in_order), share in zip(asked, said, strict=True):
            shares[number].setdefault(pair, []).append(share if in_order else 1 - share)
        return [
            antisymmetric(len(question.answers), {pair: fmean(both) for pair, both in found.items()})
            for question, found in zip(questions, shares, strict=True)
        ]

    def preferences(self, questions: Sequence[Question], label: str) -> list[Matrix]:
        found = self.matrices(questions, label)
        check_preferences(self.name, questions, found)
        return found

    def rewards(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        return [
            [fmean(row[:index] + row[index + 1 :]) for index, row in enumerate(matrix)]
            for matrix in self.preferences(questions, label)
        ]


def sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))  # 1 / (1 + exp(-value)) overflows


def distinct_pairs(question: Question) -> list[tuple[int, int]]:
    """Indices i < j of answers with different texts: equal ones need no judgement."""
    texts = [one.text for one in question.answers]
    return [(i, j) for i, j in combinations(range(len(texts)), 2) if texts[i] != texts[j]]


def antisymmetric(size: int, upper: Mapping[tuple[int, int], float]) -> Matrix:
    """The matrix of ``size`` answers from its entries above the diagonal; those that are not there are 1/2."""
    matrix = [[0.5] * size for _ in range(size)]
    for (i, j), share in upper.items():
        matrix[i][j], matrix[j][i] = share, 1 - share
    return matrix


def check_rewards(name: str, questions: Sequence[Question], rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """The rewards, as they are. Raises ValueError, naming oracle and question, unless there is a finite one for each answer:
    with NaN it would be the answers' places that say which is preferred."""
    rows = [list(row) for row in rewards]
    if len(rows) != len(questions):
        raise ValueError(f"oracle {name}: rewards of {len(rows)} questions for {len(questions)}")
    for question, row in zip(questions, rows, strict=True):
        size = len(question.answers)
        if len(row) != size or not all(map(_is_figure, row)):
            raise ValueError(
                f"oracle {name}, question {question.id}: {row} are not the finite rewards of {size} answers"
            )
    return rows


def check_shares(name: str, comparisons: Sequence[Comparison], shares: Sequence[float]) -> Sequence[float]:
    """The shares, as they are. Raises ValueError, naming oracle and question, unless each comparison has a probability."""
    if len(shares) != len(comparisons):
        raise ValueError(f"oracle {name}: {len(shares)} preferences for {len(comparisons)} comparisons")
    for comparison, share in zip(comparisons, shares, strict=True):
        if not (_is_figure(share) and 0 <= share <= 1):
            raise ValueError(f"oracle {name}, question {comparison.question}: {share!r} is no probability")
    return shares


def _is_figure(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError):
        return False


def check_preferences(name: str, questions: Sequence[Question], matrices: Sequence[Matrix]) -> None:
    """Raises ValueError, naming oracle, question and pair, unless every matrix holds probabilities with
    [i][j] + [j][i] = 1, and 1/2 for equal texts."""
    if len(matrices) != len(questions):
        raise ValueError(f"oracle {name}: {len(matrices)} matrices of preferences for {len(questions)} questions")
    for question, matrix in zip(questions, matrices, strict=True):
        start, size = f"oracle {name}, question {question.id}", len(question.answers)
        if len(matrix) != size or any(len(row) != size for row in matrix):
            raise ValueError(f"{start}: the preferences of {size} answers must be {size} rows of {size}")
        for i in range(size):
            for j in range(i, size):
                p, q = matrix[i][j], matrix[j][i]
                if not (_is_figure(p) and _is_figure(q)):
                    raise ValueError(f"{start}: answer {i} is preferred to {j} with {p!r}, {j} to {i} with {q!r}")
                equal = question.answers[i].text == question.answers[j].text
                if not (0 <= p <= 1 and abs(p + q - 1) <= TOLERANCE and (not equal or abs(p - 0.5) <= TOLERANCE)):
                    rule = "equal answers must have 1/2" if equal else "they must be probabilities and add up to 1"
                    raise ValueError(f"{start}: answer {i} is preferred to {j} with {p}, {j} to {i} with {q}; {rule}")


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
        chosen_token_ids=chosen.token_ids,
        rejected_token_ids=rejected.token_ids,
        template_kwargs=question.template_kwargs,
        scores={"chosen": rewards[best], "rejected": rewards[worst]},
    )


def agreement(rewards: Sequence[Sequence[float]]) -> float:
    """Share of questions (chosen, rejected) in which the oracle prefers the first answer, a tie counting one half."""
    points = sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in rewards)
    return points / len(rewards)
