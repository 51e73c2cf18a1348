"""Texts that grow, side by side on a terminal, below each other elsewhere."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence

GAP = "  "
NARROWEST = 24  # characters of a column; below that the texts stand below each other
CLEAR = "\x1b[K"  # the rest of the line


class Columns:
    """Prints texts as they grow, with a title above each: on a terminal a row as soon as every column has filled it, and the
    row that is being written over and over; elsewhere every text when all are whole."""

    def __init__(self, titles: Sequence[str]):
        self.titles = titles
        self._width = (shutil.get_terminal_size().columns - 1 - len(GAP) * (len(titles) - 1)) // len(titles)
        self._live = sys.stdout.isatty() and (len(titles) == 1 or self._width >= NARROWEST)
        self._rows = 0  # that are printed
        if self._live:
            self._print(titles, "\n")
            self._print(["-" * min(cells(title), self._width) for title in titles], "\n")

    def show(self, texts: Sequence[str], whole: Sequence[bool]) -> None:
        """texts: so far, in the order of the titles. whole: which of them grow no more."""
        if not self._live:
            if all(whole):
                blocks = (f"[{title}]\n{text}\n" for title, text in zip(self.titles, texts, strict=True))
                print("\n".join(blocks), flush=True)
            return
        columns = [list(wrapped(text, self._width)) for text in texts]
        last = max(map(len, columns))
        while self._rows < last:
            row = [lines[self._rows] if self._rows < len(lines) else "" for lines in columns]
            filled = (done or self._rows + 1 < len(lines) for lines, done in zip(columns, whole, strict=True))
            if not all(filled):
                self._print(row, "")
                return
            self._print(row, "\n")
            self._rows += 1
        if all(whole):
            print(flush=True)

    def _print(self, row: Sequence[str], end: str) -> None:
        padded = (text + " " * (self._width - cells(text)) for text in row)
        print(f"\r{GAP.join(padded).rstrip()}{CLEAR}", end=end, flush=True)


def wrapped(text: str, width: int) -> Iterator[str]:
    """The text in lines of at most ``width`` cells, broken at spaces where there are any. If the text grows, only its last line
    changes, and lines are added. What would steer a terminal is replaced: a model can write anything."""
    harmless = "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text.expandtabs(4))
    for paragraph in harmless.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if cells(longer) <= width:
                line = longer
                continue
            if line:
                yield line
            line = ""
            for character in word:  # a word may be longer than a line
                if cells(line + character) > width:
                    yield line
                    line = ""
                line += character
        yield line


def cells(text: str) -> int:
    """How many character cells of a terminal the text takes: Chinese, Japanese and Korean characters and most emoji take two,
    combining marks none."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )
