"""The interface of a benchmark: items for models to answer, and a result for one model's answers.

This module imports without torch and without the benchmarks' packages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from openrlhf_sgpo import flags
from openrlhf_sgpo.benchmarks.benchmark_files import Fields
from openrlhf_sgpo.benchmarks.judge import EvaluationJudge
from openrlhf_sgpo.judge.client import Request


@dataclass(frozen=True)
class Item:
    """One question of a benchmark. turns: the user's messages, each sent after the previous answer. temperature: set by the
    benchmark; None: the user's. facts: what else the task needs to judge an answer (a reference, the baseline's output)."""

    id: str
    turns: tuple[str, ...]
    category: str = ""
    temperature: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Responses:
    """A model's responses to one item, by turn. truncated: whether the length limit stopped each. tokens: length of
    each in tokens; None for responses of another tool."""

    id: str
    turns: tuple[str, ...]
    truncated: tuple[bool, ...] = ()
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Result:
    """A row of the leaderboard.

    expected: items requested; n: those with a usable judgement. figures: by name, in display order; None: unavailable, for
    the reason in ``notes``. errors: standard errors of some figures. intervals: 95% intervals of some figures. categories: one
    figure per category. average_length: characters per answer. notes: caveats that readers of the row must know. judge:
    identity of the judge, None for a task without one. decoding: how the answers were made. published: figures of an anchor on
    the published leaderboard, with that leaderboard's judge; empty for other models.
    """

    task: str
    model: str
    n: int
    expected: int
    figures: dict[str, float | None]
    errors: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    categories: dict[str, float] = field(default_factory=dict)
    average_length: float = 0.0
    parse_failures: int = 0
    notes: list[str] = field(default_factory=list)
    judge: dict[str, Any] | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A model of a benchmark's published leaderboard. figures: published ones, by the names of the result's. average_length: of
    its answers in characters, rounded down. file: of its answers, below the task's ``answers_address``."""

    model: str
    figures: dict[str, float]
    average_length: int
    file: str


class Task:
    """Base of every benchmark. One benchmark is one file of ``tasks/``.

    Class attributes: name (in --tasks and as the group of its flags), judged (whether it needs a judge), reads_logprobs
    (whether it uses the judge's log-probabilities), answer_fields (fields of each row in the benchmark's own answer format),
    Settings (dataclass of its flags), packages (import names of the packages that define it), answers_address (where the
    answers of published models are; empty: the task has no anchors).
    """

    name: ClassVar[str]
    judged: ClassVar[bool] = True
    reads_logprobs: ClassVar[bool] = False
    answer_fields: ClassVar[Fields]
    Settings: ClassVar[type]
    packages: ClassVar[tuple[str, ...]] = ()
    answers_address: ClassVar[str] = ""

    def __init__(self, settings: Any):
        """Raises ValueError for a setting out of range."""
        flags.refuse(flags.out_of_range({self.name: settings}))
        self.settings = settings

    def items(self) -> list[Item]:
        """All items in canonical order, or ``settings.limit`` of them. Raises ValueError, naming the flag, if the benchmark's
        files are unavailable or invalid."""
        raise NotImplementedError

    def read_responses(self, path: Path) -> list[Responses]:
        """Responses that another tool wrote in the benchmark's own format, in any order. Raises ValueError."""
        raise NotImplementedError

    def preflight(self, judge: EvaluationJudge) -> list[str]:
        """Ask the judge a trial question before the paid ones; returns notes. Raises ValueError if the judge is unsuitable."""
        return []

    def requests(
        self, items: Sequence[Item], responses: Mapping[str, Responses], judge: EvaluationJudge
    ) -> tuple[dict[str, Any], list[Request]]:
        """The judge's decoding, and what ``evaluate`` asks it: for the cost, which is stated before anything is asked."""
        return {}, []

    def published(self) -> list[Published]:
        """Models of the published leaderboard that can be anchors, best first."""
        return []

    def check_published(self, entry: Published, path: Path) -> None:
        """Raises ValueError if the file does not have the published answers of the model."""

    def evaluate(
        self,
        model: str,
        items: Sequence[Item],
        responses: Mapping[str, Responses],
        judge: EvaluationJudge | None,
        folder: Path,
    ) -> Result:
        """The result of one model's responses, keyed by item id, with one entry for every item; ``judge`` and ``decoding`` are
        added to it later. Writes files in the benchmark's own formats to ``folder``."""
        raise NotImplementedError

    def pooled(self, results: Mapping[Path, Result]) -> dict[Path, Result]:
        """The results with figures that depend on other models, for a task that has such figures. results: all of one judge
        with as many items, by the folder that ``evaluate`` wrote to."""
        return dict(results)
