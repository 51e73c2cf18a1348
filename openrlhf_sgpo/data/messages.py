"""Conversations as rows hold them: messages, texts, Anthropic's dialogues, and further arguments of the chat template.

``docs/data.md`` lists the accepted shapes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from openrlhf_sgpo.data.files import DataError

Messages = list[dict[str, Any]]

ROLES = ("system", "user", "assistant", "tool", "developer")
# Of a message, beside its content, that a chat template may render.
FIELDS = ("reasoning_content", "tool_calls", "tool_call_id", "name")
# Roles and fields of other formats, and their names here.
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_ROLES |= {"chatgpt": "assistant", "chatbot": "assistant", "function": "tool", "observation": "tool"}
_FIELDS = {"function_call": "tool_calls", "reasoning": "reasoning_content", "thinking": "reasoning_content"}
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_REFUSED = {
    **dict.fromkeys(_MEDIA, "only text can be trained on; remove it, or these rows"),
    "history": "write its turns into 'prompt' as messages",
    "functions": "rename it to 'tools'",
}
_SYSTEM = ("system", "system_prompt")
# What this package passes to chat templates, and arguments of ``apply_chat_template`` that do not reach the template.
NOT_FOR_TEMPLATES = {
    *("self", "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now"),
}
# Columns that hold the prompt in other formats.
_PROMPTS = {
    *("question", "questions", "instruction", "instructions", "input", "inputs", "query", "problem", "request", "task"),
    *("context", "text", "post", "article", "title", "document", "dialogue", "dialog", "user", "user_input"),
    *("message", "messages", "conversation", "conversations", "history", "context_messages", "chat", "turns"),
}
_KNOWN = {"id", "prompt_id", "chosen", "rejected", "tools", "chat_template_kwargs", *_SYSTEM}
_WORDS = 4  # with at least this many words, a column of any other name may hold the prompt
_DEEPEST = 32  # levels of nested lists and objects in tools and tool calls

# A message, or a list of messages or message parts, written as text: as JSON or as Python prints it.
_LISTED = re.compile(r"""\s*(array\()?\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")
_CONTENT = re.compile(r"""['"](content|value)['"]\s*:""")
_ROLE = re.compile(rf"""['"](role|from)['"]\s*:\s*['"]({"|".join((*ROLES, *_ROLES))})['"]""")
_PARTS = re.compile(r"""\s*\[\s*\{\s*['"]type['"]\s*:\s*['"]text['"]\s*,\s*['"]text['"]\s*:""")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def checked_text(value: str, column: str) -> str:
    """The text itself. Raises DataError if it cannot be written as UTF-8, or holds messages written as text."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"column {column!r} holds half a character ({value[error.start]!r}); rewrite the text as UTF-8"
        ) from error
    listed = _PARTS.match(value) or (_LISTED.match(value) and _CONTENT.search(value) and _ROLE.search(value))
    if listed and value.rstrip()[-1] in "]})":
        raise DataError(f"column {column!r} holds messages written as text; write the list itself")
    return value


def _without_nulls(value: Any, column: str, depth: int = 0) -> Any:
    """The value without the nulls that tables hold for missing keys. Raises DataError unless it is plain JSON."""
    if depth > _DEEPEST:
        raise DataError(f"column {column!r} is nested too deeply")
    if isinstance(value, str):
        return checked_text(value, column)
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list):
        return [_without_nulls(item, column, depth + 1) for item in value if item is not None]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        items = ((checked_text(key, column), item) for key, item in value.items() if item is not None)
        return {key: _without_nulls(item, column, depth + 1) for key, item in items}
    raise DataError(f"column {column!r} holds a {type(value).__name__}; expected texts, numbers, lists and objects")


def _from_json(value: Any, column: str, kind: type, expected: str) -> Any:
    """A list or an object, possibly written as JSON text; empty if the column is."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"column {column!r} is not JSON; it must be {expected}") from error
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        return kind()
    if not isinstance(value, kind):
        raise DataError(f"column {column!r} must be {expected}, or this as JSON text")
    return _without_nulls(value, column)


def _is_filled(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


def messages_of(value: Any, column: str) -> Messages:
    """Messages with role, content (a text) and any of FIELDS. A text becomes a user message."""
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": checked_text(value, column)}]
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return [
            _message(message, column, f"column {column!r}, message {place}") for place, message in enumerate(value, 1)
        ]
    raise DataError(f"column {column!r} must be a non-empty string or a list of {{role, content}} messages")


def _message(message: dict[str, Any], column: str, where: str) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        raise DataError(
            f"{where} has 'from' and 'value'; expected {{role, content}}, with the roles user and assistant"
        )
    if role not in ROLES:
        equivalent = {**_ROLES, **dict(zip(ROLES, ROLES, strict=True))}.get(str(role).casefold())
        remedy = f"; write {equivalent!r}" if equivalent else ""
        raise DataError(f"{where} of {{role, content}} has the role {role!r}, none of {', '.join(ROLES)}{remedy}")
    for name in (name for name in (*_FIELDS, *_MEDIA) if _is_filled(message.get(name))):
        remedy = f"rename it to {_FIELDS[name]!r}" if name in _FIELDS else "only text can be trained on"
        raise DataError(f"{where} has the field {name!r}; {remedy}")
    fields = {name: _without_nulls(message[name], column) for name in FIELDS if _is_filled(message.get(name))}
    if content is None and "tool_calls" in fields:
        content = ""
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise DataError(f"{where} of {{role, content}} needs text as its content, found {_kind(content)}")
    return {"role": role, "content": checked_text(content, column), **fields}


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _joined(parts: list[Any], where: str) -> str:
    """The text of a content given as a list of parts."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise DataError(f"{where} has a part of kind {kind!r}; only text can be trained on")
    return "".join(part["text"] for part in parts)


def _transcript(text: str) -> Messages | None:
    """The turns of a dialogue in Anthropic's notation (``Human: ... Assistant: ...``); None for other texts."""
    opening, *parts = _TURN.split("\n\n" + text.lstrip())
    if opening.strip() or "Assistant" not in parts[::2]:
        return None
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _SPEAKERS[speaker], "content": content.strip()} for speaker, content in turns]


