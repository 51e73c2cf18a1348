"""Several reward models that vote, so preferences may be cyclic."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar

from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.data.records import Prompt
from openrlhf_sgpo.oracle.base import (
    Matrix,
    PreferenceOracle,
    Question,
    Resources,
    antisymmetric,
    check_rewards,
    distinct_pairs,
)
from openrlhf_sgpo.oracle.reward_model import RewardModel, check_prompts_of, check_reward_model


def votes(rewards: Sequence[Sequence[float]], i: int, j: int) -> float:
    """Share of the heads that prefer answer i to answer j; a tie counts one half. rewards: a row per head.

    (The oracle of SLHF's experiments, arXiv 2512.16626, with one model per attribute of HelpSteer2, arXiv 2406.08673; there
    a tie goes to the first answer.)
    """
    return fmean((row[i] > row[j]) + 0.5 * (row[i] == row[j]) for row in rewards)


class RewardHeads(PreferenceOracle):
    """The models of --reward.heads, each with one vote. A call is one answer scored by one of them."""

    name = "reward_heads"
    reads: ClassVar[tuple[str, ...]] = ("reward.heads", "reward.max_len")

    def __init__(self, resources: Resources):
        super().__init__(resources)
        self.heads = [RewardModel(resources, head, "reward.heads") for head in resources.config.reward.heads]
        self.scorers = [head.scorer for head in self.heads]

    @classmethod
    def problems(cls, config: Inference) -> list[str]:
        heads = config.reward.heads
        if len(heads) < 2:
            return [f"--reward.heads: {len(heads)} given, --oracle reward_heads needs 2 or more reward models"]
        if len(set(heads)) < len(heads):
            return ["--reward.heads: a model that is named twice would have two votes; name each once"]
        return []

    @classmethod
    def check(cls, config: Inference) -> None:
        for head in config.reward.heads:
            check_reward_model(head, "reward.heads", config)

    @classmethod
    def check_prompts(cls, config: Inference, prompts: Sequence[Prompt]) -> None:
        for head in config.reward.heads:
            check_prompts_of(prompts, head, "reward.heads", config)

    def matrices(self, questions: Sequence[Question], label: str) -> list[Matrix]:
        rewards_by_head = [
            check_rewards(
                f"{self.name}, head {number} ({head.model})",
                questions,
                head.read(questions, label and f"{label}, head {number}"),
            )
            for number, head in enumerate(self.heads, start=1)
        ]
        self.calls = sum(scorer.responses_scored for scorer in self.scorers)
        return [
            antisymmetric(len(question.answers), {(i, j): votes(rewards, i, j) for i, j in distinct_pairs(question)})
            for question, *rewards in zip(questions, *rewards_by_head, strict=True)
        ]
