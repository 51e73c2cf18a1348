"""Text in, sampled responses out: what every rollout engine offers."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from openrlhf_sgpo.config import RolloutSettings
    from openrlhf_sgpo.data.tokens import ChatFormat


@dataclass(frozen=True)
class Sample:
    """One sampled response. truncated: the length limit stopped it, not the model. token_ids: as they were drawn, with those
    that ended the response."""

    text: str
    truncated: bool
    token_ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def to_row(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "truncated": self.truncated,
            "tokens": self.tokens,
            "token_ids": list(self.token_ids),
        }


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. temperature: 0 draws the likeliest token each time. top_p: nucleus sampling mass.
    max_new_tokens: of the longest response. seed: decides, with a prompt's tokens, what is drawn for it. n: per prompt."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    n: int = 1


def sampling_of(settings: RolloutSettings, seed: int, n: int = 1) -> Sampling:
    """As --rollout says."""
    return Sampling(settings.temperature, settings.top_p, settings.max_new_tokens, seed, n)


class Stop:
    """Where a sampled response ends: at the template's end of turn, which training appends to responses, and at every
    end-of-sequence token of tokenizer and model.

    tokens: each of them ends a response. text: the end of turn where it has several tokens, which need not be drawn as training
    writes them; else empty.
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
        """Add the end-of-sequence tokens of a model folder or hub name: of its generation settings, or else of its config."""
        from transformers import AutoConfig, GenerationConfig

        try:
            settings = GenerationConfig.from_pretrained(folder)
        except OSError:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            settings = GenerationConfig.from_model_config(config)
        ends = settings.eos_token_id
        self.tokens |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether the last tokens complete ``text``."""
        window = len(self.text.encode())  # no token stands for less than a byte
        return self.text in self._decode(ids[-window:], special=True)

    def sample(self, ids: Sequence[int]) -> Sample:
        """The response in the tokens that an engine drew, which may go on behind its end.

        Where the end of turn was drawn in other tokens than training's, the response has training's.
        """
        end = next((place for place, token in enumerate(ids) if token in self.tokens), None)
        kept = tuple(ids if end is None else ids[:end])
        if self.text and self.text in (text := self._decode(kept, special=True)):
            drawn = kept[: bisect_left(range(len(kept)), True, key=lambda last: self._has_text(kept[: last + 1])) + 1]
            length = len(self.chat.end_of_turn)
            if drawn[-length:] == self.chat.end_of_turn:
                return Sample(self._decode(drawn[:-length]), False, drawn)
            text = text[: text.index(self.text)]
            return Sample(text, False, self.chat.response(text, False, len(text.encode()) + length))
        return Sample(self._decode(kept), end is None, tuple(ids if end is None else ids[: end + 1]))

    def _has_text(self, ids: Sequence[int]) -> bool:
        return self.text in self._decode(ids, special=True)

    def _decode(self, ids: Sequence[int], special: bool = False) -> str:
        text = self.chat.tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class Rollout(Protocol):
    """Every method is collective: all ranks call it with the same arguments and get the same result."""

    def load(self, folder: str) -> None:
        """Take over the weights in a policy folder, or in one with the weights alone of a model like the present one."""

    def generate(self, prompts: list[tuple[int, ...]], sampling: Sampling, label: str) -> list[list[Sample]]:
        """``sampling.n`` samples per prompt, in the order of the prompts; the same seed gives each prompt the same random
        numbers wherever in the list it stands. label: of the progress bar; empty for none."""

    def log_probs(self, sequences: list[tuple[int, ...]]) -> list[list[float]]:
        """Log-probability of each token after the first, per sequence, under the engine's own weights."""

    def close(self) -> None:
        """End what the engine started."""


def prompt_seed(seed: int, prompt: tuple[int, ...]) -> int:
    """A 31-bit seed from the run's seed and the prompt's tokens."""
    digest = hashlib.sha256(repr((seed, prompt)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
