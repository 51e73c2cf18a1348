"""The policy's own implicit reward as preference oracle (self-annotation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.oracle.base import Question

if TYPE_CHECKING:
    from openrlhf_sgpo.data.tokens import ChatFormat
    from openrlhf_sgpo.training.scoring import Scorer


def implicit_rewards(policy: Sequence[float], reference: Sequence[float], beta: float) -> list[float]:
    """beta * [log pi(y|x) - log pi_ref(y|x)] for each response to one prompt, from summed log-probabilities.

    (Rafailov et al., arXiv 2305.18290, eq. 5 without the prompt's constant; Kim et al., SPA, ICLR 2025.)
    """
    return [beta * (p - r) for p, r in zip(policy, reference, strict=True)]


class ImplicitReward:
    """The oracle ``implicit``: the reward of ``policy`` (a model folder) against ``reference``."""

    name = "implicit"

    def __init__(self, scorer: Scorer, chat: ChatFormat, policy: str, reference: str, beta: float):
        self.scorer = scorer
        self.chat = chat
        self.policy = policy
        self.reference = reference
        self.beta = beta

    def rewards(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        groups = []
        for question in questions:
            prompt = self.chat.prompt(question.prompt)
            room = self.chat.max_len - len(prompt)
            responses = (self.chat.response(one.text, one.truncated, room) for one in question.answers)
            groups.append(Group(prompt, tuple(responses)))
        policy = self.scorer.score(self.policy, groups, f"{label}, policy")
        reference = self.scorer.score(self.reference, groups, f"{label}, reference")
        return [implicit_rewards(p, r, self.beta) for p, r in zip(policy, reference, strict=True)]
