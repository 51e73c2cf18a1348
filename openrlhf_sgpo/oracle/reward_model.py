"""An OpenRLHF reward model as preference oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.data.records import Messages, Prompt
from openrlhf_sgpo.data.template import template_arguments
from openrlhf_sgpo.data.tokens import ChatFormat, Group, load_chat
from openrlhf_sgpo.oracle.base import Question, Resources, RewardOracle

FLAG = "reward.model_name_or_path"


def weight_names(folder: str) -> set[str]:
    """The names of the weights in a folder; empty for a hub name, whose files are not downloaded yet."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def reading_chat(model: str, flag: str, config: Inference, moment: datetime | None = None) -> ChatFormat:
    """The chat format of a model that reads answers, limited to --reward.max_len. Raises ValueError as ``load_chat`` does."""
    data, reward = config.data, config.reward
    variables = template_arguments(data.chat_template_kwargs)
    length, length_flag = (reward.max_len, "reward.max_len") if reward.max_len else (data.max_len, "data.max_len")
    return load_chat(model, config.model.trust_remote_code, flag, length, variables, moment, length_flag)[0]


def read_prompt(messages: Messages, template_kwargs: Mapping[str, Any], chat: ChatFormat) -> tuple[int, ...]:
    """Tokens of a prompt for a model that reads it. Template variables are the policy's; those that this template does not read
    are left out. Raises ValueError if the template fails or drops a part."""
    variables = {name: value for name, value in template_kwargs.items() if name == "tools" or chat.template.reads(name)}
    return chat.prompt(messages, variables)


def check_prompts_of(prompts: Sequence[Prompt], model: str, flag: str, config: Inference) -> None:
    """Raises ValueError if the model's template fails on a prompt or drops a part of it. One prompt is tried for each
    combination of roles, fields and tools."""
    chat = reading_chat(model, flag, config)
    kinds = {
        (*((message["role"], *message) for message in prompt.messages), "tools" in prompt.template_kwargs): prompt
        for prompt in prompts
    }
    for prompt in kinds.values():
        try:
            read_prompt(prompt.messages, prompt.template_kwargs, chat)
        except ValueError as error:
            raise ValueError(f"--{flag} {model} cannot read prompt {prompt.id}: {error}") from error


def check_reward_model(model: str, flag: str, config: Inference) -> None:
    """Raises ValueError for what is missing in a reward model, without loading it: a tokenizer with a chat template and, in a
    folder, the weights of a value head."""
    from transformers import AutoConfig

    from openrlhf_sgpo.openrlhf import no_value_head, value_head

    trust = config.model.trust_remote_code
    reading_chat(model, flag, config)
    head = value_head(AutoConfig.from_pretrained(model, trust_remote_code=trust))
    names = weight_names(model)
    if names and f"{head}.weight" not in names:
        raise no_value_head(model, head, flag)


class RewardModel(RewardOracle):
    """The model of --reward.model_name_or_path, or another ``model`` that ``flag`` names, which reads prompt and answer in its
    own chat template. A call is one answer that it scores. Raises ValueError if its tokenizer has no chat template."""

    name = "reward_model"
    reads: ClassVar[tuple[str, ...]] = (FLAG, "reward.max_len")
    needs_model = "it"

    def __init__(self, resources: Resources, model: str = "", flag: str = FLAG):
        from openrlhf_sgpo import ranks
        from openrlhf_sgpo.training.scoring import RewardScorer

        super().__init__(resources)
        config = resources.config
        self.model = model or config.reward.model_name_or_path
        self.chat = ranks.on_rank_0(lambda: reading_chat(self.model, flag, config, resources.moment))
        pad = self.chat.tokenizer.pad_token_id
        self.scorer = RewardScorer(
            config, resources.strategy, pad, resources.folder / "rewards", resident=resources.resident
        )
        self.scorers = [self.scorer]

    @classmethod
    def check(cls, config: Inference) -> None:
        check_reward_model(config.reward.model_name_or_path, FLAG, config)

    @classmethod
    def check_prompts(cls, config: Inference, prompts: Sequence[Prompt]) -> None:
        check_prompts_of(prompts, config.reward.model_name_or_path, FLAG, config)

    def scores(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        rewards = self.read(questions, label and f"{label}, reward model")
        self.calls = self.scorer.responses_scored
        return rewards

    def read(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        """A reward for each answer to each question. Collective."""
        groups = []
        for question in questions:
            prompt = read_prompt(question.prompt, question.template_kwargs, self.chat)
            room = self.chat.max_len - 1
            answers = tuple(self.chat.response(answer.text, answer.truncated, room) for answer in question.answers)
            # If both do not fit, keep the prompt's end: the answers reply to it.
            groups.append(Group(prompt[-(self.chat.max_len - max(map(len, answers))) :], answers))
        return [list(row) for row in self.scorer.score(self.model, groups, label)]
