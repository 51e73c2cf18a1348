"""Pair and prompt records: TRL's columns in, TRL's columns out.

Accepted rows: ``prompt`` as a string or a list of messages, ``chosen`` and ``rejected`` as strings or lists of messages; a
``chosen`` that repeats the prompt's messages, and pairs without ``prompt`` whose message lists share all but the last
message. Written rows are conversational (message lists) and carry further columns that TRL ignores.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Messages = list[dict[str, str]]
Record = TypeVar("Record", "Pair", "Prompt")


class DataError(ValueError):
    """Rows that cannot be used; the message lists each of them once, with file, line and remedy."""


@dataclass
class Prompt:
    id: str
    messages: Messages


@dataclass
class Pair:
    """One preference: ``chosen`` is the better response to ``prompt``.

    source: human or implicit (ranked by the policy's own reward). round: 0 for the seed. truncated: the response was cut
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


def _messages(value: Any, column: str) -> Messages:
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and value:
        if all(isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") for m in value):
            return [{"role": message["role"], "content": message["content"]} for message in value]
    raise DataError(f"column {column!r} must be a non-empty string or a list of {{role, content}} messages")


def _response(value: Any, column: str) -> tuple[Messages, str]:
    """(messages before the response, response text)"""
    if isinstance(value, str):
        before, text = [], value
    else:
        messages = _messages(value, column)
        if messages[-1]["role"] != "assistant":
            raise DataError(f"the last message of column {column!r} must have the role assistant")
        before, text = messages[:-1], messages[-1]["content"]
    if not text.strip():
        raise DataError(f"column {column!r} holds an empty response")
    return before, text


def _id(row: dict[str, Any], name: str) -> str:
    # A table holds null where a row has no id.
    return name if row.get("id") is None else str(row["id"])


def _pair(row: dict[str, Any], name: str) -> Pair:
    missing = [column for column in ("chosen", "rejected") if row.get(column) is None]
    if missing:
        raise DataError(f"missing column {' and '.join(missing)}; found {', '.join(sorted(row)) or 'nothing'}")
    (before, chosen), (before_rejected, rejected) = (_response(row[c], c) for c in ("chosen", "rejected"))
    if row.get("prompt") is not None:
        prompt = _messages(row["prompt"], "prompt")
        for column, repeated in (("chosen", before), ("rejected", before_rejected)):
            if repeated and [m["content"].strip() for m in repeated] != [m["content"].strip() for m in prompt]:
                raise DataError(
                    f"the messages of column {column!r} before the response are not those of column 'prompt'"
                )
    elif before and before == before_rejected:
        prompt = before
    else:
        raise DataError("missing column prompt, and chosen and rejected do not share the messages before the last one")
    if prompt[-1]["role"] == "assistant":
        raise DataError("the prompt ends with an assistant message; the response belongs into chosen and rejected")
    if chosen == rejected:
        raise DataError("chosen and rejected are identical")
    kept = {key: row[key] for key in ("source", "round", "flipped", "scores") if row.get(key) is not None}
    kept |= {key: bool(row.get(key)) for key in ("chosen_truncated", "rejected_truncated")}
    return Pair(id=_id(row, name), prompt=prompt, chosen=chosen, rejected=rejected, **kept)


def _prompt(row: dict[str, Any], name: str) -> Prompt:
    if row.get("prompt") is None:
        raise DataError(f"missing column prompt; found {', '.join(sorted(row)) or 'nothing'}")
    return Prompt(id=_id(row, name), messages=_messages(row["prompt"], "prompt"))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line.decode("utf-8").rstrip())
            except UnicodeDecodeError as error:
                yield where, DataError(f"not UTF-8 (byte {error.start}); convert the file")
            except json.JSONDecodeError as error:
                yield where, DataError(f"not JSON: {error.msg} at column {error.colno}")


def _rows(source: str, split: str) -> Iterable[tuple[str, Any]]:
    """(where, row or DataError) of a local file or a hub dataset."""
    path = Path(source)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind in (".jsonl", ".json", ".parquet") and not path.is_file():
        raise DataError(f"{source}: no such file")
    if kind == ".jsonl":
        return _lines(path)
    from datasets import load_dataset

    if kind in (".json", ".parquet"):
        table = load_dataset(kind[1:], data_files=source, split="train")
    else:
        table = load_dataset(source, split=split)
    return ((f"{source}, row {number}", dict(row)) for number, row in enumerate(table))


def _is_local_text(source: str) -> bool:
    return bool({".jsonl", ".json"} & set(Path(source).suffixes))


def _load(source: str, split: str, limit: int, parse: Callable[[dict[str, Any], str], Record]) -> list[Record]:
    records: list[Record] = []
    problems: list[str] = []
    seen: set[str] = set()
    for number, (where, row) in enumerate(_rows(source, split)):
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
            problems.append(f"{where}: {error}")
    if problems and not _is_local_text(source):
        # Nobody can mend a published dataset: its bad rows are left out, and said to be.
        shown = "\n  ".join(problems[:3])
        print(f"{source}: left out {len(problems)} unusable rows, such as\n  {shown}", file=sys.stderr)
    elif problems:
        listed = "\n  ".join(problems)
        raise DataError(f"{len(problems)} unusable rows (correct or remove them):\n  {listed}")
    if not records:
        raise DataError(f"{source}: no rows")
    return records


def fingerprint(records: Sequence[Pair] | Sequence[Prompt]) -> str:
    """A hash of the records' contents and order."""
    return hashlib.blake2b(repr([asdict(record) for record in records]).encode(), digest_size=16).hexdigest()


def load_pairs(source: str, split: str = "train", limit: int = 0) -> list[Pair]:
    """Preference pairs of a JSONL (also .gz), JSON or Parquet file, or of a hub dataset; at most ``limit`` unless 0.

    Unusable rows of JSON files raise a DataError that lists them all; those of Parquet files and hub datasets are left out
    with a message. Raises DataError if there is no usable row.
    """
    return _load(source, split, limit, _pair)


def load_prompts(source: str, split: str = "train", limit: int = 0) -> list[Prompt]:
    """Prompts of the same kinds of source; of a preference file only the prompts are taken. Raises DataError."""
    return _load(source, split, limit, _prompt)
