"""All data of a run: read before anything expensive, inspected once the tokenizer is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.files import TEST_SPLITS, DataError
from openrlhf_sgpo.data.inspection import InspectedPairs, InspectedPrompts, inspect_pairs, inspect_prompts, prompt_key
from openrlhf_sgpo.data.records import Pair, Prompt, Records, load_pairs, load_prompts
from openrlhf_sgpo.data.report import DataReport
from openrlhf_sgpo.data.template import refuse_unread_variables, template_arguments
from openrlhf_sgpo.data.tokens import ChatFormat, load_chat

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class RunRecords:
    """The records of --data.dataset, --eval.dataset and --data.prompt_dataset; empty where a flag is not set.
    held_out: all of them; at most --eval.max_samples are evaluated, but none may be trained on."""

    human: Records[Pair]
    held_out: Records[Pair]
    prompts: Records[Prompt]


@dataclass(frozen=True)
class RunData:
    """The data that a run uses, with tokens and reports. held_out_prompts: ``prompt_key`` of all held-out prompts."""

    human: InspectedPairs
    held_out: InspectedPairs
    prompts: InspectedPrompts
    held_out_prompts: frozenset[bytes]

    @property
    def reports(self) -> list[DataReport]:
        return [data.report for data in (self.human, self.held_out, self.prompts) if data.report.rows]


def load_policy_chat(config: Config, moment: datetime | None = None) -> tuple[ChatFormat, PretrainedConfig]:
    """The chat format and config of the initial policy. moment: as in ``ChatFormat``.

    Raises ValueError as ``load_chat`` does, if the reference lacks embeddings for the policy's tokens, and for variables in
    --data.chat_template_kwargs that the template does not read.
    """
    from transformers import AutoConfig

    name, trust = config.model.model_name_or_path, config.model.trust_remote_code
    reference = config.ref.model_name_or_path
    variables = template_arguments(config.data.chat_template_kwargs)
    chat, settings = load_chat(name, trust, "model.model_name_or_path", config.data.max_len, variables, moment)
    refuse_unread_variables([chat.template])
    if reference and reference != name:
        reference_settings = AutoConfig.from_pretrained(reference, trust_remote_code=trust)
        chat.check_embeddings(reference_settings, f"--ref.model_name_or_path {reference}")
    return chat, settings


def load_run(config: Config, with_prompts: bool) -> RunRecords:
    """Reads all three sources. with_prompts: whether the run samples. Raises DataError with all unusable rows at once."""
    data, held_out, errors = config.data, config.eval, []

    def attempt(load: Callable[..., Records[Any]], source: str, *arguments: Any, **options: Any) -> Records[Any]:
        try:
            return load(source, *arguments, **options) if source else Records()
        except DataError as error:
            errors.append(error)
            return Records()

    records = RunRecords(
        attempt(load_pairs, data.dataset, data.dataset_split, data.max_samples),
        attempt(load_pairs, held_out.dataset, held_out.split, splits=TEST_SPLITS),
        attempt(load_prompts, data.prompt_dataset if with_prompts else "", data.prompt_split),
    )
    if errors:
        raise DataError("\n".join(map(str, errors)), [problem for error in errors for problem in error.problems])
    return records


def inspect_run(records: RunRecords, chat: ChatFormat, config: Config, room: int) -> RunData:
    """Inspects all three, tokenizing each text once; ``report.require`` then raises for exceeded limits.

    room: tokens that a prompt must leave for responses.
    """
    limits = config.data.limits
    questions = [pair.prompt for pair in records.held_out] if records.held_out else None
    evaluated = Records(records.held_out[: config.eval.max_samples or None], records.held_out.left_out)
    held_out = inspect_pairs(evaluated, chat, limits, name=f"--eval.dataset {config.eval.dataset}", trained_on=False)
    human = inspect_pairs(records.human, chat, limits, name=f"--data.dataset {config.data.dataset}", held_out=questions)
    prompts = inspect_prompts(
        records.prompts,
        chat,
        limits,
        name=f"--data.prompt_dataset {config.data.prompt_dataset}",
        room=room,
        held_out=questions,
    )
    return RunData(human, held_out, prompts, frozenset(map(prompt_key, questions or [])))
