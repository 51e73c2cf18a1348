"""From messages to tokens, in one place, so that rollout, scoring and training see the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openrlhf_sgpo.data.records import Messages, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Group:
    """Token ids of one prompt and of responses to it. A pair is the group (prompt, [chosen, rejected])."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


class ChatFormat:
    """The tokenizer's chat template as prompt tokens and response tokens.

    A response is its text followed by the template's end of turn, unless the length limit cut it: a cut response with an
    end of turn would teach the model to stop in the middle of a sentence. Tokens that a template puts after the end of
    turn (a newline, say) are never generated and are left out.

    Raises ValueError if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_len: int):
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template: start from a supervised fine-tuned "
                "model, or save a template with the tokenizer"
            )
        self.tokenizer = tokenizer
        self.max_len = max_len
        opening: Messages = [{"role": "user", "content": "?"}]
        marker = "response"
        rendered = self._render(opening + [{"role": "assistant", "content": marker}], generation_prompt=False)
        ending = rendered[rendered.rindex(marker) + len(marker) :].strip()
        # Responses are tokenized behind what the template puts before them: alone, some tokenizers (SentencePiece's)
        # would begin each with a space that the policy never sampled.
        self._anchor = self._render(opening).removeprefix(self._render(opening, generation_prompt=False))
        self._anchor_ids = self._encode(self._anchor)
        self.end_of_turn: tuple[int, ...] = tuple(self._encode(ending)) or (tokenizer.eos_token_id,)

    def _render(self, messages: Messages, generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        assert isinstance(text, str)
        return text

    def _encode(self, text: str) -> list[int]:
        # The rendered text already contains the special tokens; adding them again would double the BOS.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, messages: Messages) -> tuple[int, ...]:
        return tuple(self._encode(self._render(messages)))

    def response(self, text: str, truncated: bool, room: int) -> tuple[int, ...]:
        """Tokens of a response, cut to ``room`` tokens."""
        both, length = self._encode(self._anchor + text), len(self._anchor_ids)
        ids = both[length:] if both[:length] == self._anchor_ids else self._encode(text)
        return (tuple(ids) + (() if truncated else self.end_of_turn))[:room]

    def fits(self, prompt: tuple[int, ...]) -> bool:
        """Whether at least two response tokens fit behind the prompt."""
        return len(prompt) <= self.max_len - 2

    def pair(self, pair: Pair) -> Group | None:
        """Tokens of a pair; None if the prompt is too long or the limit made both responses equal."""
        prompt = self.prompt(pair.prompt)
        if not self.fits(prompt):
            return None
        room = self.max_len - len(prompt)
        chosen = self.response(pair.chosen, pair.chosen_truncated, room)
        rejected = self.response(pair.rejected, pair.rejected_truncated, room)
        return None if chosen == rejected else Group(prompt, (chosen, rejected))
