"""The report on a loaded and tokenized dataset: counts of defects, lengths, and limits that stop a run.

``docs/data.md`` defines every finding; the limits are ``DataLimits``.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from openrlhf_sgpo.config import DataLimits
from openrlhf_sgpo.data.files import DataError
from openrlhf_sgpo.integrity import sealed
from openrlhf_sgpo.table import aligned

# In the order of the report. Rows with a finding of LEFT_OUT are not trained on and not inspected further.
LEFT_OUT = ("malformed", "refused", "empty", "identical", "too_long")
COUNTED = (
    *("truncated", "missing_eos", "double_bos", "double_eos", "open_thought", "near_identical", "repeats_prompt"),
    *("duplicate", "contradictory", "unfinished", "benchmark", "held_out"),
)
EXAMPLES = 5
FEW = 2  # this few rows do not stop a run, whatever their share, unless they are half of all
NOTED = 0.1  # above this share a finding gets a note
_QUANTILES = {"5%": 0.05, "50%": 0.5, "95%": 0.95, "max": 1.0}
_REMEDIES = {
    "malformed": "give a file without these rows",
    "refused": "bring the roles of the messages into the order that the chat template expects",
    "empty": "remove these rows",
    "identical": "remove these rows",
    "too_long": "raise --data.max_len",
    "truncated": "raise --data.max_len",
    "missing_eos": "give the model's end-of-sequence token to the end of the chat template's turns",
    "double_bos": "give plain messages, the chat template adds special tokens",
    "double_eos": "give plain messages, the chat template adds special tokens",
    "open_thought": "close the thought in the responses, or give --data.chat_template_kwargs enable_thinking=false if the "
    "template reads it",
    "near_identical": "remove these rows",
    "repeats_prompt": "take the prompt off the responses",
    "duplicate": "remove these rows",
    "contradictory": "keep one row of each prompt and its responses",
    "benchmark": "remove these rows if you evaluate on the benchmark",
    "held_out": "remove these rows from --data.dataset",
}


@dataclass(frozen=True)
class Finding:
    """What ``count`` of ``of`` rows show. limit: None if none applies. parts: counts by response or benchmark."""

    name: str
    count: int
    of: int
    limit: float | None
    examples: list[str]
    parts: dict[str, int]

    @property
    def share(self) -> float:
        return self.count / self.of if self.of else 0.0

    @property
    def exceeded(self) -> bool:
        """Whether the share is above the limit. One or two rows say little about the share of a small file: they stop a run
        only if they are half of its rows, or if the limit is 0."""
        if self.limit is None or self.share <= self.limit:
            return False
        return self.limit == 0 or self.count > FEW or 2 * self.count >= self.of

    @property
    def noted(self) -> bool:
        """Whether the share is above the limit or ``NOTED``, but does not stop the run."""
        return self.limit is not None and not self.exceeded and self.share > min(self.limit, NOTED)


@dataclass(frozen=True)
class DataReport:
    """The report on one dataset. rows: number of all rows; kept: number of rows that are used.

    lengths: quantiles, in tokens, over all tokenized rows before truncation; ``needed`` is prompt plus longer response.
    longer: shares of the kept pairs in which chosen has more tokens than rejected, or equally many. labels: smallest, mean and
    largest value of the columns of ``LABEL_COLUMNS`` that are not 1 for all kept pairs.
    """

    name: str
    kind: str
    rows: int
    kept: int
    findings: list[Finding]
    lengths: dict[str, dict[str, int]]
    longer: dict[str, float] = field(default_factory=dict)
    labels: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, sealed with their hash."""
        findings = [asdict(finding) | {"share": finding.share} for finding in self.findings]
        return sealed(asdict(self) | {"findings": findings})

    def text(self) -> str:
        """Findings as an aligned table of at most 120 columns (unless ids are long), absent ones in one line."""
        cells = [["", "count", "share", "limit", "", "such as"]]
        present = [finding for finding in self.findings if finding.count]
        for finding in present:
            parts = [f"{name} {count}" for name, count in finding.parts.items()]
            note = ", ".join(["left out"] * (finding.name in LEFT_OUT) + parts)
            limit = "" if finding.limit is None else f"{finding.limit:.1%}"
            limit += " exceeded" * finding.exceeded + " noted" * finding.noted
            cells.append(
                [finding.name, str(finding.count), f"{finding.share:.1%}", limit, note, ", ".join(finding.examples[:2])]
            )
        none = [finding.name for finding in self.findings if not finding.count]
        lines = [f"{self.name}: {self.rows} {self.kind}, {self.kept} kept"]
        lines += aligned(cells, left=(0, 3, 4, 5), rule=False) if len(cells) > 1 else []
        lines += textwrap.wrap(f"none: {', '.join(none)}", 118, subsequent_indent=" " * 6) if none else []
        lines += [
            f"note: {finding.name} {finding.count} of {finding.of} ({finding.share:.1%}); {_REMEDIES[finding.name]}"
            for finding in self.findings
            if finding.noted
        ]
        head = ["tokens", *_QUANTILES]
        rows = [[name, *map(str, quantiles.values())] for name, quantiles in self.lengths.items()]
        lines += aligned([head, *rows], rule=False) if rows else []
        if self.longer:
            lines.append(
                f"chosen is longer than rejected in {self.longer['chosen']:.1%} of the pairs, as long in "
                f"{self.longer['equal']:.1%}"
            )
        for column, values in self.labels.items():
            lines.append(f"{column} from {values['min']:g} to {values['max']:g}, mean {values['mean']:.4g}")
        return "\n  ".join(lines) + "\n"

    def problems(self) -> list[str]:
        """Every exceeded limit, with count, examples, remedy and the flag that raises it."""
        problems = []
        for finding in self.findings:
            if not finding.exceeded:
                continue
            accepted = math.ceil(finding.share * 1000) / 1000
            examples = f", such as {', '.join(finding.examples)}" if finding.examples else ""
            problems.append(
                f"{self.name}: {finding.name} {finding.count} of {finding.of} ({finding.share:.1%}, limit "
                f"{finding.limit:.1%}){examples}; {_REMEDIES[finding.name]}, or --data.limits.{finding.name} "
                f"{accepted:g} accepts this"
            )
        if not self.kept and not problems:
            problems.append(f"{self.name}: none of {self.rows} {self.kind} can be used")
        return problems


