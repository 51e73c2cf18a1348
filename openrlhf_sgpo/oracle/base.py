"""The two kinds of preference oracles, what they judge, and how a judgement becomes a pair.

This module imports without torch, because settings are checked with it.
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

from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.content_cache import ContentCache, content_key
from openrlhf_sgpo.data.records import Answer, Messages, Pair, Prompt
from openrlhf_sgpo.data.template import today
from openrlhf_sgpo.data.tokens import ChatFormat

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import DeepspeedStrategy
    from openrlhf_sgpo.training.scoring import Scorer

Matrix = list[list[float]]
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Question:
    """A prompt with the answers to compare. template_kwargs: as in ``Prompt``."""

    id: str
    prompt: Messages
    answers: tuple[Answer, ...]
    template_kwargs: dict[str, Any] = field(default_factory=dict)


class Comparison(NamedTuple):
    """Two answers in the order shown. question: its id. tools: those that the assistant in the prompt may call."""

    question: str
    prompt: Messages
    first: Answer
    second: Answer
    tools: Sequence[Any] = ()

    def swapped(self) -> Comparison:
        return self._replace(first=self.second, second=self.first)


@dataclass(frozen=True)
class Resources:
    """What an oracle may use.

    chat: the policy's chat format. scorer: the one that scores the policy in this run. folder: the run folder, where an oracle
    stores its judgements. resident: models stay in memory between calls, until ``close``. moment: the date and time passed to
    chat templates, see ``ChatFormat``.
    """

    config: Inference
    strategy: DeepspeedStrategy
    chat: ChatFormat
    scorer: Scorer
    folder: Path
    resident: bool = False
    moment: datetime = field(default_factory=today)


class Oracle:
    """Base class of all oracles. An oracle derives from ``RewardOracle`` or ``PreferenceOracle``.

    Class attributes: ``name`` (value of --oracle, and the source of the pairs that it ranks), ``reads`` (prefixes of the flags
    that it reads, among those that only oracles read: setting any other of them is an error), ``needs_model`` (what
    --reward.model_name_or_path must name; empty if it may be missing).

    calls: judgements made so far, not counting cached ones. Methods that take questions are collective: every rank calls them
    with the same arguments and gets the same result. label: text of the progress bar; empty for none.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    needs_model: ClassVar[str] = ""

    def __init__(self, resources: Resources | None = None):
        self.resources = resources
        self.calls = 0
        self.scorers: list[Scorer] = []  # of models that only this oracle loads
        self._cache: ContentCache | None = None

    @classmethod
    def problems(cls, config: Inference) -> list[str]:
        """Problems with the settings, each naming its flag; empty if there are none. Needs no torch."""
        if not cls.needs_model or config.reward.model_name_or_path:
            return []
        return [f"--reward.model_name_or_path: missing, --oracle {cls.name} needs {cls.needs_model}"]

    @classmethod
    def check(cls, config: Inference) -> None:
        """Raises ValueError for problems with folders and servers that show before a model is loaded."""

    @classmethod
    def check_prompts(cls, config: Inference, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for prompts that one of the oracle's models cannot read, before any is loaded."""

    def rewards(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        """A reward for each answer to each question; only differences within a question are meaningful. Collective."""
        raise NotImplementedError

    def preferences(self, questions: Sequence[Question], label: str) -> list[Matrix]:
        """One matrix per question, whose entry ``[i][j]`` is the probability that answer i is preferred to answer j: 1/2 on the
        diagonal and for equal texts, and ``[i][j] + [j][i] = 1``. Collective."""
        raise NotImplementedError

    def usage(self) -> dict[str, int]:
        """Running totals of the oracle's costs, by their names in the ledger."""
        tokens = {"judge_tokens": sum(scorer.tokens_scored for scorer in self.scorers)} if self.scorers else {}
        return {"judge_calls": self.calls, **tokens}

    def close(self) -> None:
        """Release models held in memory. Collective."""
        for scorer in self.scorers:
            scorer.close()

    def _ask_each(
        self,
        items: Sequence[tuple[str, tuple[Any, ...]]],
        ask: Callable[..., float],
        label: str,
        maximum: float = math.inf,
    ) -> list[float]:
        """``ask(*arguments)`` for each (question id, arguments), on rank 0, once per content. Collective.

        maximum: the largest valid value; if finite, the smallest is 0. Raises ValueError, and caches nothing, for a value that
        is not finite or out of this range.
        """
        from openrlhf_sgpo import ranks
        from openrlhf_sgpo.output import Progress

        def work() -> tuple[list[float], int]:
            if self._cache is None:
                folder = self.resources.folder if self.resources else None
                self._cache = ContentCache(folder and folder / "judgements" / f"{self.name}.jsonl")
            values, calls = [], 0
            for question, arguments in Progress(items, desc=label, unit="call", disable=not label):
                key = content_key(self.name, *arguments)
                if key not in self._cache:
                    start = f"oracle {self.name}, question {question}"
                    self._cache[key] = _number(ask, arguments, start, maximum)
                    calls += 1
                values.append(self._cache[key])
            return values, calls

        values, calls = ranks.on_rank_0(work)
        self.calls += calls
        return values


def _number(ask: Callable[..., float], arguments: tuple[Any, ...], start: str, maximum: float) -> float:
    """The number returned by a user's function. Raises ValueError if it fails or returns an invalid number."""
    try:
        value = float(ask(*arguments))
    except Exception as error:
        raise ValueError(f"{start}: {ask.__name__} failed ({type(error).__name__}: {error})") from error
    if not math.isfinite(value) or (maximum < math.inf and not 0 <= value <= maximum):
        raise ValueError(
            f"{start}: {ask.__name__} returned {value}{'' if maximum == math.inf else ', not a probability'}"
        )
    return value


class RewardOracle(Oracle):
    """An oracle that gives each answer a reward r: p(a, b) = sigmoid(r(a) - r(b)), the Bradley-Terry model.

    It defines ``score``, or ``scores`` for many answers at once.
    """

    def score(self, prompt: Messages, answer: str) -> float:
        """The reward of one answer; called on rank 0, once per content."""
        raise NotImplementedError

    def scores(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        """Rewards of all answers to all questions. Collective; adds to ``calls``."""
        items = [(question.id, (question.prompt, answer.text)) for question in questions for answer in question.answers]
        rewards = iter(self._ask_each(items, self.score, label))
        return [[next(rewards) for _ in question.answers] for question in questions]

    def rewards(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        return check_rewards(self.name, questions, self.scores(questions, label))

    def preferences(self, questions: Sequence[Question], label: str) -> list[Matrix]:
        rows = zip(questions, self.rewards(questions, label), strict=True)
        return [win_probabilities(question, row) for question, row in rows]


class PreferenceOracle(Oracle):
    """An oracle that compares two answers at a time, so its preferences may be cyclic. The reward of an answer is its mean
    preference over the other answers to the question.

    It defines ``prefer``, or ``compare`` for many comparisons at once, or ``matrices``. Answers are shown in both orders:
    p(a, b) = [q(a, b) + 1 - q(b, a)] / 2, with q(first, second) the preference in one order.
    """

    def prefer(self, prompt: Messages, first: str, second: str) -> float:
        """The probability that the first answer is the better one; called on rank 0, once per content."""
        raise NotImplementedError

    def compare(self, comparisons: Sequence[Comparison], label: str) -> list[float]:
        """For each comparison the probability that its first answer is better. Collective; adds to ``calls``."""
        items = [(each.question, (each.prompt, each.first.text, each.second.text)) for each in comparisons]
        return self._ask_each(items, self.prefer, label, maximum=1.0)

    def orders(self, comparison: Comparison) -> list[Comparison]:
        """The orders in which to show two answers."""
        return [comparison, comparison.swapped()]

    def matrices(self, questions: Sequence[Question], label: str) -> list[Matrix]:
        comparisons: list[Comparison] = []
        entries = []  # of each comparison: question number, pair of answers, whether shown in the pair's order
        for number, question in enumerate(questions):
            tools = question.template_kwargs.get("tools", ())
            for pair in distinct_pairs(question):
                first, second = (question.answers[index] for index in pair)
                for comparison in self.orders(Comparison(question.id, question.prompt, first, second, tools)):
                    comparisons.append(comparison)
                    entries.append((number, pair, comparison.first is first))
        shares = check_shares(self.name, comparisons, self.compare(comparisons, label) if comparisons else [])
        by_pair: list[dict[tuple[int, int], list[float]]] = [{} for _ in questions]
        for (number, pair, in_order), share in zip(entries, shares, strict=True):
            by_pair[number].setdefault(pair, []).append(share if in_order else 1 - share)
        return [
            antisymmetric(len(question.answers), {pair: fmean(both) for pair, both in pairs.items()})
            for question, pairs in zip(questions, by_pair, strict=True)
        ]

    def preferences(self, questions: Sequence[Question], label: str) -> list[Matrix]:
        matrices = self.matrices(questions, label)
        check_preferences(self.name, questions, matrices)
        return matrices

    def rewards(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        return [
            [fmean(row[:index] + row[index + 1 :]) for index, row in enumerate(matrix)]
            for matrix in self.preferences(questions, label)
        ]


def sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))  # 1 / (1 + exp(-value)) overflows


def win_probabilities(question: Question, rewards: Sequence[float]) -> Matrix:
    """The preferences sigmoid(r(a) - r(b)) between the answers to a question."""
    wins = {(i, j): sigmoid(rewards[i] - rewards[j]) for i, j in distinct_pairs(question)}
    return antisymmetric(len(rewards), wins)


def distinct_pairs(question: Question) -> list[tuple[int, int]]:
    """Indices i < j of answers with different texts; equal texts need no judgement."""
    texts = [answer.text for answer in question.answers]
    return [(i, j) for i, j in combinations(range(len(texts)), 2) if texts[i] != texts[j]]


def antisymmetric(size: int, upper: Mapping[tuple[int, int], float]) -> Matrix:
    """The preference matrix of ``size`` answers from its entries above the diagonal; missing ones are 1/2."""
    matrix = [[0.5] * size for _ in range(size)]
    for (i, j), share in upper.items():
        matrix[i][j], matrix[j][i] = share, 1 - share
    return matrix


def check_rewards(name: str, questions: Sequence[Question], rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """The rewards, unchanged. Raises ValueError, naming oracle and question, unless each answer has a finite reward: with NaN
    the order of the answers would decide which is preferred."""
    rows = [list(row) for row in rewards]
    if len(rows) != len(questions):
        raise ValueError(f"oracle {name}: got rewards for {len(rows)} of {len(questions)} questions")
    for question, row in zip(questions, rows, strict=True):
        size = len(question.answers)
        if len(row) != size or not all(map(_is_finite, row)):
            raise ValueError(f"oracle {name}, question {question.id}: expected {size} finite rewards, got {row}")
    return rows


def check_shares(name: str, comparisons: Sequence[Comparison], shares: Sequence[float]) -> Sequence[float]:
    """The shares, unchanged. Raises ValueError, naming oracle and question, unless each comparison has a probability."""
    if len(shares) != len(comparisons):
        raise ValueError(f"oracle {name}: got {len(shares)} preferences for {len(comparisons)} comparisons")
    for comparison, share in zip(comparisons, shares, strict=True):
        if not (_is_finite(share) and 0 <= share <= 1):
            raise ValueError(f"oracle {name}, question {comparison.question}: {share!r} is not a probability")
    return shares


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError):
        return False


def check_preferences(name: str, questions: Sequence[Question], matrices: Sequence[Matrix]) -> None:
    """Raises ValueError, naming oracle, question and pair, unless every matrix holds probabilities with
    ``[i][j] + [j][i] = 1``, and 1/2 for equal texts."""
    if len(matrices) != len(questions):
        raise ValueError(f"oracle {name}: got {len(matrices)} preference matrices for {len(questions)} questions")
    for question, matrix in zip(questions, matrices, strict=True):
        start, size = f"oracle {name}, question {question.id}", len(question.answers)
        if len(matrix) != size or any(len(row) != size for row in matrix):
            raise ValueError(f"{start}: the preferences for {size} answers must be a {size} x {size} matrix")
        for i in range(size):
            for j in range(i, size):
                p, q = matrix[i][j], matrix[j][i]
                if not (_is_finite(p) and _is_finite(q)):
                    raise ValueError(
                        f"{start}: preference [{i}][{j}] is {p!r}, [{j}][{i}] is {q!r}; they must be finite numbers"
                    )
                equal = question.answers[i].text == question.answers[j].text
                if not (0 <= p <= 1 and abs(p + q - 1) <= TOLERANCE and (not equal or abs(p - 0.5) <= TOLERANCE)):
                    rule = "equal answers must have 1/2" if equal else "they must be probabilities that add up to 1"
                    raise ValueError(f"{start}: preference [{i}][{j}] is {p}, [{j}][{i}] is {q}; {rule}")


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int]:
    """Indices of the largest and the smallest reward; the earlier sample wins a tie, so they always differ.

    Raises ValueError for fewer than two rewards.
    """
    if len(rewards) < 2:
        raise ValueError(f"a pair needs at least two answers, got {len(rewards)}")
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    return order[0], order[-1]


def rank(question: Question, rewards: Sequence[float], source: str, number: int) -> Pair:
    """The best and the worst answer as a pair of round ``number``, with their rewards as its scores."""
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
    """Share of the (chosen, rejected) rewards in which chosen is larger; a tie counts one half."""
    return fmean((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in rewards)
