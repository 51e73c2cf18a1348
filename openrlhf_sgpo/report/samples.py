"""Answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from openrlhf_sgpo.report.markup import tag

SHOWN = 12


@dataclass(frozen=True)
class Written:
    """An author's texts, by turn. note: shown beside the author's name."""

    author: str
    turns: Sequence[str]
    note: str = ""


def side_by_side(prompt: str | Sequence[Mapping[str, str]], answers: Sequence[Written]) -> Markup:
    """A prompt with its answers in columns. prompt: text, or messages with role and content."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    paragraphs = [
        tag("p", *([tag("span", message["role"], ": ")] if len(messages) > 1 else []), message["content"], dir="auto")
        for message in messages
    ]
    return tag(
        "article", tag("div", *paragraphs, class_="prompt"), tag("div", *map(_answer, answers), class_="answers")
    )


def _answer(written: Written) -> Markup:
    head = tag("h4", written.author, *([" ", tag("span", written.note)] if written.note else []))
    return tag("div", head, *(tag("p", text or "(empty)", dir="auto") for text in written.turns), class_="answer")


def how_many(shown: int, total: int, noun: str) -> Markup:
    text = f"The first {shown} of {total} {noun}." if shown < total else f"{total} {noun}."
    return tag("p", text, class_="quiet")
