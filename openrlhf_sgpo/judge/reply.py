"""Replies of a server, which are not trusted: limits on their size and origin, and the answers in them."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from openrlhf_sgpo import keys

Kind = TypeVar("Kind")

LONGEST = 2**23  # bytes of a reply, uncompressed
FILTERED = "content_filter"  # the finish_reason of replies that are not whole
_ROUNDING = 1e-3  # by which a log-probability may exceed 0


class Unusable(ValueError):
    """A reply without a usable answer: it is requested again, and never stored."""


class NotJson(Unusable):
    """A reply that is not even JSON: the server is broken, not its answer."""


class Elsewhere(ValueError):
    """The server redirects the request to another server."""


@dataclass(frozen=True)
class Reply:
    """An answer. top: the most likely first tokens with their log-probabilities; empty if the server did not send any."""

    text: str
    finish_reason: str | None = None
    top: tuple[tuple[str, float], ...] = ()


def read_completion(content: bytes) -> dict[str, Any]:
    """The JSON object that a server sent. Raises Unusable."""
    try:
        completion = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NotJson(f"the server's reply is not a chat completion: it is not JSON ({error})") from None
    return _checked(completion, dict, "it")


def spent(completion: Mapping[str, Any]) -> dict[str, int]:
    """prompt_tokens and completion_tokens, where the server reports them."""
    usage = completion.get("usage")
    counts = (
        {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")} if isinstance(usage, dict) else {}
    )
    return {name: count for name, count in counts.items() if type(count) is int and 0 <= count < 2**53}


def read_reply(completion: Mapping[str, Any]) -> Reply:
    """The answer in a chat completion, with API keys removed, which a server may echo. Raises Unusable."""
    choices = _checked(completion.get("choices"), list, "choices")
    choice = _checked(choices[0] if choices else None, dict, "choices[0]")
    message = _checked(choice.get("message"), dict, "message")
    reason, logprobs = choice.get("finish_reason"), choice.get("logprobs")
    places = None if logprobs is None else _checked(logprobs, dict, "logprobs").get("content")
    first = [] if places is None else _checked(places, list, "logprobs.content")[:1]
    top = [
        (keys.redacted(_text(entry.get("token"), "token")), _log_probability(entry.get("logprob")))
        for place in first
        for item in _checked(_checked(place, dict, "logprobs.content[0]").get("top_logprobs"), list, "top_logprobs")
        for entry in [_checked(item, dict, "top_logprobs[]")]
    ]
    if reason == FILTERED:
        raise Unusable("a content filter of the server has cut the reply")
    return Reply(
        keys.redacted(_text(message.get("content"), "content")),
        None if reason is None else _text(reason, "finish_reason"),
        tuple(top),
    )


def written_text(reply: Reply) -> str:
    """The judge's text, with or without a verdict. Raises Unusable if it is blank."""
    if not reply.text.strip():
        raise Unusable("the judge wrote nothing")
    return reply.text


def written_letter(reply: Reply, letters: Sequence[str]) -> str:
    """The letter that is the whole reply, except for punctuation. Raises Unusable for any other text."""
    match = re.fullmatch(rf"\W*([{''.join(letters)}])\W*", reply.text)
    if match is None:
        raise Unusable(f"the judge wrote {reply.text[:40]!r}, neither {' nor '.join(letters)}")
    return match[1]


def letter_log_probs(reply: Reply, letters: Sequence[str]) -> list[float]:
    """For each letter log sum_i exp(l_i), over the top tokens that are this letter except for white space, with l_i their
    log-probabilities; -inf if there are none. Raises Unusable if no letter has any."""
    totals = [_log_sum([value for token, value in reply.top if token.strip() == letter]) for letter in letters]
    if max(totals) == -math.inf:
        shown = ", ".join(repr(token) for token, _ in reply.top[:5])
        raise Unusable(
            f"neither {' nor '.join(letters)} is among the most likely tokens ({shown})"
            if reply.top
            else "the server sent no log-probabilities; --judge.logprobs false reads the letter that the judge writes"
        )
    return totals


