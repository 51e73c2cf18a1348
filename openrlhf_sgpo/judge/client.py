"""A client of OpenAI-compatible servers: concurrent requests, retries, and every answer stored as soon as it arrives."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from openrlhf_sgpo import keys
from openrlhf_sgpo.config import ServerSettings
from openrlhf_sgpo.content_cache import ContentCache, content_key
from openrlhf_sgpo.data.records import Messages
from openrlhf_sgpo.judge.reply import (
    Elsewhere,
    NotJson,
    Reply,
    Unusable,
    kept_reply,
    limited_client,
    read_completion,
    read_reply,
    spent,
)

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

Value = TypeVar("Value")

# Seconds between two attempts: the pause doubles, unless the server requests a longer one.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
LONGEST_REQUESTED = 600.0
PASSING = (408, 409, 425, 429)  # client errors that a retry may avoid
REFUSING = (400, 413, 422)  # client errors of a single request: a content filter, a context that is too long
NO_CREDIT = "insufficient_quota"
KEY = "OPENAI_API_KEY"  # the variable of --judge.api_key env


class JudgeError(ValueError):
    """A server gave no usable answer, after all retries."""


class Unanswered(JudgeError):
    """The server's last reply to a request was unusable, or it refused this request."""


class Request(NamedTuple):
    """A request to the judge. name: its name in errors."""

    name: str
    messages: Messages


