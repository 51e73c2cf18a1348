"""From messages to tokens, in one place, so rollout, scoring and training see the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from openrlhf_sgpo.data.messages import digest
from openrlhf_sgpo.data.records import Messages, Pair
from openrlhf_sgpo.data.template import NONE, Template, TemplateError, open_thought, today

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Group:
    """Token ids of a prompt and of responses to it. A pair is the group (prompt, [chosen, rejected])."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


class PairTokens(NamedTuple):
    """Token ids of a pair before any limit: the rendered prompt and the response texts, without an end of turn."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], tuple[int, ...]]


def load_tokenizer(model: str, trust_remote_code: bool, flag: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name. Raises ValueError, naming the flag, if it cannot be loaded."""
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, model, trust_remote_code, flag)


def _loaded(kind: Any, model: str, trust_remote_code: bool, flag: str) -> Any:
    try:
        return kind.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--{flag} {model} cannot be loaded ({reason}); give a Hugging Face folder with config and tokenizer, or a hub name"
        ) from error


def load_chat(
    model: str,
    trust_remote_code: bool,
    flag: str,
    max_len: int,
    template_kwargs: Mapping[str, Any] = NONE,
    moment: datetime | None = None,
    length_flag: str = "data.max_len",
) -> tuple[ChatFormat, PretrainedConfig]:
    """The chat format of a model, with a padding token, and the model's config. Loads no weights.

    template_kwargs, moment: as in ``ChatFormat``. Raises ValueError, naming the flag, as ``load_tokenizer`` and ``ChatFormat``
    do, if ``max_len`` exceeds the model's positions, and if tokenizer and model do not match.
    """
    from transformers import AutoConfig

    tokenizer = load_tokenizer(model, trust_remote_code, flag)
    settings = _loaded(AutoConfig, model, trust_remote_code, flag)
    longest = getattr(settings.get_text_config(), "max_position_embeddings", None) or max_len
    if max_len > longest:
        raise ValueError(f"--{length_flag} {max_len} exceeds the {longest} positions of --{flag} {model}; lower it")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"--{flag} {model}: the tokenizer has neither a padding token nor an end-of-sequence token, so batches "
                "cannot be padded; save it with one of the two"
            )
        tokenizer.pad_token = tokenizer.eos_token
    try:
        chat = ChatFormat(tokenizer, max_len, template_kwargs, moment)
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error
    chat.check_embeddings(settings, f"--{flag} {model}")
    return chat, settings


