"""Pair and prompt records: TRL's columns in, TRL's columns out. ``docs/data.md`` lists the accepted shapes.

Written rows are conversational (message lists) and carry further columns that TRL ignores.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from openrlhf_sgpo.data.files import TRAIN_SPLITS, DataError, listing, read_rows

Messages = list[dict[str, str]]
Record = TypeVar("Record", "Pair", "Prompt")

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass
class Prompt:
    """A prompt; chosen and rejected are a labelled pair's answers to it, which only measure label accuracy."""

    id: str
    messages: Messages
    chosen: str | None = None
    rejected: str | None = None


@dataclass
class Pair:
    """One preference: ``chosen`` is the better response to ``prompt``.

    source: human, or the oracle that ranked the responses. round: 0 for the seed. truncated: the response was cut
    by the length limit, so that no end-of-turn token may follow it. scores: what the ranking was based on.
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
    scores: dict[str, float] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """A JSON row in TRL's conversational preference format, with this package's further columns."""
        row = asdict(self)
        row["chosen"] = [{"role": "assistant", "content": self.chosen}]
        row["rejected"] = [{"role": "assistant", "content": self.rejected}]
        return row


class Records(list[Record]):
    """The records of one source, and the rows that were left out of it (``row 7 (reason)``).

    Only rows of a hub dataset are left out, for its reader cannot mend them.
    """

    def __init__(self, records: Sequence[Any] = (), left_out: Sequence[str] = ()):
        super().__init__(records)
        self.left_out = tuple(left_out)


# Columns ------------------------------------------------------------------------------------------------------------


def _text(value: str, column: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"column {column!r} holds half of a character ({value[error.start]!r}); write the text again as UTF-8"
        ) from error
    return value


def _messages(value: Any, column: str) -> Messages:
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": _text(value, column)}]
    if isinstance(value, list) and value:
        if all(isinstance(m, dict) and isinstance(m.get("content"), str) and _is_role(m.get("role")) for m in value):
            return [{"role": m["role"], "content": _text(m["content"], column)} for m in value]
    raise DataError(f"column {column!r} must be a non-empty string or a list of {{role, content}} messages")


def _is_role(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _response(value: Any, column: str) -> tuple[Messages, str]:
    """(messages before the response, response text, which may be empty)"""
    if isinstance(value, str):
        return [], _text(value, column)
    messages = _messages(value, column)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"the last message of column {column!r} must have the role assistant")
    return messages[:-1], messages[-1]["content"]


def _transcript(text: str) -> Messages | None:
    """The turns of a dialogue in Anthropic's notation (``Human: ... Assistant: ...``); None if it is none."""
    opening, *parts = _TURN.split("\n\n" + text.lstrip())
    if opening.strip() or "Assistant" not in parts[::2]:
        return None
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _ROLES[speaker], "content": content.strip()} for speaker, content in turns]


def prompt_messages(value: Any) -> Messages:
    """The messages of a prompt in any shape that the column ``prompt`` may have. Raises DataError."""
    turns = _transcript(value) if isinstance(value, str) else None
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        value = turns[:-1]  # a dialogue up to the point where the assistant is to speak
    messages = _messages(value, "prompt")
    if messages[-1]["role"] == "assistant":
        raise DataError("the prompt ends with an assistant message; the response belongs into chosen and rejected")
    return messages


def _shared_text(chosen: str, rejected: str) -> tuple[Messages, str, str]:
    """Two texts that begin with the same prompt, as in TRL: their longest common beginning, up to the end of a word."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    end = next((at for at, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    if any(text[end : end + 1].strip() for text in (chosen, rejected)):
        end = next((at + 1 for at in range(end - 1, -1, -1) if chosen[at].isspace()), 0)
    if not chosen[:end].strip():
        raise DataError("missing column prompt, and chosen and rejected do not share their beginning")
    # The space between prompt and response belongs to neither: the chat template separates them.
    return _messages(chosen[:end].rstrip(), "chosen"), chosen[end:].strip(), rejected[end:].strip()


def _implicit(chosen: Any, rejected: Any) -> tuple[Messages, str, str]:
    """(prompt, chosen, rejected) of a row without the column prompt."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        turns = _transcript(_text(chosen, "chosen")), _transcript(_text(rejected, "rejected"))
        if None in turns:
            return _shared_text(chosen, rejected)
        chosen, rejected = turns
    (before, text), (before_rejected, text_rejected) = _response(chosen, "chosen"), _response(rejected, "rejected")
    if not before or before != before_rejected:
        raise DataError("missing column prompt, and chosen and rejected do not share the messages before the last one")
    if before[-1]["role"] == "assistant":
        raise DataError("two assistant messages end the conversation; the response must be one message")
    return before, text, text_rejected