class ChatClient:
    """Asks the model of ``settings`` with one ``decoding``: further arguments of chat completions, which belong to the cache
    key of an answer. For a single process: with several ranks, rank 0.

    counts: calls (usable replies that were not in the cache), prompt_tokens and completion_tokens of all replies, failures
    (attempts without a usable reply) and retries. kept: where answers are stored, a file, or a cache that several clients
    share. api_version: of Azure's OpenAI service, which has its own protocol; empty for any other server.
    """

    def __init__(
        self,
        settings: ServerSettings,
        decoding: Mapping[str, Any],
        kept: Path | ContentCache | None = None,
        api_version: str = "",
    ):
        self.settings = settings
        self.decoding = dict(decoding)
        self.cache = kept if isinstance(kept, ContentCache) else ContentCache(kept)
        self.api_version = api_version
        self.counts: Counter[str] = Counter()
        self._jitter = random.Random()

    def ask(self, requests: Sequence[Request], label: str, accept: Callable[[Reply], Value]) -> list[Value]:
        """``accept`` applied to each reply. Stored replies are not requested again, and equal requests are sent once. Without a
        label there is no progress bar.

        Raises JudgeError if a request fails for good; replies that had arrived or were under way are stored.
        """
        self._fetch(requests, label, accept, partial=False)
        return [accept(reply) for request in requests if (reply := self._kept(request))]

    def ask_partially(
        self, requests: Sequence[Request], label: str, accept: Callable[[Reply], Value]
    ) -> list[Value | None]:
        """The same, but None for a request that stays ``Unanswered``, of which nothing is stored. Any other failure for good
        raises JudgeError."""
        self._fetch(requests, label, accept, partial=True)
        return [accept(reply) if (reply := self._kept(request)) else None for request in requests]

    def missing(self, requests: Sequence[Request]) -> dict[str, Request]:
        """The requests that are not answered yet, by key."""
        return {self._key(request): request for request in requests if self._kept(request) is None}

    def _key(self, request: Request) -> str:
        return content_key(self.settings.model, self.decoding, request.messages)

    def _kept(self, request: Request) -> Reply | None:
        key = self._key(request)
        return kept_reply(self.cache[key]) if key in self.cache else None

    def _fetch(self, requests: Sequence[Request], label: str, accept: Callable[[Reply], Any], partial: bool) -> None:
        if missing := self.missing(requests):
            asyncio.run(self._ask_all(missing, label, accept, partial))

    async def _ask_all(
        self, missing: Mapping[str, Request], label: str, accept: Callable[[Reply], Any], partial: bool
    ) -> None:
        from openrlhf_sgpo.output import Progress

        todo = iter(missing.items())
        failure: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()  # the first one for good

        async def work() -> None:
            for key, request in todo:  # the workers share this iterator
                if failure.done():
                    return
                try:
                    self.cache[key] = asdict(await self._ask(server, request, accept, failure))
                except Exception as error:
                    if not (partial and isinstance(error, Unanswered)):
                        if not failure.done():
                            failure.set_result(error)
                        return
                progress.update()

        async with self._server() as server:
            progress = Progress(total=len(missing), desc=label, unit="call", disable=not label)
            workers = [asyncio.ensure_future(work()) for _ in range(min(self.settings.concurrency, len(missing)))]
            try:
                # Even after a failure: requests under way are paid for, so their replies are stored.
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                progress.close()
        if failure.done():
            error = failure.result()
            if isinstance(error, JudgeError):
                raise type(error)(f"{error}{self._number_kept()}") from None
            raise error

    def _server(self) -> AsyncOpenAI:
        from openai import AsyncAzureOpenAI, AsyncOpenAI

        address, key = self.settings.base_url, keys.read_key(self.settings.api_key, KEY) or "none"
        # The package's retries and time limits are off: this class decides what counts as a failure.
        shared: Any = {"api_key": key, "timeout": None, "max_retries": 0, "http_client": limited_client()}
        if self.api_version:
            return AsyncAzureOpenAI(azure_endpoint=address, api_version=self.api_version, **shared)
        return AsyncOpenAI(base_url=address, **shared)

    async def _ask(
        self, server: AsyncOpenAI, request: Request, accept: Callable[[Reply], Any], failure: asyncio.Future[Exception]
    ) -> Reply:
        """A reply that ``accept`` takes. Raises JudgeError, and Unanswered if ``accept`` refused the last reply or the server
        refused the request. failure: of any request; once it is set, nothing is retried."""
        from openai import APIConnectionError, APIStatusError

        attempts, attempt, answered = 1 + self.settings.max_retries, 0, self.counts["calls"]
        while attempt < attempts:
            requested, unusable, limited = 0.0, False, False
            try:
                reply = await asyncio.wait_for(self._reply_of(server, request), self.settings.timeout)
                accept(reply)
            except asyncio.TimeoutError:
                problem = f"it timed out after {self.settings.timeout:g} seconds, see --judge.timeout"
            except Elsewhere as error:
                self.counts["failures"] += 1
                advice = "; if the key and the texts may go there, give that address as --judge.base_url"
                raise JudgeError(self._failed(request, str(error), advice)) from None
            except APIStatusError as error:
                problem = error.message
                if advice := self._hopeless(error):
                    self.counts["failures"] += 1
                    refused = error.status_code in REFUSING and error.code != NO_CREDIT
                    kind = Unanswered if refused else JudgeError
                    raise kind(self._failed(request, problem, f"; {advice}")) from None
                requested, limited = _requested_pause(error), error.status_code == 429
            except APIConnectionError as error:
                problem = f"{error} {error.__cause__ or ''}"
            except Unusable as error:
                problem, unusable = str(error), not isinstance(error, NotJson)
            else:
                self.counts["calls"] += 1
                return reply
            self.counts["failures"] += 1
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * self._jitter.uniform(0.75, 1)
            if limited and self.counts["calls"] > answered:
                answered = self.counts["calls"]  # the server's limit lets others through, so this one's turn comes
            else:
                attempt += 1
            if attempt < attempts:
                await asyncio.wait([failure], timeout=max(pause, requested))
                if failure.done():
                    break
                self.counts["retries"] += 1
        kind = Unanswered if unusable else JudgeError
        tried = f" (attempt {attempt} of {attempts}, see --judge.max_retries)"
        raise kind(self._failed(request, problem, tried))

    async def _reply_of(self, server: AsyncOpenAI, request: Request) -> Reply:
        """The server's reply, acceptable or not. Raises Unusable, Elsewhere, and the errors of the package openai."""
        from openai import APIConnectionError

        messages: Any = request.messages
        create = server.chat.completions.with_raw_response.create
        try:
            answer = await create(model=self.settings.model, messages=messages, **self.decoding)
        except APIConnectionError as error:
            if isinstance(error.__cause__, (Elsewhere, Unusable)):  # some versions of the package wrap them
                raise error.__cause__ from None
            raise
        except RecursionError:
            raise Unusable("the server's reply is nested too deeply") from None
        completion = read_completion(answer.http_response.content)
        self.counts.update(spent(completion))
        return read_reply(completion)

    def _hopeless(self, error: APIStatusError) -> str:
        """Advice on an error that no retry can avoid; empty for any other error."""
        if error.status_code in (401, 403):
            return "set --judge.api_key"
        if error.status_code == 404:
            return "is --judge.model a model of that server, and --judge.base_url its address up to /v1?"
        if error.code == NO_CREDIT or (400 <= error.status_code < 500 and error.status_code not in PASSING):
            return "the server will not answer this request, and retries cannot help"
        return ""

    def _failed(self, request: Request, problem: str, more: str) -> str:
        """The text of an error. problem: a server's message, which may be long and may contain the key."""
        shown = " ".join(keys.redacted(problem).split())[:300]
        server = f"--judge.base_url {self.settings.base_url}, model {self.settings.model}"
        return f"{server}: {request.name} failed: {shown}{more}"

    def _number_kept(self) -> str:
        if not self.cache.path:
            return ""
        return (
            f". {len(self.cache)} answers are kept in {self.cache.path}; the same command (for a run, with --resume) requests "
            "only the others"
        )


def server_problems(settings: ServerSettings) -> list[str]:
    """Problems of a server's address and key, each naming its flag."""
    problems = []
    address = settings.base_url
    if address and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", address):
        # The message does not repeat the address, which may contain a password.
        problems.append("--judge.base_url: not an address such as http://localhost:8000/v1, without ? and #")
    return problems + keys.key_problems("judge.api_key", settings.api_key, KEY)


def _requested_pause(error: APIStatusError) -> float:
    """Seconds to wait as requested by the server (Retry-After: a number, or a date); 0 without a request."""
    value = error.response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_REQUESTED)
