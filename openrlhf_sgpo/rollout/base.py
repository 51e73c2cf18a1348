"""Text in, sampled responses out: what every rollout engine offers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Sample:
    """One sampled response. truncated: the length limit stopped it, not the model. token_ids: as they were drawn, with the
    one that ended the response."""

    text: str
    truncated: bool
    token_ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def to_row(self) -> dict[str, Any]:
        return {"text": self.text, "truncated": self.truncated, "tokens": self.tokens}


class Rollout(Protocol):
    """Every method is collective: all ranks call it with the same arguments and get the same result."""

    def load(self, folder: str) -> None:
        """Take over the weights in a policy folder, or in one with the weights alone of a model like the present one."""

    def generate(self, prompts: list[tuple[int, ...]], n: int, seed: int, label: str) -> list[list[Sample]]:
        """n samples per prompt, in the order of the prompts; the same seed gives each prompt the same random numbers
        wherever in the list it stands. label: of the progress bar; empty for none."""

    def log_probs(self, sequences: list[tuple[int, ...]]) -> list[list[float]]:
        """Log-probability of each token after the first, per sequence, under the engine's own weights."""

    def close(self) -> None:
        """End what the engine started."""


def prompt_seed(seed: int, prompt: tuple[int, ...]) -> int:
    """A 31-bit seed from the run's seed and the prompt's tokens."""
    digest = hashlib.sha256(repr((seed, prompt)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
