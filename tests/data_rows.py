"""Rows of data files, and how they get there."""

from __future__ import annotations

import json

QUESTION = [{"role": "user", "content": "Why?"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Why?"},
]
GOOD = {"id": "good", "prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def said(text):
    return [{"role": "assistant", "content": text}]


def without(*columns, **changes):
    return {key: value for key, value in GOOD.items() if key not in columns} | changes


def write(folder, *rows):
    """A .jsonl file; bytes are taken as they are, everything else becomes JSON."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path
