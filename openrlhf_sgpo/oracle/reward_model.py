"""A reward model of OpenRLHF's kind as preference oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from transformers import AutoConfig

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.tokens import ChatFormat, Group, load_tokenizer
from openrlhf_sgpo.oracle.base import Question
from openrlhf_sgpo.training.scoring import RewardScorer

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import DeepspeedStrategy


def check_reward_model(config: Config) -> None:
    """Raises ValueError for what can be known of the reward model without loading it: a tokenizer with a chat template, and,
    for a folder, the weights of a value head."""
    from openrlhf_sgpo.openrlhf import no_value_head, value_head

    model, trust = config.reward.model_name_or_path, config.model.trust_remote_code
    ChatFormat(load_tokenizer(model, trust, "reward.model_name_or_path"), config.data.max_len)
    head = value_head(AutoConfig.from_pretrained(model, trust_remote_code=trust))
    files = sorted(Path(model).glob("*.safetensors"))
    names = set()
    for path in files:
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    if files and f"{head}.weight" not in names:
        raise no_value_head(model, head)


class RewardModel:
    """The oracle ``reward_model``: reads prompt and answer in its own tokenizer's chat template.

    Raises ValueError if that tokenizer has none.
    """

    name = "reward_model"

    def __init__(self, config: Config, strategy: DeepspeedStrategy, folder: Path):
        self.model = config.reward.model_name_or_path
        tokenizer = load_tokenizer(self.model, config.model.trust_remote_code, "reward.model_name_or_path")
        self.chat = ChatFormat(tokenizer, config.reward.max_len or config.data.max_len)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.scorer = RewardScorer(config, strategy, pad, folder)

    def rewards(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        groups = []
        for question in questions:
            prompt = self.chat.prompt(question.prompt)
            room = self.chat.max_len - 1
            answers = tuple(self.chat.response(one.text, one.truncated, room) for one in question.answers)
            # Where both do not fit, the prompt's end, to which the answers reply, says more than its beginning.
            groups.append(Group(prompt[-(self.chat.max_len - max(map(len, answers))) :], answers))
        return [list(row) for row in self.scorer.score(self.model, groups, f"{label}, reward model")]