def template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the chat template from the columns ``tools`` and ``chat_template_kwargs``. Raises DataError."""
    tools = _from_json(row.get("tools"), "tools", list, "a list of objects that describe functions")
    if not all(isinstance(tool, dict) for tool in tools):
        raise DataError("column 'tools' must be a list of objects that describe functions")
    further = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs", dict, "an object")
    if reserved := sorted(NOT_FOR_TEMPLATES & further.keys()):
        raise DataError(f"column 'chat_template_kwargs' may not set {', '.join(reserved)}")
    return {**({"tools": tools} if tools else {}), **further}


def template_columns(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``template_kwargs``: its columns, without empty ones."""
    further = {name: value for name, value in arguments.items() if name != "tools"}
    columns = {"tools": arguments.get("tools"), "chat_template_kwargs": further}
    return {name: value for name, value in columns.items() if value}


def with_system(row: Mapping[str, Any], messages: Messages) -> Messages:
    """The messages, preceded by the text of column ``system`` or ``system_prompt`` unless they already begin with it."""
    for column in _SYSTEM:
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise DataError(f"column {column!r} must be text")
        if not text or not text.strip():
            continue
        first = messages[0]
        if first["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": checked_text(text, column)}, *messages]
        elif first["content"].strip() != text.strip():
            raise DataError(
                f"column {column!r} differs from the system message at the start of the prompt; keep one of the two"
            )
    return messages


def refuse_unread_columns(row: Mapping[str, Any]) -> None:
    """Raises DataError for columns that are part of the prompt but would be ignored."""
    for column in _REFUSED:
        if _is_filled(row.get(column)):
            raise DataError(f"column {column!r} is not read: {_REFUSED[column]}")


def prompt_messages(value: Any, column: str = "prompt") -> Messages:
    """The messages of a prompt in any shape that the column ``prompt`` may have. Raises DataError."""
    turns = _transcript(value) if isinstance(value, str) else None
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        value = turns[:-1]  # the dialogue up to the assistant's turn
    messages = messages_of(value, column)
    if messages[-1]["role"] == "assistant":
        raise DataError("the prompt ends with an assistant message; the response belongs in chosen and rejected")
    return messages


def _response(value: Any, column: str) -> tuple[Messages, str]:
    """(messages before the response, text of the response, which may be empty)"""
    if isinstance(value, str):
        return [], checked_text(value, column)
    messages = messages_of(value, column)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"the last message of column {column!r} must have the role assistant")
    *before, response = messages
    if further := [name for name in FIELDS if name in response]:
        raise DataError(
            f"the response in column {column!r} has {', '.join(further)}; write all that the model should say into content"
        )
    return before, response["content"]