def _log_sum(values: Sequence[float]) -> float:
    """log sum_i exp(values_i), even where every exp underflows; -inf without values."""
    top = max(values, default=-math.inf)
    return top + math.log(sum(math.exp(value - top) for value in values)) if values else top


def kept_reply(value: Any) -> Reply | None:
    """A stored reply from the mapping of its fields; None if it is invalid by today's rules."""
    try:
        top = [(_text(token, "token"), _log_probability(number)) for token, number in value["top"]]
        reply = Reply(_text(value["text"], "text"), value["finish_reason"], tuple(top))
        return None if reply.finish_reason == FILTERED else reply
    except (LookupError, TypeError, ValueError):
        return None


def limited_client() -> Any:
    """The HTTP client of the package openai with limits: redirects stay on the server, and replies have at most ``LONGEST``
    bytes."""
    from openai import DefaultAsyncHttpxClient

    # Requests uncompressed replies; compressed ones, if sent anyway, have the same limit.
    return DefaultAsyncHttpxClient(event_hooks={"response": [_limit]}, headers={"Accept-Encoding": "identity"})


async def _limit(response: Any) -> None:
    """Check a response and limit its stream, before its body is read. Raises Elsewhere, or Unusable."""
    if response.has_redirect_location:
        try:
            target = response.url.join(response.headers["location"])
        except Exception as error:  # the HTTP package has several errors for invalid addresses
            raise Elsewhere(f"the server redirects to an invalid address ({type(error).__name__})") from None
        if _origin(target) != _origin(response.url):
            raise Elsewhere(f"the server redirects to {target.host}, which anybody may own")
    encoding = response.headers.pop("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip"):
        raise Unusable(f"the server's reply is compressed with {encoding[:40]}, which was not requested")
    response.stream = _limited(response.stream, encoding == "gzip")


def _origin(address: Any) -> tuple[Any, ...]:
    ports = {"http": 80, "https": 443}
    return address.scheme, address.host, address.port or ports.get(address.scheme)


def _limited(stream: Any, compressed: bool) -> Any:
    """The uncompressed stream of bytes, which raises Unusable beyond ``LONGEST``."""
    # The HTTP package behind openai accepts only its own class of streams.
    base = next(kind for kind in type(stream).__mro__ if kind.__name__ == "AsyncByteStream")

    class Limited(base):  # type: ignore[misc, valid-type]
        async def __aiter__(self) -> AsyncIterator[bytes]:
            gzip = zlib.decompressobj(wbits=31) if compressed else None
            room = LONGEST
            async for part in stream:
                try:
                    part = gzip.decompress(part, room + 1) if gzip else part
                except zlib.error as error:
                    raise Unusable(f"the server's reply cannot be decompressed ({error})") from None
                room -= len(part)
                if room < 0:
                    raise Unusable(f"the server's reply has more than {LONGEST // 2**20} MiB")
                yield part

        async def aclose(self) -> None:
            await stream.aclose()

    return Limited()


def _checked(value: Any, kind: type[Kind], name: str) -> Kind:
    """The value of the field ``name``. Raises Unusable if it is of another type."""
    if not isinstance(value, kind):
        raise _strange(name, value)
    return value


def _text(value: Any, name: str) -> str:
    try:
        _checked(value, str, name).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which no file can hold
        raise Unusable(f"the server's reply is not a chat completion: {name} is not Unicode text") from None
    return value


def _log_probability(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value > _ROUNDING:
        raise _strange("logprob", value)
    return float(value)


def _strange(name: str, value: Any) -> Unusable:
    shown = repr(value) if value is None or isinstance(value, float) else f"of type {type(value).__name__}"
    return Unusable(f"the server's reply is not a chat completion: {name} is {shown}")
