"""A tokenizer's chat template: the arguments it gets, and checks that it renders all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from openrlhf_sgpo import yaml_files
from openrlhf_sgpo.data.messages import NOT_FOR_TEMPLATES, Messages, common_prefix_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE: Mapping[str, Any] = MappingProxyType({})
FLAG = "data.chat_template_kwargs"
# Fields of a message that only link messages, without content.
_LINKS = ("role", "tool_call_id")
_MARKER = "another text"
_THOUGHT = r"[<\[]((?:\w*think\w*)|thought|reasoning)[>\]]"
_OPEN_THOUGHT = re.compile(_THOUGHT + r"\s*$", re.IGNORECASE)
_EMPTY_THOUGHT = re.compile(_THOUGHT + r"\s*[<\[]/\1[>\]]", re.IGNORECASE)


class TemplateError(ValueError):
    """A chat template fails on a conversation. reason: the template's own message."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def template_arguments(items: Sequence[str]) -> dict[str, Any]:
    """Variables for chat templates from items of the form NAME=VALUE or a JSON object. Raises ValueError.

    Values are read as YAML, so ``false`` is a boolean.
    """
    arguments: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        try:
            value = yaml_files.load_text(item if item.lstrip().startswith("{") else text)
        except ValueError as error:
            raise ValueError(f"--{FLAG}: {item[:80]!r} cannot be read ({error}); write NAME=VALUE") from error
        if item.lstrip().startswith("{"):
            variables = value
        else:
            variables = {name.strip(): value if isinstance(value, (bool, int, float, list, dict)) else text}
        named = isinstance(variables, dict) and all(isinstance(key, str) and key.isidentifier() for key in variables)
        if not named or not (equals or variables is value):
            raise ValueError(f"--{FLAG}: {item!r} is not NAME=VALUE, such as enable_thinking=false")
        if taken := sorted(variables.keys() & NOT_FOR_TEMPLATES):
            raise ValueError(f"--{FLAG}: {', '.join(taken)} cannot be set; the run passes it to chat templates itself")
        arguments |= variables
    return arguments


def argument_problems(items: Sequence[str]) -> list[str]:
    """The problem of items that ``template_arguments`` refuses."""
    try:
        template_arguments(items)
    except ValueError as error:
        return [str(error)]
    return []


def today() -> datetime:
    """Midnight (UTC) of the current day, without a time zone."""
    return datetime.now(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)


def open_thought(prompt: str) -> str:
    """The tag that closes the thought opened at the end of a rendered prompt, such as ``</think>``; empty if none is open."""
    match = _OPEN_THOUGHT.search(prompt)
    return f"{match[0].rstrip()[0]}/{match[0].rstrip()[1:]}" if match else ""


class Template:
    """A tokenizer's chat template with the variables of a run.

    arguments: variables for every conversation. moment: the time that ``strftime_now`` gives to templates, whenever called.
    opening, ending: what it puts before and after the assistant's text, the generation prompt and the end of turn.
    Raises ValueError, naming the tokenizer, if it has no template, or if the template fails, drops the content of messages, or
    has a generation prompt that lacks the header of the assistant's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], moment: datetime):
        self.tokenizer = tokenizer
        self.arguments = dict(arguments)
        self.moment = moment
        self.name = f"the chat template of the tokenizer {tokenizer.name_or_path}"
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template: start from a supervised fine-tuned "
                "model, or save a template with the tokenizer"
            )
        self.reads_clock = self.reads("strftime_now")
        self.opening, self.ending = self._turn()

    def reads(self, variable: str) -> bool:
        """Whether the template's text mentions the variable."""
        return re.search(rf"\b{re.escape(variable)}\b", str(self.tokenizer.chat_template)) is not None

    def unread(self) -> list[str]:
        """The ``arguments`` that the template does not read."""
        return [name for name in self.arguments if not self.reads(name)]

    def render(self, messages: Messages, arguments: Mapping[str, Any] = NONE, generation_prompt: bool = True) -> str:
        """The text of a conversation. arguments: its own variables. Raises TemplateError if the template fails."""
        variables: dict[str, Any] = {**self.arguments, **arguments, "strftime_now": self.moment.strftime}
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt, **variables
            )
        except Exception as error:  # a template is a program and may fail in any way
            roles = ", ".join(message["role"] for message in messages)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TemplateError(f"{self.name} fails on a conversation of {roles} ({reason})", reason) from error
        assert isinstance(text, str)
        return text

    def prompt(self, messages: Messages, arguments: Mapping[str, Any] = NONE) -> str:
        """The text of a prompt up to its response. Raises TemplateError, and ValueError if part of it would be lost."""
        text = self.render(messages, arguments)
        if dropped := self._dropped(messages, arguments, text):
            raise ValueError(
                f"{self.name} does not render {dropped} (in the conversation that begins {messages[0]['content'][:40]!r}); "
                "use a model whose template renders it, or remove it from the data"
            )
        return text

    def _dropped(self, messages: Messages, arguments: Mapping[str, Any], text: str) -> str:
        """The part of the conversation that its rendering ``text`` lacks: changing or removing it leaves the text unchanged."""

        def same(changed: Messages, variables: Mapping[str, Any] = arguments) -> bool:
            try:
                return self.render(changed, variables) == text
            except TemplateError:
                return False

        for place, message in enumerate(messages):
            for field, value in message.items():
                if field in _LINKS or not value or (field == "content" and value.strip() in text):
                    continue
                changed = {name: part for name, part in message.items() if name != field}
                changed |= {"content": _MARKER} if field == "content" else {}
                if same([*messages[:place], changed, *messages[place + 1 :]]):
                    return f"the field {field!r} of a message with the role {message['role']!r}"
        for name in arguments:
            if name != "tools" and not self.reads(name):
                return f"the column 'chat_template_kwargs' with {name!r}"
        if arguments.get("tools") and same(messages, {k: v for k, v in arguments.items() if k != "tools"}):
            return "the column 'tools'"
        return ""

    def _turn(self) -> tuple[str, str]:
        question: Messages = [{"role": "user", "content": "question"}]
        prompt = self.render(question)
        whole = self.render([*question, {"role": "assistant", "content": "response"}], generation_prompt=False)
        for text, content, role in ((prompt, "question", "user"), (whole, "response", "assistant")):
            if content not in text:
                raise ValueError(
                    f"{self.name} does not render {role} messages whose content is text (it may expect a list of "
                    "parts); save a template that writes text as it is with the tokenizer"
                )
        header, _, ending = whole.rpartition("response")
        asked = self.render(question, generation_prompt=False)
        missing = _EMPTY_THOUGHT.sub("", header[common_prefix_length(prompt, header) :]).strip()
        if missing and (prompt.rstrip() == asked.rstrip() or header.startswith(prompt)):
            raise ValueError(
                f"{self.name} writes {missing!r} before an answer, but not with add_generation_prompt: prompts would end "
                "too early, and the model would answer without it; add it to the template's generation prompt"
            )
        return prompt.removeprefix(asked), ending.strip()


def refuse_unread_variables(templates: Sequence[Template]) -> None:
    """Raises ValueError for a variable of --data.chat_template_kwargs that none of the templates reads."""
    unread = [set(template.unread()) for template in templates]
    if unread and (names := sorted(set.intersection(*unread))):
        raise ValueError(
            f"--{FLAG}: {', '.join(names)} is not read by {', '.join(template.name for template in templates)}; leave it out"
        )
