"""The conversation: questions in, answers of every speaker out as they are sampled."""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from openrlhf_sgpo.chat.columns import Columns
from openrlhf_sgpo.chat.settings import ChatSettings, Speakers
from openrlhf_sgpo.config import ModelSettings
from openrlhf_sgpo.data.records import Answer, Messages, Prompt
from openrlhf_sgpo.data.template import template_arguments
from openrlhf_sgpo.data.tokens import load_chat
from openrlhf_sgpo.rollout import sampling_of
from openrlhf_sgpo.rollout.base import Stop
from openrlhf_sgpo.rollout.hf import HuggingFaceRollout
from openrlhf_sgpo.rollout.roles import follower_context
from openrlhf_sgpo.run_folder import STORED, RunFolder

QUESTION = "> "
NEW = "/new"
REDRAWN = 0.05  # seconds


@dataclass
class Speaker:
    """A model with the conversation as it has gone with this model. messages: with its own answers."""

    title: str
    rollout: HuggingFaceRollout
    messages: Messages = field(default_factory=list)


class Writing(BaseStreamer, StoppingCriteria):
    """An answer as it is sampled. text: so far. It ends early once ``stopped`` is set."""

    def __init__(self, stop: Stop, stopped: threading.Event):
        self.text = ""
        self._stop = stop
        self._stopped = stopped
        self._ids: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        if self._ids is None:  # the prompt comes first
            self._ids = []
            return
        self._ids += value.tolist()
        # The last character may still lack some of its bytes.
        self.text = self._stop.sample(self._ids).text.rstrip("\ufffd")

    def end(self) -> None:
        pass

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stopped.is_set(), device=input_ids.device)


class Conversation:
    """Loads the models. Raises ValueError for all that the user can mend."""

    def __init__(self, settings: ChatSettings, speakers: Speakers):
        transformers_logging.set_verbosity_error()  # advice on generation settings would stand between the answers
        folder, trust = speakers.policy.folder, settings.trust_remote_code
        if speakers.whole_context:
            model = AutoConfig.from_pretrained(folder, trust_remote_code=trust).get_text_config()
            settings.data.max_len = getattr(model, "max_position_embeddings", None) or settings.data.max_len
        self.config = settings.inference(ModelSettings(folder, trust_remote_code=trust))
        run = RunFolder(settings.model)
        self.chat, _ = load_chat(
            *(folder, trust, "model", settings.data.max_len),
            template_arguments(settings.data.chat_template_kwargs),
            run.moment() if (run.path / STORED).exists() else None,
        )
        title = "leader" if speakers.instruction else speakers.policy.name
        policy = Speaker(title, HuggingFaceRollout(self.config, self.chat, folder))
        start = [Speaker("start", HuggingFaceRollout(self.config, self.chat, speakers.start))] if speakers.start else []
        self.speakers, self.policy = [*start, policy], policy
        self.instruction = speakers.instruction
        self.follower: Speaker | None = None
        if self.instruction:
            shared = speakers.policy.follower == folder
            rollout = policy.rollout if shared else HuggingFaceRollout(self.config, self.chat, speakers.policy.follower)
            self.follower = Speaker("follower, which has read the leader's answer", rollout)

    def run(self, prompt: str) -> None:
        """Answer the prompt, or without one every question until the input ends."""
        for question in [prompt] if prompt else questions():
            if question.strip() == NEW:
                for speaker in self.speakers:
                    speaker.messages.clear()
            elif question.strip():
                self.ask(question)

    def ask(self, question: str) -> None:
        """Print everybody's answer, and keep it for the next question."""
        asked: Messages = [{"role": "user", "content": question}]
        contexts = [self.chat.prompt([*speaker.messages, *asked], complete=False) for speaker in self.speakers]
        if (longest := max(map(len, contexts))) >= self.config.data.max_len:
            print(
                f"The conversation has {longest} tokens, and --data.max_len {self.config.data.max_len} leaves no room for an "
                f"answer. {NEW} begins another one.",
                flush=True,
            )
            return
        answers = self._sample(self.speakers, contexts)
        if self.follower:
            draft, new = answers[-1], self.config.rollout.max_new_tokens
            prompt = Prompt("", [*self.policy.messages, *asked])
            room = self.config.data.max_len - min(new, self.config.data.max_len // 2)
            context, _ = follower_context(self.chat, prompt, draft, self.instruction, room)
            self._sample([self.follower], [context])
        for speaker, answer in zip(self.speakers, answers, strict=True):
            speaker.messages += [*asked, {"role": "assistant", "content": answer.text}]

    def _sample(self, speakers: Sequence[Speaker], contexts: Sequence[tuple[int, ...]]) -> list[Answer]:
        """Everybody's answer to the own context, all at once, printed as they grow."""
        stopped = threading.Event()
        writings = [Writing(speaker.rollout.stop, stopped) for speaker in speakers]
        sampling = sampling_of(self.config.rollout, secrets.randbits(31))
        columns = Columns([speaker.title for speaker in speakers])
        with ThreadPoolExecutor(len(speakers)) as pool:
            try:
                sampled = [
                    pool.submit(speaker.rollout.stream, context, sampling, writing, writing)
                    for speaker, context, writing in zip(speakers, contexts, writings, strict=True)
                ]
                while not all(whole := [future.done() for future in sampled]):
                    columns.show([writing.text for writing in writings], whole)
                    wait(sampled, REDRAWN, FIRST_EXCEPTION)
                    if any(future.exception() for future in sampled if future.done()):
                        stopped.set()
            finally:  # Ctrl-C too: a thread ends with the token that it is at
                stopped.set()
            answers = [future.result() for future in sampled]
        columns.show([answer.text for answer in answers], whole)
        return answers


def questions() -> Iterator[str]:
    """Lines of the standard input until it ends; a terminal is asked for each."""
    if not sys.stdin.isatty():
        # What is not UTF-8 arrives as halves of surrogate pairs, which no tokenizer takes.
        yield from (
            line.rstrip("\n").encode("utf-8", "surrogateescape").decode("utf-8", "replace") for line in sys.stdin
        )
        return
    import readline  # noqa: F401 - arrow keys in ``input``

    print(f"Ask, {NEW} to begin another conversation, Ctrl-D to end.", flush=True)
    while True:
        try:
            yield input(QUESTION)
        except EOFError:
            print()
            return
