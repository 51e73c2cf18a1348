"""What a benchmark is: items that models answer, and a result for the answers of one model.

This module imports without torch and without the benchmarks' packages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from openrlhf_sgpo import flags

if TYPE_CHECKING:
    from openrlhf_sgpo.benchmarks.benchmark_files import Fields
    from openrlhf_sgpo.benchmarks.judge import EvaluationJudge


@dataclass(frozen=True)
class Item:
    """One thing that models are asked. turns: the user's messages, each sent after the answer to the one before.
    temperature: at which the benchmark wants it answered; None: at the one that the user chose. facts: what else its task
    needs to judge an answer (a reference, the baseline's output)."""

    id: str
    turns: tuple[str, ...]
    category: str = ""
    temperature: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Responses:
    """A model's responses to one item, by turn. truncated: the length limit stopped one. tokens: None where another tool
    wrote them and did not say."""

    id: str
    turns: tuple[str, ...]
    truncated: tuple[bool, ...] = ()
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Result:
    """A row of the leaderboard.

    expected: items that were asked for; n: those with a usable judgement. figures: by name, in the order in which they are
    shown; None: it cannot be had, and ``notes`` say why. errors: standard errors of some figures. intervals: 95% intervals of
    some figures. categories: a figure per category. average_length: characters per answer. notes: what a reader must know to
    believe the row. judge: identity of the judge, None for a task without one. decoding: how the answers were made.
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


class Task:
    """Base of every benchmark. One benchmark is one file of ``tasks/``.

    Class attributes: name (value of --tasks, and of its group of flags), judged (whether it needs a judge), reads_logprobs
    (whether a judge's log-probabilities matter to it), answer_fields (of every row of a file of
    answers in the benchmark's own format), Settings (a dataclass of its flags), packages (that define it, by the names under
    which they are imported).
    """

    name: ClassVar[str]
    judged: ClassVar[bool] = True
    reads_logprobs: ClassVar[bool] = False
    answer_fields: ClassVar[Fields]
    Settings: ClassVar[type]
    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: Any):
        """Raises ValueError for a setting that is out of its range."""
        if problems := flags.out_of_range({self.name: settings}):
            raise flags.SettingsError(*problems)
        self.settings = settings

    def items(self) -> list[Item]:
        """All items in their canonical order, or ``settings.limit`` of them. Raises ValueError if the benchmark's
        files are unavailable, or not what they should be; the message names the flag."""
        raise NotImplementedError

    def read_responses(self, path: Path) -> list[Responses]:
        """Responses that another tool wrote in the benchmark's own format, in whatever order. Raises ValueError."""
        raise NotImplementedError

    def preflight(self, judge: EvaluationJudge) -> list[str]:
        """Asks the judge one question, before anything is paid for; what was noticed. Raises ValueError if it will not do."""
        return []

    def evaluate(
        self,
        model: str,
        items: Sequence[Item],
        responses: Mapping[str, Responses],
        judge: EvaluationJudge | None,
        folder: Path,
    ) -> Result:
        """The result of one model's responses, which are keyed by item id; there are some to every item. Files in the
        benchmark's own formats go to ``folder``."""
        raise NotImplementedError
