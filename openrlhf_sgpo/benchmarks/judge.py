"""The judge of benchmarks: one cache for all of them, costs before and after asking, and its identity.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from openrlhf_sgpo import extras, flags, output
from openrlhf_sgpo.config import ServerSettings
from openrlhf_sgpo.content_cache import ContentCache, content_key
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.judge.client import ChatClient, JudgeError, Request, Unanswered, server_problems
from openrlhf_sgpo.judge.reply import Reply
from openrlhf_sgpo.judge.server import KEY, LocalServer
from openrlhf_sgpo.ledger import increase

Value = TypeVar("Value")

PRESETS = Path(__file__).with_name("judges")
CHARACTERS_PER_TOKEN = 4  # of English, roughly


@dataclass
class EvaluationJudgeSettings(ServerSettings):
    """Without --judge.base_url, the model is served locally."""

    preset: str = setting("", "a preset of this package by name, or a file; the group's other flags override it")
    logprobs: bool = setting(
        True, "read probabilities where a benchmark does; false: read the verdict the judge writes"
    )
    api_version: str = setting(
        "", "version of Azure's API, such as 2024-10-21; --judge.base_url is then the resource's endpoint"
    )
    price_prompt: float = setting(0.0, "USD per million prompt tokens (0: unknown)", low=0)
    price_completion: float = setting(0.0, "USD per million completion tokens (0: unknown)", low=0)
    max_cost: float = setting(0.0, "USD limit; requests that may exceed it are not sent (0: no limit)", low=0)
    thinking_tokens: int = setting(
        0, "tokens that a judge may think before it replies, in addition to a benchmark's limit of the reply", low=0
    )
    revision: str = setting("", "for a model served locally: commit of the hub's repository (default: the newest)")
    max_len: int = setting(
        0, "for a model served locally: longest prompt plus reply, in tokens (0: the model's own)", low=0
    )
    gpu_memory_utilization: float = setting(0.9, "for a model served locally: share of a GPU's memory", above=0, high=1)
    tensor_parallel_size: int = setting(1, "for a model served locally: GPUs", low=1)


def with_preset(settings: EvaluationJudgeSettings, origins: Mapping[str, str]) -> EvaluationJudgeSettings:
    """The settings, completed from their preset where the user set none.

    origins: of the user's settings by flag name, as ``flags.parse`` returns them for the group ``judge``. Raises
    flags.SettingsError for an unknown preset, and for mistakes in its file, with the line.
    """
    if not settings.preset:
        return settings
    built_in = PRESETS / f"{settings.preset}.yaml"
    path = built_in if built_in.is_file() else Path(settings.preset)
    if not path.is_file():
        raise flags.SettingsError(f"--judge.preset: {settings.preset} is neither a file nor one of {_presets()}")
    instances, preset_origins, _ = flags.parse(["--config", str(path)], {"": EvaluationJudgeSettings})
    if "preset" in preset_origins:
        raise flags.SettingsError(
            f"--judge.preset: a preset cannot name a preset ({preset_origins['preset']}); leave it out"
        )
    unset = [name for name in preset_origins if f"judge.{name}" not in origins]
    return replace(settings, **{name: getattr(instances[""], name) for name in unset})


def judge_problems(settings: EvaluationJudgeSettings) -> list[str]:
    """Problems of settings returned by ``with_preset``, each naming its flag."""
    problems = []
    if problem := extras.missing("openai"):
        problems.append(f"--judge.model: {problem}")
    if not settings.model:
        problems.append(
            f"--judge.model: missing, there is no default judge; name a model, or give --judge.preset one of {_presets()}"
        )
    problems += server_problems(settings) + _address_problems(settings)
    problems += flags.out_of_range({"judge": settings})
    if settings.max_cost > 0 and not settings.price_prompt + settings.price_completion:
        problems.append("--judge.max_cost: needs --judge.price_prompt and --judge.price_completion")
    return problems


def _address_problems(settings: EvaluationJudgeSettings) -> list[str]:
    address, model = settings.base_url, settings.model
    if address:
        return [
            f"--judge.{item.name}: only for a model served locally, and --judge.base_url is set; leave it out"
            for item in fields(settings)
            if item.name in ("revision", "max_len", "gpu_memory_utilization", "tensor_parallel_size")
            and getattr(settings, item.name) != item.default
        ]
    if settings.api_version:
        return ["--judge.base_url: missing, --judge.api_version needs the endpoint of the Azure resource"]
    if model and "/" not in model and not Path(model).is_dir():
        return [
            f"--judge.base_url: missing, and --judge.model {model} is neither a folder nor a hub name (OWNER/MODEL) that could "
            "be served locally; give the server's address"
        ]
    if model and (problem := extras.missing("vllm")):
        return [f"--judge.base_url: missing, and no model can be served locally: {problem}"]
    return []


def _presets() -> str:
    names = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    return f"the presets in {PRESETS} ({names or 'none'})"


class EvaluationJudge:
    """Asks a judge and keeps its answers, for all benchmarks, in ``folder``/judgements.

    Takes settings without ``judge_problems``. partial: skip replies that are unusable after the last attempt, instead of
    raising. Attributes: settings, with the model's name on its server; identity, recorded with every score; local, whether
    the model is served locally. The local server starts when first needed, so a rerun with nothing missing starts none.
    """

    def __init__(self, settings: EvaluationJudgeSettings, folder: Path, partial: bool = False):
        self.settings = replace(settings)
        self.partial = partial
        self.server: LocalServer | None = None
        if not settings.base_url:
            arguments: dict[str, Any] = {
                "gpu-memory-utilization": settings.gpu_memory_utilization,
                "tensor-parallel-size": settings.tensor_parallel_size,
            }
            if settings.max_len:
                arguments["max-model-len"] = settings.max_len
            self.server = LocalServer(settings.model, arguments, folder / "judge_server.log", settings.revision)
            self.settings.model = self.server.name
        self.local = self.server is not None
        self.identity: dict[str, Any] = {
            "model": self.settings.model,
            "preset": Path(settings.preset).name.removesuffix(".yaml"),
            "logprobs": settings.logprobs,
            "local": self.local,
            # Only the host: ports change, and an address may contain a key.
            "endpoint": urlsplit(settings.base_url).hostname or "",
            "api_version": settings.api_version,
        }
        file = re.sub(r"[^\w.-]+", "_", self.settings.model, flags=re.ASCII)
        self.cache = ContentCache(folder / "judgements" / f"{file}.jsonl")
        self.clients: dict[str, ChatClient] = {}  # by decoding

    def ask(
        self,
        kind: str,
        decoding: Mapping[str, Any],
        requests: Sequence[Request],
        accept: Callable[[Reply], Value],
        label: str,
    ) -> list[Value | None]:
        """The value of ``accept`` for each reply; None, only with ``partial``, for replies that stayed unusable.

        With a label, prints under the name ``kind`` what is missing and may cost, and at the end the actual cost. decoding:
        must have max_tokens, for the estimate. Raises JudgeError if a request fails after all attempts, and, before asking,
        if the cost may exceed the limit.
        """

        def say(what: str) -> None:
            if label:
                output.say(f"judge {self.settings.model}, {kind}: {what}")

        client = self._client(decoding)
        missing = list(client.missing(requests).values())
        if not missing:
            say(f"all {len(requests)} answers are stored already")
            return list(client.ask(requests, label, accept))
        say(f"{len(missing)} of {len(requests)} answers to judge; {self._estimate([(missing, decoding)])}")
        if self.server and not self.server.base_url:
            self.server.start()
            self.settings.base_url, self.settings.api_key = self.server.base_url, f"env:{KEY}"
        before = self.usage()
        try:
            return list((client.ask_partially if self.partial else client.ask)(requests, label, accept))
        except JudgeError as error:
            advice = ". --partial skips such judgements" if isinstance(error, Unanswered) else ""
            log = f". The log of its server is {self.server.log}" if self.server else ""
            raise JudgeError(f"{error}{advice}{log}") from error
        finally:
            say(self._spent_since(before))

    def state_cost(self, plans: Sequence[tuple[Mapping[str, Any], Sequence[Request]]]) -> None:
        """Print what is missing of all requests, and what that may cost. plans: decodings with their requests.

        Raises JudgeError if the cost may exceed the limit."""
        missing = [
            (list(self._client(decoding).missing(requests).values()), decoding)
            for decoding, requests in plans
            if requests
        ]
        count, total = sum(len(requests) for requests, _ in missing), sum(len(requests) for _, requests in plans)
        if count:
            estimate = self._estimate(missing)
            output.say(f"judge {self.settings.model}: {count} of {total} answers to judge in all; {estimate}")

    def usage(self) -> dict[str, float]:
        """Running totals of calls, tokens and failures by their names in the ledger; also USD if prices are known."""
        names = ("calls", "prompt_tokens", "completion_tokens", "failures")
        totals: dict[str, float] = {
            f"judge_{name}": sum(client.counts[name] for client in self.clients.values()) for name in names
        }
        if self._has_prices():
            totals["judge_usd"] = self._price(totals["judge_prompt_tokens"], totals["judge_completion_tokens"])
        return totals

    def close(self) -> None:
        """Stop the local server, if it was started."""
        if self.server:
            self.server.stop()

    def _client(self, decoding: Mapping[str, Any]) -> ChatClient:
        decoding = self._with_thinking(decoding)
        key = content_key(decoding)
        if key not in self.clients:
            self.clients[key] = ChatClient(self.settings, decoding, self.cache, api_version=self.settings.api_version)
        return self.clients[key]

    def _with_thinking(self, decoding: Mapping[str, Any]) -> dict[str, Any]:
        return {**decoding, "max_tokens": decoding["max_tokens"] + self.settings.thinking_tokens}

    def _has_prices(self) -> bool:
        return self.settings.price_prompt + self.settings.price_completion > 0

    def _price(self, prompt_tokens: float, completion_tokens: float) -> float:
        """USD."""
        settings = self.settings
        return (prompt_tokens * settings.price_prompt + completion_tokens * settings.price_completion) / 1e6

    def _estimate(self, missing: Sequence[tuple[Sequence[Request], Mapping[str, Any]]]) -> str:
        """The possible cost of missing answers, by decoding, in words. Raises JudgeError if it exceeds the limit."""
        characters = sum(
            len(message["content"]) for requests, _ in missing for request in requests for message in request.messages
        )
        count = sum(len(requests) for requests, _ in missing)
        prompt = characters // CHARACTERS_PER_TOKEN
        completion = sum(len(requests) * self._with_thinking(decoding)["max_tokens"] for requests, decoding in missing)
        rule = f"{CHARACTERS_PER_TOKEN} characters each"
        tokens = f"estimate: {prompt} prompt tokens ({rule}), up to {completion} completion tokens"
        if not self._has_prices():
            return tokens
        price, spent, limit = self._price(prompt, completion), self.usage()["judge_usd"], self.settings.max_cost
        if limit and spent + price > limit:
            raise JudgeError(
                f"--judge.max_cost {limit}: {count} missing answers may cost {price:.2f} USD ({tokens}), and "
                f"{spent:.2f} USD have been spent. No request was sent: raise the limit, or evaluate less"
            )
        return f"{tokens}, up to {price:.2f} USD"

    def _spent_since(self, before: Mapping[str, float]) -> str:
        cost = {name.removeprefix("judge_"): spent for name, spent in increase(before, self.usage()).items()}
        price = f", {cost['usd']:.2f} USD" if "usd" in cost else ""
        return (
            f"{cost['calls']} answers, {cost['failures']} failed attempts, {cost['prompt_tokens']} prompt and "
            f"{cost['completion_tokens']} completion tokens{price}"
        )
