"""Prompts of AlpacaEval and MT-Bench, recognised by hashes: the package does not ship their texts."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from importlib.resources import files

from openrlhf_sgpo.data.records import Messages

_NEITHER_LETTER_NOR_DIGIT = re.compile(r"[\W_]+")


def normalised(text: str) -> str:
    """Letters and digits only, without case, so that punctuation and spaces do not hide an equal text."""
    return _NEITHER_LETTER_NOR_DIGIT.sub("", text.casefold())


def prompt_hash(text: str) -> str:
    """16 hexadecimal digits of BLAKE2b of the normalised text."""
    return hashlib.blake2b(normalised(text).encode(), digest_size=8).hexdigest()


@cache
def benchmark_hashes() -> dict[str, frozenset[str]]:
    """The hashes of each benchmark's prompts, as ``eval/benchmark_prompts.py`` wrote them."""
    text = (files("openrlhf_sgpo.data") / "benchmark_prompts.json").read_text(encoding="utf-8")
    return {name: frozenset(hashes) for name, hashes in json.loads(text).items()}


def benchmarks_with(messages: Messages) -> list[str]:
    """Benchmarks that ask what the conversation's first user message asks.

    The first, because a conversation that begins with a benchmark's prompt holds an answer to it, however it goes on.
    """
    first = next((message["content"] for message in messages if message["role"] == "user"), "")
    found = prompt_hash(first)
    return [name for name, hashes in benchmark_hashes().items() if found in hashes]