def require(reports: Sequence[DataReport]) -> None:
    """Raises DataError with every limit that a report exceeds."""
    problems = [problem for report in reports for problem in report.problems()]
    if problems:
        raise DataError("the data exceeds its limits:\n  " + "\n  ".join(problems), problems)


class Tally:
    """Collects findings row by row."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: defaultdict[str, list[str]] = defaultdict(list)
        self._parts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, name: str, example: str, parts: Sequence[str] = ()) -> None:
        self._counts[name] += 1
        self._parts[name].update(parts)
        if len(self._examples[name]) < EXAMPLES:
            self._examples[name].append(example)

    def findings(
        self,
        names: Sequence[str],
        rows: int,
        limits: DataLimits,
        of: Mapping[str, int] | None = None,
        unlimited: Sequence[str] = (),
    ) -> list[Finding]:
        """The findings in ``names``, in the order of the report, as shares of ``rows`` or of the number given in ``of``."""
        return [
            Finding(
                name=name,
                count=self._counts[name],
                of=(of or {}).get(name, rows),
                limit=None if name in unlimited else getattr(limits, name, None),
                examples=self._examples[name],
                parts=dict(sorted(self._parts[name].items())),
            )
            for name in (*LEFT_OUT, *COUNTED)
            if name in names
        ]


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """For each share, the smallest length that at least this share of the lengths does not exceed."""
    ordered = sorted(lengths)
    return {name: ordered[max(0, math.ceil(share * len(ordered)) - 1)] for name, share in _QUANTILES.items()}
