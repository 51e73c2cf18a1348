"""API keys: settings say where a key is but never contain it, and no file or output shows it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

SOURCES = "env, env:NAME or file:PATH"
HIDDEN = "[hidden]"
SHORTEST = 8  # characters; shorter keys are placeholders such as "none", which may be ordinary words

_SOURCE = re.compile(r"|env|env:[A-Za-z_]\w*|file:.+", re.ASCII)
# But not pad_token or prompt_key, which are not secrets.
_SECRET_NAME = re.compile(r"(?:api_?key|secret|password|(?:^|\.)(?:key|token))$", re.IGNORECASE)
# But not TOKENIZERS_PARALLELISM or KEYBOARD.
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?(_|$)", re.IGNORECASE)
_WITH_USER = re.compile(r"(\w://)[^/\s]+@")
_read: set[str] = set()  # every key that this process has read


def refused(name: str, value: object, secret: bool = False) -> str:
    """Why this value of a setting is refused; empty if it is accepted. The text does not repeat the value.

    secret: the setting is a key, even if its name does not say so.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [str(item) for item in values if item is not None]
    if secret or _SECRET_NAME.search(name):
        if not all(_SOURCE.fullmatch(text) for text in texts):
            return (
                "takes no key itself, which would end up in logs and in your shell's history (not repeated here): put the key "
                f"into {_variable(name)} and pass env, or use env:NAME or file:PATH"
            )
    elif any(_WITH_USER.search(text) for text in texts):
        return (
            "is an address with a user's name or password before the @ (not repeated here): remove them, and provide a key "
            "in the environment"
        )
    return ""


def read_key(source: str, variable: str) -> str:
    """The key that ``source`` points to; empty for an empty source. variable: the one that ``env`` stands for.

    Raises ValueError if the key is missing or cannot be one; the message does not repeat it.
    """
    if not source:
        return ""
    kind, _, place = source.partition(":")
    place = place or variable
    if not _SOURCE.fullmatch(source):
        raise ValueError(f"expected {SOURCES}")
    if kind == "env":
        key, where = os.environ.get(place, ""), f"the variable {place}"
    else:
        where = f"the file {place}"
        try:
            key = Path(place).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ValueError(f"{where} cannot be read ({type(error).__name__})") from None
    key = key.strip()
    if not key:
        raise ValueError(f"{where} is {'not set' if kind == 'env' else 'empty'}")
    _read.add(key)
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(f"{where} holds no valid key: it contains a space, a line break or a special character")
    return key


def key_problems(name: str, source: str, variable: str) -> list[str]:
    """The problem with a key setting, naming it, if ``read_key`` fails."""
    try:
        read_key(source, variable)
    except ValueError as error:
        return [f"--{name}: {error}"]
    return []


def without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that needs no key, such as one that loads a model from disk."""
    return {name: value for name, value in environment.items() if not _SECRET_VARIABLE.search(name)}


def redacted(text: str) -> str:
    """The text with hidden keys (those that this process has read, and values of variables named like keys) and hidden user
    names and passwords in addresses."""
    secrets = _read | {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    parts = {part for key in secrets for part in key.split() if len(part) >= SHORTEST}
    for part in sorted(parts, key=len, reverse=True):
        text = text.replace(part, HIDDEN)
    return _WITH_USER.sub(rf"\1{HIDDEN}@", text)


def _variable(name: str) -> str:
    if "wandb" in name:
        return "the variable WANDB_API_KEY"
    return "the variable OPENAI_API_KEY" if name.endswith("api_key") else "a variable of the environment"
