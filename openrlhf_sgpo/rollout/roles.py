"""Roles in a play: the policy, the reference, a mixture of both, or the follower, which sees the play's first answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from time import perf_counter
from typing import Any, cast

from openrlhf_sgpo.algorithms import Algorithm
from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Role
from openrlhf_sgpo.config import Config, RolloutSettings
from openrlhf_sgpo.data.records import Answer, Messages, Prompt
from openrlhf_sgpo.data.tokens import ChatFormat
from openrlhf_sgpo.ledger import Stopwatch
from openrlhf_sgpo.openrlhf.weights import PolicyWeights
from openrlhf_sgpo.rollout.base import Ask, BackgroundRollout, Rollout, Sampling, prompt_seed, sampling_of

Tokens = tuple[int, ...]
Answers = list[list[tuple[Tokens, Answer]]]  # to each prompt, with their contexts


def follower_messages(prompt: Messages, draft: str, instruction: str) -> Messages:
    """The follower's context (Pasztor et al., arXiv 2512.16626): prompt, draft, and an instruction. Earlier drafts are left
    out, so it does not grow when drafts are refined repeatedly."""
    return [*prompt, {"role": "assistant", "content": draft.strip()}, {"role": "user", "content": instruction}]


def follower_context(
    chat: ChatFormat, prompt: Prompt, draft: Answer, instruction: str, longest: int
) -> tuple[Tokens, bool]:
    """Tokens of the follower's context, and whether the end of the draft was cut off because it would exceed ``longest``.

    Raises ValueError if prompt and instruction alone are longer.
    """
    text, cut, ids = draft.text, False, chat.response(draft.text, True, len(draft.text.encode()))

    def rendered(text: str) -> Tokens:
        return chat.prompt(
            follower_messages(prompt.messages, text, instruction), prompt.template_kwargs, complete=False
        )

    while len(context := rendered(text)) > longest:
        if not ids:
            raise ValueError(
                f"the follower's prompt and instruction have {len(context)} tokens, but {longest} fit: raise --data.max_len"
            )
        ids = ids[: len(ids) - (len(context) - longest)] if len(ids) > len(context) - longest else ()
        text, cut = chat.tokenizer.decode(ids, skip_special_tokens=True), True
    return context, cut


def follower_room(chat: ChatFormat, instruction: str, max_new_tokens: int) -> int:
    """Tokens that a prompt must leave for draft, instruction and the follower's answer. Raises ValueError if the chat template
    does not allow a second question."""
    question: Messages = [{"role": "user", "content": "?"}]
    (revision,) = chat.prompts([follower_messages(question, "", instruction)])
    if revision is None:
        raise ValueError(
            f"the chat template of {chat.tokenizer.name_or_path} refuses a question, an answer and a second question, which a "
            "follower sees: use a model for more than one turn"
        )
    return len(revision) - len(chat.prompt(question)) + 2 * max_new_tokens


def prompt_room(algorithm: type[Algorithm[Any]], options: Any, config: Config, chat: ChatFormat) -> int:
    """Tokens that a prompt must leave for everything that is sampled after it in a run of this algorithm."""
    room, made = config.rollout.max_new_tokens, algorithm(options, config.model.beta)
    return follower_room(chat, made.follower_prompt, room) if "follower" in made.roles else room


class Roles:
    """Samples the answers of plays. engine: has the reference if a role has a share of it. weights: of each role's policy,
    taken over before it answers. longest: of an answer's context, in tokens. clock: times that as ``sync``."""

    def __init__(
        self,
        algorithm: PlayAlgorithm,
        chat: ChatFormat,
        engine: Rollout,
        weights: Mapping[Role, str | PolicyWeights],
        longest: int,
        settings: RolloutSettings,
        clock: Stopwatch,
    ):
        self.runs = [(role, len(list(run))) for role, run in groupby(algorithm.roles)]
        self.instruction = algorithm.follower_prompt
        self.chat = chat
        self.engine = engine
        self.shares = algorithm.shares
        self.weights = weights
        self.settings = settings
        self.longest = longest
        self.clock = clock

    def answer(self, prompts: Sequence[Prompt], tokens: Sequence[Tokens], seed: int) -> Answers:
        """Answers to each prompt with their contexts, in the order of the roles. tokens: of the prompts. Collective."""

        def draw(role: Role, contexts: list[Tokens], sampling: Sampling) -> list[list[Answer]]:
            with self.clock("sync"):
                self.engine.load(self.weights[role])  # does nothing if it has these weights
            return self.engine.generate(contexts, sampling, "")

        with self.engine.awake():
            return self._answer(prompts, tokens, seed, draw)

    def begin(
        self, prompts: Sequence[Prompt], tokens: Sequence[Tokens], seed: int
    ) -> Callable[[], tuple[Answers, tuple[float, float]]]:
        """The same beside the caller, by vLLM's engines with the weights that the roles have now, which are the same ones. The
        function that is returned waits for the answers, and tells from when to when engines were at work. Both are
        collective."""
        engine = cast(BackgroundRollout, self.engine)
        with self.clock("sync"):
            engine.load(self.weights[self.runs[0][0]])

        def work(ask: Ask) -> tuple[Answers, tuple[float, float]]:
            start = perf_counter()
            answers = self._answer(prompts, tokens, seed, lambda _, contexts, sampling: ask(contexts, sampling))
            return answers, (start, perf_counter())

        return engine.begin(work)

    def _answer(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Tokens],
        seed: int,
        draw: Callable[[Role, list[Tokens], Sampling], list[list[Answer]]],
    ) -> Answers:
        answers: Answers = [[] for _ in prompts]
        for number, (role, count) in enumerate(self.runs):
            contexts = list(tokens)
            if role == "follower":
                contexts = [
                    follower_context(self.chat, prompt, play[0][1], self.instruction, self.longest)[0]
                    for prompt, play in zip(prompts, answers, strict=True)
                ]
            share = self.shares.get(role, 0.0)
            sampling = sampling_of(self.settings, prompt_seed(seed, (number,)), count, share, log_probs=True)
            for play, context, samples in zip(answers, contexts, draw(role, contexts, sampling), strict=True):
                play += [(context, sample) for sample in samples]
        return answers
