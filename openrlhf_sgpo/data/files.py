"""Rows of files and hub datasets, each with its position; their meaning is left to ``records.py``."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAIN_SPLITS = ("train", "train_prefs")
TEST_SPLITS = ("test", "test_prefs")
KINDS = (".jsonl", ".json", ".parquet")
# Extensions of other files. Not any extension: after the last dot of a hub dataset's name comes a version or a size.
_UNREADABLE = (
    *(".arrow", ".avro", ".bz2", ".csv", ".db", ".feather", ".gz", ".h5", ".jsonlines", ".ndjson", ".npy", ".npz"),
    *(".orc", ".pickle", ".pkl", ".pt", ".sqlite", ".tar", ".tgz", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".xz"),
    *(".yaml", ".yml", ".zip", ".zst"),
)
EXPECTED = "expected .jsonl, .json (either also .gz), .parquet, or the name of a hub dataset"
_SHOWN = 20  # distinct reasons that a message spells out
_SPACE = re.compile(r"[ \t\r\n]*")


class DataError(ValueError):
    """Unusable data; the message names each bad row once, with file, line and remedy.

    problems: one text per bad row, even where the message lists several rows in one line.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


_TOO_LARGE = DataError("not a row: a number has more digits than can be read")


@dataclass(frozen=True)
class Rows:
    """The rows of a source as (place, row), with a DataError instead of a row that cannot be read.

    unit: what places count, lines from 1 or rows from 0. published: a dataset that its user cannot fix.
    """

    unit: str
    entries: Iterable[tuple[int, Any]]
    published: bool = False


def is_data_file(source: str) -> bool:
    """Whether the source is a local data file, judging by its extension or because the file exists."""
    return _kind(source) in KINDS or Path(source).is_file()


def is_file(source: str) -> bool:
    """Whether the source is meant as a local file: also by an unreadable file's extension, or by a path no hub dataset has."""
    path = Path(source)
    outside_the_hub = source.startswith(("/", "./", "../", "~")) or len(path.parts) > 2
    return is_data_file(source) or (not path.is_dir() and (path.suffix.lower() in _UNREADABLE or outside_the_hub))


def check_data_source(source: str, split: str = "") -> None:
    """Raises DataError if the source is meant as a file that does not exist or is of an unknown kind."""
    if not is_file(source):
        return
    path, kind = Path(source), _kind(source)
    if not path.is_file():
        raise DataError(f"{source}: no such file; check the path{'' if kind in KINDS else f' ({EXPECTED})'}")
    if split:
        raise DataError(f"{source}: a file has no splits, remove the split {split!r}")
    if kind not in KINDS or (kind == ".parquet" and path.suffix.lower() != ".parquet"):
        raise DataError(f"{source}: unknown kind of file; {EXPECTED}; write its rows as one of these")
    if not path.stat().st_size:
        raise DataError(f"{source}: no rows, the file is empty")


def count_rows(source: str) -> int | None:
    """Number of rows of a JSONL or Parquet file, usable or not; None where counting would mean parsing the whole source.

    Raises DataError as ``read_rows`` does.
    """
    if not is_file(source):
        return None
    check_data_source(source)
    path, kind = Path(source), _kind(source)
    if kind == ".parquet":
        with _parquet_file(path) as file:
            return file.metadata.num_rows
    return sum(1 for line in _bytes(path) if line.strip()) if kind == ".jsonl" else None


def read_rows(source: str, split: str = "", splits: Sequence[str] = TRAIN_SPLITS) -> Rows:
    """Rows of a JSONL or JSON file (also .gz), a Parquet file, or a hub dataset's ``split`` (default: first of ``splits``).

    Raises DataError if the source or split does not exist, or if a file is not of the kind that its name says.
    """
    check_data_source(source, split)
    path, kind = Path(source), _kind(source)
    if not is_file(source):
        return Rows("row", _hub(source, split, splits), published=True)
    if kind == ".parquet":
        return Rows("row", _parquet(path))
    return Rows("line", _lines(path) if kind == ".jsonl" else _json(path))


