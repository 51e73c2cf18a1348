"""Pairs, prompts and answers, read from and written in TRL's columns. ``docs/data.md`` lists the accepted shapes.

Written rows are conversational (lists of messages) and have further columns, which TRL ignores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

from openrlhf_sgpo.data.files import TRAIN_SPLITS, DataError, listing, read_rows
from openrlhf_sgpo.data.messages import (
    Messages,
    checked_text,
    messages_of,
    preference,
    question,
    refuse_unread_columns,
    template_columns,
    template_kwargs,
    with_system,
)
from openrlhf_sgpo.integrity import hash_of

Record = TypeVar("Record", "Pair", "Prompt")


@dataclass
class Prompt:
    """A prompt. chosen, rejected: responses of a labelled pair, used only to measure label accuracy.

    template_kwargs: further arguments of the chat template for this prompt (``tools``, and those in the row's
    ``chat_template_kwargs``).
    """

    id: str
    messages: Messages
    chosen: str | None = None
    rejected: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """A JSON row from which ``load_prompts`` reads the same prompt."""
        labels = {} if self.chosen is None else {"chosen": self.chosen, "rejected": self.rejected}
        return {"id": self.id, "prompt": self.messages, **template_columns(self.template_kwargs), **labels}


@dataclass
class Pair:
    """One preference: ``chosen`` is the better response to ``prompt``.

    source: human, or the oracle that ranked the responses. round: 0 for the seed. truncated: the response was cut
    by the length limit, so it must not be followed by an end-of-turn token. token_ids: of the response as an engine
    sampled it, empty where people wrote it. scores: what the ranking was based on. weight: multiplies the pair's loss, at least
    0. chosen_probability: of the label, from 0 to 1; below 1 the loss is averaged over both labels.
    template_kwargs: as in ``Prompt``.
    """

    id: str
    prompt: Messages
    chosen: str
    rejected: str
    source: str = "human"
    round: int = 0
    flipped: bool = False
    chosen_truncated: bool = False
    rejected_truncated: bool = False
    chosen_token_ids: tuple[int, ...] = ()
    rejected_token_ids: tuple[int, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0
    chosen_probability: float = 1.0
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """A JSON row in TRL's conversational preference format, with this package's further columns."""
        row = dict(vars(self))
        row |= template_columns(row.pop("template_kwargs"))
        absent = dict.fromkeys(_TOKEN_IDS, ()) | dict.fromkeys(LABEL_COLUMNS, 1.0)
        row = {name: value for name, value in row.items() if name not in absent or value != absent[name]}
        row["chosen"] = [{"role": "assistant", "content": self.chosen}]
        row["rejected"] = [{"role": "assistant", "content": self.rejected}]
        return row


@dataclass(frozen=True)
class Answer:
    """A response to a prompt. truncated: cut off by the length limit, so no end of turn follows. token_ids: as sampled by an
    engine with the policy's tokenizer, including those that ended the response; empty for text written by people. log_probs: of
    these tokens, under the weights with which they were sampled and at their temperature, or with --rollout.reuse_log_probs at
    temperature 1; empty unless an engine was asked. A row has their sum."""

    text: str
    truncated: bool = False
    token_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def to_row(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "truncated": self.truncated,
            "tokens": self.tokens,
            "token_ids": list(self.token_ids),
            **({"log_prob": math.fsum(self.log_probs)} if self.log_probs else {}),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Answer:
        return cls(row["text"], row["truncated"], tuple(row["token_ids"]))


class Records(list[Record]):
    """The records of one source. left_out: rows that were skipped (``row 7 (reason)``).

    Only rows of hub datasets are skipped, because users cannot fix those.
    """

    def __init__(self, records: Sequence[Any] = (), left_out: Sequence[str] = ()):
        super().__init__(records)
        self.left_out = tuple(left_out)


def columns_of(row: dict[str, Any]) -> str:
    """The columns of a row, for messages."""
    return f"found {', '.join(sorted(map(str, row))) or 'nothing'}"


def _id(row: dict[str, Any], name: str) -> str:
    # A table holds null where a row has no id.
    column = next((column for column in ("id", "prompt_id") if row.get(column) is not None), None)
    return checked_text(str(row[column]), column) if column else name


def _truncation(row: dict[str, Any]) -> dict[str, Any]:
    columns = ("chosen_truncated", "rejected_truncated")
    for column in columns:
        if not isinstance(row.get(column), (bool, type(None))):
            raise DataError(f"column {column!r} must be true or false")
    return {column: bool(row.get(column)) for column in columns}


def _labels(row: dict[str, Any]) -> dict[str, float]:
    """The columns ``weight`` and ``chosen_probability``, as far as the row has them."""
    labels = {column: row[column] for column in LABEL_COLUMNS if row.get(column) is not None}
    for column, value in labels.items():
        low, high = 0, 1 if column == "chosen_probability" else math.inf
        span = "from 0 to 1" if high == 1 else "at least 0, and finite"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DataError(f"column {column!r} must be a number, {span}; it holds {type(value).__name__} {value!r}")
        if not (math.isfinite(value) and low <= value <= high):
            raise DataError(f"column {column!r} must be {span}; it holds {value}")
    return {column: float(value) for column, value in labels.items()}


_TOKEN_IDS = ("chosen_token_ids", "rejected_token_ids")
LABEL_COLUMNS = ("weight", "chosen_probability")  # numbers that say how much a label counts, 1 where a row has none


def _pair_of_a_run(row: dict[str, Any], name: str) -> Pair:
    kinds = {"source": str, "round": int, "flipped": bool, "scores": dict}
    if wrong := [column for column, kind in kinds.items() if not isinstance(row.get(column), kind)]:
        raise DataError(
            f"column {' and '.join(wrong)} is missing or not of the type that a run writes; {columns_of(row)}"
        )
    token_ids = {column: tuple(row.get(column, ())) for column in _TOKEN_IDS}
    return replace(_pair(row, name), **{column: row[column] for column in kinds} | token_ids)


def _pair(row: dict[str, Any], name: str) -> Pair:
    missing = [column for column in ("chosen", "rejected") if row.get(column) is None]
    if missing:
        raise DataError(f"missing column {' and '.join(missing)}; {columns_of(row)}")
    try:
        prompt, chosen, rejected = preference(row)
    except DataError as error:
        raise error if row.get("prompt") is not None else DataError(f"{error}; {columns_of(row)}") from error
    more = _truncation(row) | _labels(row)
    return Pair(_id(row, name), prompt, chosen, rejected, template_kwargs=template_kwargs(row), **more)


def _prompt(row: dict[str, Any], name: str) -> Prompt:
    try:
        pair = _pair(row, name)
    except DataError:
        pair = None
    if pair:
        usable = pair.chosen.strip() and pair.rejected.strip() and pair.chosen.strip() != pair.rejected.strip()
        chosen, rejected = (pair.chosen, pair.rejected) if usable else (None, None)
        return Prompt(pair.id, pair.prompt, chosen, rejected, pair.template_kwargs)
    if row.get("prompt") is not None:
        return Prompt(_id(row, name), question(row), template_kwargs=template_kwargs(row))
    if row.get("messages") is None:
        raise DataError(f"missing column prompt; {columns_of(row)}")
    refuse_unread_columns(row)
    messages = messages_of(row["messages"], "messages")
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError("column 'messages' holds no prompt before its last response")
    return Prompt(_id(row, name), with_system(row, messages), template_kwargs=template_kwargs(row))


def _load(
    source: str, split: str, splits: Sequence[str], limit: int, parse: Callable[[dict[str, Any], str], Record]
) -> Records[Record]:
    records: list[Record] = []
    problems: list[tuple[int, str]] = []
    seen: set[str] = set()
    rows = read_rows(source, split, splits)
    for number, (place, row) in enumerate(rows.entries):
        if limit and len(records) == limit:
            break
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                raise DataError(f"expected an object, found {type(row).__name__}")
            record = parse(row, f"row-{number}")
            # Files are joined by id, so ids must be unique.
            record.id = f"{record.id}#{number}" if record.id in seen else record.id
            seen.add(record.id)
            records.append(record)
        except DataError as error:
            problems.append((place, str(error)))
    if problems and not (rows.published and records):
        lines, single = listing(source, rows.unit, problems)
        raise DataError(f"{len(problems)} unusable rows (correct or remove them):\n  " + "\n  ".join(lines), single)
    if not records:
        raise DataError(f"{source}: no rows")
    return Records(records, [f"{rows.unit} {place} ({reason})" for place, reason in problems])


def fingerprint(records: Sequence[Pair] | Sequence[Prompt]) -> str:
    """A hash of the records' contents and order."""
    rows = (f"{', ' if place else ''}{vars(record)}".encode() for place, record in enumerate(records))
    return hash_of(chain([b"["], rows, [b"]"]))


def load_pairs(source: str, split: str = "", limit: int = 0, splits: Sequence[str] = TRAIN_SPLITS) -> Records[Pair]:
    """Preference pairs of a JSONL or JSON file (also .gz), a Parquet file, or a hub dataset; at most ``limit`` unless 0.

    split: of a hub dataset; by default the first of ``splits`` that exists. Empty and identical responses are loaded: the
    report counts them and leaves them out. Unusable rows of a hub dataset are listed in ``left_out``. Raises DataError that
    names all unusable rows of a file, and if no row is usable.
    """
    return _load(source, split, splits, limit, _pair)


def load_run_pairs(path: str) -> Records[Pair]:
    """The pairs in a run's pairs.jsonl, with this package's own columns, such as ``source``.

    ``load_pairs`` ignores these columns: in other files they may mean something else (UltraFeedback has a ``source``).
    """
    return _load(path, "", TRAIN_SPLITS, 0, _pair_of_a_run)


def load_prompts(source: str, split: str = "", limit: int = 0, splits: Sequence[str] = TRAIN_SPLITS) -> Records[Prompt]:
    """Prompts of a source as in ``load_pairs``; those of preference pairs keep their responses. Raises DataError."""
    return _load(source, split, splits, limit, _prompt)
