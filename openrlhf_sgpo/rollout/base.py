"""Prompts in, sampled responses out: the interface of every rollout engine."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from openrlhf_sgpo import ray_session
from openrlhf_sgpo.config import Inference, RolloutSettings
from openrlhf_sgpo.data.records import Answer
from openrlhf_sgpo.data.tokens import ChatFormat

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import PolicyWeights


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. temperature: 0 always takes the likeliest token. top_p: nucleus sampling mass.
    max_new_tokens: length limit of a response. seed: determines, with the prompt's tokens, the samples. n: per prompt. share:
    b of the geometric mixture policy^(1 - b) reference^b that is sampled token by token, from logits (1 - b) policy +
    b reference (Munos et al., arXiv 2312.00886); 0 is the policy. log_probs: whether answers have those of their tokens, which
    vLLM's engines report."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    n: int = 1
    share: float = 0.0
    log_probs: bool = False


Value = TypeVar("Value")
Ask = Callable[[list[tuple[int, ...]], Sampling], list[list[Answer]]]


def sampling_of(
    settings: RolloutSettings, seed: int, n: int = 1, share: float = 0.0, log_probs: bool = False
) -> Sampling:
    """The sampling that the --rollout flags describe."""
    return Sampling(settings.temperature, settings.top_p, settings.max_new_tokens, seed, n, share, log_probs)


def engine_count(config: Inference, gpus: int) -> int:
    """``--vllm.num_engines``, by default all that so many GPUs can hold, and one without a GPU."""
    return config.vllm.num_engines or max(1, gpus // config.vllm.tensor_parallel_size)


def sleeping(config: Inference) -> bool:
    """Whether engines leave their GPU memory to the trainer while it trains. Those with GPUs of their own need not."""
    import torch

    apart = ray_session.placement is not None and ray_session.placement.apart
    return config.vllm.enable_sleep and torch.cuda.is_available() and not apart


class Stop:
    """Where a sampled response ends: at the template's end of turn, which training appends to responses, and at every
    end-of-sequence token of tokenizer and model.

    tokens: each of them ends a response. text: the end of turn if it has several tokens, since a model may split it differently
    than training does; otherwise empty.
    """

    def __init__(self, chat: ChatFormat):
        self.chat = chat
        self.tokens = set() if chat.tokenizer.eos_token_id is None else {chat.tokenizer.eos_token_id}
        self.text = ""
        if len(chat.end_of_turn) == 1:
            self.tokens.add(chat.end_of_turn[0])
        else:
            self.text = self._decode(chat.end_of_turn, special=True)

    def add_ends_of(self, folder: str, trust_remote_code: bool) -> None:
        """Add the end-of-sequence tokens of a model folder or hub name, from its generation settings or else its config."""
        from transformers import AutoConfig, GenerationConfig

        try:
            settings = GenerationConfig.from_pretrained(folder)
        except OSError:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            settings = GenerationConfig.from_model_config(config)
        ends = settings.eos_token_id
        self.tokens |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether the last tokens contain ``text``."""
        window = len(self.text.encode())  # no token stands for less than a byte
        return self.text in self._decode(ids[-window:], special=True)

    def sample(self, ids: Sequence[int], log_probs: Sequence[float] = ()) -> Answer:
        """The response in the tokens sampled by an engine, which may continue past its end. log_probs: of the tokens, if known.

        If the end of turn was sampled in other tokens than training uses, the response gets those of training, whose
        log-probabilities nobody knows.
        """
        answer = self._response(ids)
        sampled = tuple(ids[: answer.tokens]) == answer.token_ids
        return replace(answer, log_probs=tuple(log_probs[: answer.tokens])) if sampled else answer

    def _response(self, ids: Sequence[int]) -> Answer:
        end = next((index for index, token in enumerate(ids) if token in self.tokens), None)
        kept = tuple(ids if end is None else ids[:end])
        if self.text and self.text in (text := self._decode(kept, special=True)):
            sampled = kept[: bisect_left(range(len(kept)), True, key=lambda last: self._has_text(kept[: last + 1])) + 1]
            length = len(self.chat.end_of_turn)
            if sampled[-length:] == self.chat.end_of_turn:
                return Answer(self._decode(sampled[:-length]), False, sampled)
            text = text[: text.index(self.text)]
            return Answer(text, False, self.chat.response(text, False, len(text.encode()) + length))
        return Answer(self._decode(kept), end is None, tuple(ids if end is None else ids[: end + 1]))

    def _has_text(self, ids: Sequence[int]) -> bool:
        return self.text in self._decode(ids, special=True)

    def _decode(self, ids: Sequence[int], special: bool = False) -> str:
        text = self.chat.tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class Rollout(Protocol):
    """A rollout engine. Every method is collective: all ranks call it with the same arguments and get the same result."""

    def load(self, weights: str | PolicyWeights) -> None:
        """Take over the weights of a policy folder, or those of a model in the trainer's memory as they are now. The same
        folder or object again changes nothing."""

    def awake(self) -> AbstractContextManager[None]:
        """Within the block an engine that gives its memory to the trainer between uses keeps it."""

    def generate(self, prompts: list[tuple[int, ...]], sampling: Sampling, label: str) -> list[list[Answer]]:
        """``sampling.n`` samples per prompt, in the order of the prompts. With the same seed a prompt gets the same random
        numbers wherever it is in the list. label: text of the progress bar; empty for none."""

    def log_probs(self, sequences: list[tuple[int, ...]]) -> list[list[float]]:
        """Per sequence the log-probability of each token after the first, under the engine's weights."""

    def close(self) -> None:
        """Stop everything that the engine started."""


class BackgroundRollout(Rollout, Protocol):
    """An engine that can sample while the policy trains."""

    def begin(self, work: Callable[[Ask], Value]) -> Callable[[], Value]:
        """Start ``work`` in a thread of rank 0, where it asks the engine, which keeps its weights meanwhile. Returns a function
        that waits for the result."""


def prompt_seed(seed: int, prompt: tuple[int, ...]) -> int:
    """A 31-bit seed from the run's seed and the prompt's tokens."""
    digest = hashlib.sha256(repr((seed, prompt)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