def listing(source: str, unit: str, problems: Sequence[tuple[int, str]]) -> tuple[list[str], list[str]]:
    """(lines that name every bad place once, one text per bad place). Places with the same reason share a line."""
    places: dict[str, list[int]] = {}
    for place, reason in problems:
        places.setdefault(reason, []).append(place)
    reasons = list(places)
    lines = [f"{source}, {_places(unit, places[reason])}: {reason}" for reason in reasons[:_SHOWN]]
    not_shown = sorted(place for reason in reasons[_SHOWN:] for place in places[reason])
    if not_shown:
        lines.append(f"{source}, {_places(unit, not_shown)}: other reasons, shown after these rows are fixed")
    return lines, [f"{source}, {unit} {place}: {reason}" for place, reason in problems]


def _places(unit: str, places: Sequence[int]) -> str:
    """``line 3`` or ``lines 3, 5-9``."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{unit}{'s' if len(places) > 1 else ''} {text}"


def _kind(source: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    suffixes = suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes
    return suffixes[-1] if suffixes else ""


def _bytes(path: Path) -> Iterator[bytes]:
    """Lines with their line endings. Raises DataError if a compressed file is cut off, or if the file is UTF-16."""
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file):
                if number == 0:
                    if line[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in line[:2]:
                        raise DataError(
                            f"{path}: UTF-16, not UTF-8; convert the file, as with iconv -f UTF-16 -t UTF-8"
                        )
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: damaged, or not of the kind its name says ({error}); download or write it again"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_bytes(path), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8").rstrip(), object_pairs_hook=_each_once)
        except DataError as error:
            yield number, error
        except UnicodeDecodeError as error:
            yield number, DataError(f"not UTF-8 (byte {error.start}); convert the file")
        except json.JSONDecodeError as error:
            yield number, DataError(f"not JSON: {error.msg} at column {error.colno}")
        except ValueError:
            yield number, _TOO_LARGE
        except RecursionError:
            yield number, DataError("not a row: nested too deeply")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """An array of rows, or one row per line as in a .jsonl file."""
    content = b"".join(_bytes(path))
    if content.lstrip()[:1] == b"[":
        try:
            yield from _array(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield content.count(b"\n", 0, error.start) + 1, DataError("not UTF-8; convert the file")
        return
    try:
        whole = json.loads(content, object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, dict) and len(whole) == 1 and isinstance(next(iter(whole.values())), list):
        key = next(iter(whole))
        raise DataError(f"{path}: an object with the one key {key!r}; expected an array of rows, write only the list")
    if isinstance(whole, dict):
        yield 1, whole
    else:
        yield from _lines(path)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must differ. Raises DataError."""
    row = dict(pairs)
    if len(row) < len(pairs):
        (key, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise DataError(f"the key {key!r} appears twice")
    return row


def _array(text: str) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array with the lines on which they begin, up to the first syntax error."""
    decoder, line, counted = json.JSONDecoder(object_pairs_hook=_each_once), 1, 0

    def skip(position: int) -> int:
        match = _SPACE.match(text, position)
        return match.end() if match else position

    position = skip(skip(0) + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            item, end = decoder.raw_decode(text, position)
        except DataError as error:
            yield line, error
            return
        except json.JSONDecodeError as error:
            yield error.lineno, DataError(f"not JSON: {error.msg} at column {error.colno}")
            return
        except ValueError:
            yield line, _TOO_LARGE
            return
        except RecursionError:
            yield line, DataError("not a row: nested too deeply")
            return
        yield line, item
        position = skip(end)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            yield line, DataError("not JSON: expected a comma or the end of the array after this row")
            return
    if text[position + 1 :].strip():
        yield (
            1 + text.count("\n", 0, skip(position + 1)),
            DataError("not JSON: there is more after the end of the array"),
        )


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    """An open Parquet file. Raises DataError if it cannot be read."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        yield ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # such as dates beyond the year 9999
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: damaged, or not a Parquet file ({reason}); download or write it again") from error


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    with _parquet_file(path) as file:
        yield from enumerate(row for batch in file.iter_batches() for row in batch.to_pylist())


def _hub(source: str, split: str, splits: Sequence[str]) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    try:
        table = load_dataset(source, split=split or None)
    except Exception as error:  # the library raises errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{source}: cannot be loaded ({reason}); {EXPECTED}, with an existing split") from error
    if not split:
        existing = [name for name in splits if name in table]
        if not existing:
            raise DataError(
                f"{source}: no split {' or '.join(splits)}; choose one of {', '.join(table)} with "
                "--data.dataset_split, --data.prompt_split or --eval.split"
            )
        table = table[existing[0]]
    return ((number, dict(row)) for number, row in enumerate(table))
