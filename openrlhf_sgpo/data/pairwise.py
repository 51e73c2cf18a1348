"""The question "Which answer is better, A or B?" that the preference model is trained on and that judges are asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from openrlhf_sgpo.data.records import Messages
from openrlhf_sgpo.data.tokens import ChatFormat

LETTERS = ("A", "B")
MARK = " [...] "  # where a text was cut

# A trained model learns what matters from its pairs; judges get instructions instead.
TRAINED = "Here are a conversation and two answers to its last message."
LAYOUT = """{introduction}

[Conversation]
{conversation}

[Answer A]
{first}

[Answer B]
{second}

[Question]
Which answer is better, A or B? Reply with one letter and nothing else."""


def transcript(messages: Messages, tools: Sequence[Any] = ()) -> str:
    """The conversation as text: the tools that the assistant may call, then every field of every message."""

    def turn(message: dict[str, Any]) -> str:
        further = [f"[{name}: {_plain(value)}]" for name, value in message.items() if name not in ("role", "content")]
        content = [message["content"]] if message["content"] or not further else []
        return f"{message['role'].capitalize()}: " + "\n".join(further + content)

    offered = [f"Tools: {_plain(tools)}"] if tools else []
    return "\n\n".join(offered + list(map(turn, messages)))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def pairwise_messages(conversation: str, first: str, second: str) -> Messages:
    """The question as one user message, because some chat templates have no system message."""
    text = LAYOUT.format(introduction=TRAINED, conversation=conversation, first=first, second=second)
    return [{"role": "user", "content": text}]


def fitted(
    prompt: Messages, first: str, second: str, chat: ChatFormat, tools: Sequence[Any] = ()
) -> tuple[Messages, Messages]:
    """The comparison of two answers in both orders, ``first`` as A and ``first`` as B, for the trained model.

    If it exceeds ``chat.max_len``, the ends of both answers are cut to the same number of characters, taking up at most half
    of the room, and then the beginning of the conversation. Both orders are cut alike. Raises ValueError if nothing fits.
    """
    conversation = transcript(prompt, tools)
    whole, longest = len(conversation), max(len(first), len(second))

    def orders(kept: int, each: int) -> tuple[Messages, Messages]:
        """Both orders, with the last ``kept`` characters of the conversation and the first ``each`` of both answers."""
        context = conversation if kept == whole else MARK + conversation[whole - kept :]
        a, b = (text if len(text) <= each else text[:each] + MARK for text in (first, second))
        return pairwise_messages(context, a, b), pairwise_messages(context, b, a)

    def length(kept: int, each: int) -> int:
        return max(len(chat.prompt(messages)) for messages in orders(kept, each))

    limit = chat.max_len - max(2, *(len(chat.response(letter, True, chat.max_len)) for letter in LETTERS))
    if length(whole, longest) <= limit:
        return orders(whole, longest)
    frame = length(0, 0)
    if frame >= limit:
        raise ValueError(
            f"a comparison of two empty answers has {frame} tokens, which leaves no room within {chat.max_len}; raise "
            "--data.max_len (for an oracle --reward.max_len)"
        )
    each = _largest(longest, lambda count: length(0, count) <= (frame + limit) // 2)
    kept = _largest(whole, lambda count: length(count, each) <= limit)
    if kept == whole:
        each = _largest(longest, lambda count: length(whole, count) <= limit)
    return orders(kept, each)


def _largest(top: int, fits: Callable[[int], bool]) -> int:
    """The largest count in 0..top that fits, by bisection; 0 must fit."""
    low = 0
    while low < top:
        middle = (low + top + 1) // 2
        low, top = (middle, top) if fits(middle) else (low, middle - 1)
    return low