def _explicit(row: dict[str, Any]) -> tuple[Messages, str, str]:
    """(prompt, chosen, rejected) of a row with the column prompt, which chosen and rejected may repeat."""
    prompt = prompt_messages(row["prompt"])
    (before, chosen), (before_rejected, rejected) = (_response(row[c], c) for c in ("chosen", "rejected"))
    if before and before == before_rejected and isinstance(row["prompt"], str):
        if before[-1]["content"].strip() == row["prompt"].strip():
            return before, chosen, rejected  # the conversation says more than its last question
    for column, repeated in (("chosen", before), ("rejected", before_rejected)):
        if repeated and [m["content"].strip() for m in repeated] != [m["content"].strip() for m in prompt]:
            raise DataError(f"the messages of column {column!r} before the response are not those of column 'prompt'")
    return prompt, chosen, rejected


# Rows ---------------------------------------------------------------------------------------------------------------


def _found(row: dict[str, Any]) -> str:
    return f"found {', '.join(sorted(map(str, row))) or 'nothing'}"


def _id(row: dict[str, Any], name: str) -> str:
    # A table holds null where a row has no id.
    return next((str(row[column]) for column in ("id", "prompt_id") if row.get(column) is not None), name)


def _truncation(row: dict[str, Any]) -> dict[str, Any]:
    columns = ("chosen_truncated", "rejected_truncated")
    for column in columns:
        if not isinstance(row.get(column), (bool, type(None))):
            raise DataError(f"column {column!r} must be true or false")
    return {column: bool(row.get(column)) for column in columns}


def _pair_of_a_run(row: dict[str, Any], name: str) -> Pair:
    own = {column: row[column] for column in ("source", "round", "flipped", "scores")}
    return replace(_pair(row, name), **own)


def _pair(row: dict[str, Any], name: str) -> Pair:
    missing = [column for column in ("chosen", "rejected") if row.get(column) is None]
    if missing:
        raise DataError(f"missing column {' and '.join(missing)}; {_found(row)}")
    if row.get("prompt") is not None:
        prompt, chosen, rejected = _explicit(row)
    else:
        try:
            prompt, chosen, rejected = _implicit(row["chosen"], row["rejected"])
        except DataError as error:
            raise DataError(f"{error}; {_found(row)}") from error
    return Pair(id=_id(row, name), prompt=prompt, chosen=chosen, rejected=rejected, **_truncation(row))


def _prompt(row: dict[str, Any], name: str) -> Prompt:
    try:
        pair = _pair(row, name)
    except DataError:
        pair = None
    if pair:
        usable = pair.chosen.strip() and pair.rejected.strip() and pair.chosen.strip() != pair.rejected.strip()
        answers = (pair.chosen, pair.rejected) if usable else (None, None)
        return Prompt(pair.id, pair.prompt, *answers)
    if row.get("prompt") is not None:
        return Prompt(_id(row, name), prompt_messages(row["prompt"]))
    if row.get("messages") is None:
        raise DataError(f"missing column prompt; {_found(row)}")
    messages = _messages(row["messages"], "messages")
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError("column 'messages' holds no question before its last answer")
    return Prompt(_id(row, name), messages)


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
            # Files are joined by id, so that an id must mean one row.
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
    return hashlib.blake2b(repr([asdict(record) for record in records]).encode(), digest_size=16).hexdigest()


def load_pairs(source: str, split: str = "", limit: int = 0, splits: Sequence[str] = TRAIN_SPLITS) -> Records[Pair]:
    """Preference pairs of a JSONL or JSON file (also .gz), a Parquet file, or a hub dataset; at most ``limit`` unless 0.

    split: of a hub dataset; by default the first of ``splits`` that it has. Empty and identical responses are loaded:
    the report counts them and leaves them out. Unusable rows of a file raise a DataError that names them all; those of
    a hub dataset are in ``left_out``. Raises DataError if there is no usable row.
    """
    return _load(source, split, splits, limit, _pair)


def load_run_pairs(path: str) -> Records[Pair]:
    """The pairs in a run's pairs.jsonl, with what this package wrote beside TRL's columns. In other files, columns of these
    names (UltraFeedback has a ``source``) are somebody else's."""
    return _load(path, "", TRAIN_SPLITS, 0, _pair_of_a_run)


def load_prompts(source: str, split: str = "", limit: int = 0, splits: Sequence[str] = TRAIN_SPLITS) -> Records[Prompt]:
    """Prompts of the same kinds of source; those of a preference file keep its answers. Raises DataError."""
    return _load(source, split, splits, limit, _prompt)