class ChatFormat:
    """Renders conversations with the tokenizer's chat template, and tokenizes prompts and responses.

    A response is its text followed by the template's end of turn, unless the length limit cut it: a cut response with an
    end of turn would teach the model to stop mid-sentence. Tokens that a template puts after the end of turn (such as a
    newline) are never generated and are left out.

    template_kwargs: template variables for every conversation; those of a conversation are added. moment: the time that the
    template sees (default: midnight UTC of today).
    Raises ValueError as ``Template`` does, and if neither template nor tokenizer has an end of turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_len: int,
        template_kwargs: Mapping[str, Any] = NONE,
        moment: datetime | None = None,
    ):
        from transformers import PreTrainedTokenizerFast

        self.template = Template(tokenizer, template_kwargs, moment or today())
        self.tokenizer = tokenizer
        # Some models' tokenizers have methods of their own, which do more than their part in Rust.
        encoding = ("__call__", "_encode_plus")
        self._in_rust = isinstance(tokenizer, PreTrainedTokenizerFast) and all(
            getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerFast, name) for name in encoding
        )
        self.max_len = max_len
        self.model = ""
        # One shared int object per vocabulary entry: the tokens of 60,000 pairs would otherwise take gigabytes.
        self._ids = list(range(1 + max(tokenizer.get_vocab().values())))
        # Inspection, rollout, oracle and training ask for the same prompts.
        self._prompts: dict[bytes, tuple[int, ...]] = {}
        # Responses are tokenized after the text that the template puts before them: alone, some tokenizers (SentencePiece)
        # would start each with a space that the policy never sampled.
        self._anchor = self.template.opening
        self._anchor_ids = self._encode(self._anchor)
        self.end_of_turn: tuple[int, ...] = self._encode(self.template.ending)
        if not self.end_of_turn:
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token, and its chat template "
                    "puts nothing after a response: a model could not learn to stop; save one of the two"
                )
            self.end_of_turn = (tokenizer.eos_token_id,)

    def check_embeddings(self, settings: PretrainedConfig, model: str) -> None:
        """Makes later tokens without an embedding raise ValueError. settings: the model's config; model: its flag and name.

        Raises ValueError at once if a padding, end or template token has no embedding.
        """
        size = getattr(settings.get_text_config(), "vocab_size", None)
        if not isinstance(size, int) or size >= len(self._ids):
            return
        self._ids, self.model = self._ids[:size], model
        self._prompts.clear()
        tokenizer = self.tokenizer
        for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, *self.end_of_turn):
            if token is not None and token >= size:
                raise self._no_embedding(token)
        self.prompt([{"role": "user", "content": "question"}])

    def _no_embedding(self, token: int, text: str = "") -> ValueError:
        where = f", in the text {text[:60]!r}" if text else ""
        return ValueError(
            f"token id {token} ({self.tokenizer.convert_ids_to_tokens(token)}) of the tokenizer of "
            f"{self.tokenizer.name_or_path} is beyond the {len(self._ids)} embeddings of {self.model}{where}: save the model "
            "with embeddings for its whole tokenizer (model.resize_token_embeddings), or the tokenizer without that token"
        )

    def _encode_all(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        # Rendered text already contains the special tokens; adding them again would double the BOS.
        rows = self._token_ids(list(texts)) if texts else []
        try:
            return [tuple(map(self._ids.__getitem__, row)) for row in rows]
        except IndexError:
            number, token = next(
                (number, token) for number, row in enumerate(rows) for token in row if token >= len(self._ids)
            )
            raise self._no_embedding(token, texts[number]) from None

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        """What the tokenizer returns for texts. Asked directly, its part in Rust makes neither masks nor offsets."""
        if not self._in_rust:
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # which its file may ask for, and a call of the tokenizer switches off
        backend.no_padding()
        encode = partial(backend.encode_batch_fast, texts, add_special_tokens=False)
        if len(texts) == 1:
            return [encode()[0].ids]
        # A thread has a heap of its own. In the heap of a run, Rust's many small allocations take twice as long.
        with ThreadPoolExecutor(1) as thread:
            return [encoding.ids for encoding in thread.submit(encode).result()]

    def _encode(self, text: str) -> tuple[int, ...]:
        return self._encode_all([text])[0]

    def _encode_responses(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        length = len(self._anchor_ids)
        encoded = iter(self._encode_all([self._anchor + text for text in texts if text]))
        rows = [(next(encoded), text) if text else (self._anchor_ids, "") for text in texts]
        return [both[length:] if both[:length] == self._anchor_ids else self._encode(text) for both, text in rows]

    def _end(self, ids: tuple[int, ...], truncated: bool, room: int) -> tuple[int, ...]:
        """Response tokens cut to ``room``: with the whole end of turn or, if anything was cut, without it."""
        length = len(self.end_of_turn)
        if not truncated and len(ids) + length <= room:
            return ids + self.end_of_turn
        ids = ids[:room]
        # The text itself may contain the end of turn, and the cut may fall right after it.
        while ids[-length:] == self.end_of_turn:
            ids = ids[:-length]
        return ids

    def prompt(
        self, messages: Messages, template_kwargs: Mapping[str, Any] = NONE, complete: bool = True
    ) -> tuple[int, ...]:
        """Tokens of a prompt. template_kwargs: template variables for this prompt, as in ``Prompt``.

        Raises ValueError if the template fails and, if ``complete``, if it drops a part of the prompt. (Some templates drop
        the reasoning of earlier turns on purpose.)
        """
        if not complete:
            return self._encode(self.template.render(messages, template_kwargs))
        key = digest(messages, dict(template_kwargs))
        if key not in self._prompts:
            self._prompts[key] = self._encode(self.template.prompt(messages, template_kwargs))
        return self._prompts[key]

    def prompts(
        self, conversations: Sequence[Messages], template_kwargs: Sequence[Mapping[str, Any]] = ()
    ) -> list[tuple[int, ...] | None]:
        """Tokens of a batch of prompts; None where the template fails on the conversation (on its order of roles, say).

        template_kwargs: one mapping per conversation, or empty. Raises ValueError if the template drops a part of one.
        """
        arguments = template_kwargs or [NONE] * len(conversations)
        keys = [digest(messages, dict(variables)) for messages, variables in zip(conversations, arguments, strict=True)]
        rendered: dict[bytes, str] = {}
        for key, messages, variables in zip(keys, conversations, arguments, strict=True):
            if key not in self._prompts and key not in rendered:
                with suppress(TemplateError):
                    rendered[key] = self.template.prompt(messages, variables)
        self._prompts.update(zip(rendered, self._encode_all(list(rendered.values())), strict=True))
        return [self._prompts.get(key) for key in keys]

    def refusal(self, messages: Messages, template_kwargs: Mapping[str, Any] = NONE) -> str:
        """Why the template fails on a conversation, after the tokenizer's name; empty if it does not fail."""
        try:
            self.template.render(messages, template_kwargs)
        except TemplateError as error:
            return f"{self.tokenizer.name_or_path}: {error.reason}"
        return ""

    def open_thought(self, prompt: Sequence[int]) -> str:
        """The tag that closes the thought opened at the end of the prompt; empty if none is open."""
        return open_thought(str(self.tokenizer.decode(list(prompt[-16:]))))

    def response(self, text: str, truncated: bool, room: int) -> tuple[int, ...]:
        """Tokens of a response, cut to ``room`` tokens."""
        return self._end(self._encode_responses([text])[0], truncated, room)

    def fits(self, prompt: tuple[int, ...]) -> bool:
        """Whether at least two response tokens fit after the prompt."""
        return len(prompt) <= self.max_len - 2

    def encode(self, pairs: Sequence[Pair]) -> list[PairTokens | None]:
        """Tokens of a batch of pairs; None where the template fails on the prompt. Sampled responses keep their own tokens."""
        prompts = self.prompts([pair.prompt for pair in pairs], [pair.template_kwargs for pair in pairs])
        chosen = self._encode_responses(["" if pair.chosen_token_ids else pair.chosen for pair in pairs])
        rejected = self._encode_responses(["" if pair.rejected_token_ids else pair.rejected for pair in pairs])
        rows = zip(prompts, zip(chosen, rejected, strict=True), strict=True)
        return [None if prompt is None else PairTokens(prompt, responses) for prompt, responses in rows]

    def group(self, pair: Pair, tokens: PairTokens) -> Group | None:
        """The pair cut to the limit; None if the prompt is too long, or if the cut makes responses equal or one empty."""
        if not self.fits(tokens.prompt):
            return None
        room = self.max_len - len(tokens.prompt)
        chosen = pair.chosen_token_ids[:room] or self._end(tokens.responses[0], pair.chosen_truncated, room)
        rejected = pair.rejected_token_ids[:room] or self._end(tokens.responses[1], pair.rejected_truncated, room)
        return Group(tokens.prompt, (chosen, rejected)) if chosen and rejected and chosen != rejected else None

    def pair(self, pair: Pair) -> Group | None:
        """Tokens of a pair; None as in ``group``, or if the template fails on the prompt."""
        (tokens,) = self.encode([pair])
        return None if tokens is None else self.group(pair, tokens)
