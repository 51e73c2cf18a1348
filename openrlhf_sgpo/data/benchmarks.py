"""Recognises prompts of AlpacaEval and MT-Bench by their hashes; the package does not ship the texts."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from importlib.resources import files

from openrlhf_sgpo.data.records import Messages

_NEITHER_LETTER_NOR_DIGIT = re.compile(r"[\W_]+")


def normalised(text: str) -> str:
    """Letters and digits only, case-folded, so punctuation, spaces and case do not hide equal texts."""
    return _NEITHER_LETTER_NOR_DIGIT.sub("", text.casefold())


def prompt_hash(text: str) -> str:
    """16 hexadecimal digits of BLAKE2b of the normalised text."""
    return hashlib.blake2b(normalised(text).encode(), digest_size=8).hexdigest()


@cache
def benchmark_hashes() -> dict[str, frozenset[str]]:
    """The prompt hashes of each benchmark, as written by ``eval/benchmark_prompts.py``."""
    text = (files("openrlhf_sgpo.data") / "benchmark_prompts.json").read_text(encoding="utf-8")
    return {name: frozenset(hashes) for name, hashes in json.loads(text).items()}


def benchmarks_with(messages: Messages) -> list[str]:
    """Benchmarks with a prompt equal to the conversation's first user message.

    The first, because a conversation that begins with a benchmark prompt contains an answer to it, however it continues.
    """
    first = next((message["content"] for message in messages if message["role"] == "user"), "")
    first_hash = prompt_hash(first)
    return [name for name, hashes in benchmark_hashes().items() if first_hash in hashes]