def common_prefix_length(first: str, second: str) -> int:
    """Number of characters in the longest common prefix of two texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _shared_text(chosen: str, rejected: str) -> tuple[Messages, str, str]:
    """(prompt, chosen, rejected) of two texts that begin with one prompt, as in TRL: their common prefix of whole words."""
    end = common_prefix_length(chosen, rejected)
    if any(text[end : end + 1].strip() for text in (chosen, rejected)):
        end = next((index + 1 for index in range(end - 1, -1, -1) if chosen[index].isspace()), 0)
    if not chosen[:end].strip():
        raise DataError("missing column prompt, and chosen and rejected do not share their beginning")
    # The space between prompt and response belongs to neither: the chat template separates them.
    return messages_of(chosen[:end].rstrip(), "chosen"), chosen[end:].strip(), rejected[end:].strip()


def _may_be_prompt(column: Any, value: Any) -> bool:
    """Whether a column beside chosen and rejected seems to hold their prompt."""
    if str(column).casefold() in _PROMPTS:
        return _is_filled(value)
    return column not in _KNOWN and isinstance(value, str) and len(value.split()) >= _WORDS


def _implicit(row: Mapping[str, Any]) -> tuple[Messages, str, str]:
    """(prompt, chosen, rejected) of a row without the column prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        turns = _transcript(checked_text(chosen, "chosen")), _transcript(checked_text(rejected, "rejected"))
        if None in turns:
            if candidates := [repr(column) for column, value in row.items() if _may_be_prompt(column, value)]:
                raise DataError(
                    f"missing column prompt; rename {' or '.join(candidates)} if it is the prompt, or else remove it"
                )
            if "prompt" in row:
                raise DataError("column prompt is null; fill it, or remove it if both texts begin with their prompt")
            return _shared_text(chosen, rejected)
        chosen, rejected = turns
    (before, text), (before_rejected, text_rejected) = _response(chosen, "chosen"), _response(rejected, "rejected")
    if not before or before != before_rejected:
        raise DataError("missing column prompt, and chosen and rejected do not share the messages before the last one")
    if before[-1]["role"] == "assistant":
        raise DataError("two assistant messages end the conversation; the response must be one message")
    if all(message["role"] in ("system", "developer") for message in before):
        raise DataError("missing column prompt, and no message but the system's precedes the response")
    return before, text, text_rejected


def _same_end(first: Messages, second: Messages) -> bool:
    """Whether the contents of the shorter conversation are those at the end of the longer one."""
    a, b = ([message["content"].strip() for message in messages] for messages in (first, second))
    shorter = min(len(a), len(b))
    return a[len(a) - shorter :] == b[len(b) - shorter :]


def _explicit(row: Mapping[str, Any]) -> tuple[Messages, str, str]:
    """(prompt, chosen, rejected) of a row with the column prompt.

    chosen and rejected may repeat the prompt, preceded by earlier turns: then the prompt is all that they repeat.
    """
    prompt = prompt_messages(row["prompt"])
    start = row["prompt"].strip() if isinstance(row["prompt"], str) else None
    responses: dict[str, str] = {}
    for column in ("chosen", "rejected"):
        before, response = _response(row[column], column)
        if turns := _transcript(row[column]) if isinstance(row[column], str) else None:
            *repeated, last = turns
            same_text = bool(start) and row[column].strip().startswith(start)
            if repeated and last["role"] == "assistant" and (same_text or _same_end(repeated, prompt)):
                before, response = repeated, last["content"]
                prompt = repeated if same_text else prompt
        if before and not _same_end(before, prompt):
            raise DataError(
                f"the messages of column {column!r} before the response differ from those of column 'prompt'"
            )
        prompt = max(prompt, before, key=len)
        responses[column] = response
    return prompt, responses["chosen"], responses["rejected"]


def preference(row: Mapping[str, Any]) -> tuple[Messages, str, str]:
    """(prompt, chosen, rejected) of a row that has the columns chosen and rejected. Raises DataError."""
    refuse_unread_columns(row)
    prompt, chosen, rejected = _explicit(row) if row.get("prompt") is not None else _implicit(row)
    return with_system(row, prompt), chosen, rejected


def question(row: Mapping[str, Any], column: str = "prompt") -> Messages:
    """The prompt in ``column`` of a row. Raises DataError."""
    refuse_unread_columns(row)
    return with_system(row, prompt_messages(row[column], column))


def digest(*parts: Any) -> bytes:
    """A 16-byte hash of the values."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
