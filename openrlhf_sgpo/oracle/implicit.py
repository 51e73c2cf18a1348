"""The policy's own implicit reward as preference oracle (self-annotation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openrlhf_sgpo.data.records import Pair, Prompt


def implicit_rewards(policy: Sequence[float], reference: Sequence[float], beta: float) -> list[float]:
    """beta * [log pi(y|x) - log pi_ref(y|x)] for each response to one prompt, from summed log-probabilities.

    (Rafailov et al., arXiv 2305.18290, eq. 5 without the prompt's constant; Kim et al., SPA, ICLR 2025.)
    """
    return [beta * (p - r) for p, r in zip(policy, reference, strict=True)]


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int]:
    """Indices of the largest and the smallest reward; the earlier sample wins a tie, so that they always differ.

    Raises ValueError for fewer than two rewards.
    """
    if len(rewards) < 2:
        raise ValueError(f"a preference needs two responses, got {len(rewards)}")
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    return order[0], order[-1]


def rank(prompt: Prompt, responses: Sequence[dict[str, Any]], rewards: Sequence[float], number: int) -> Pair:
    """The pair of best and worst response (rows of responses.jsonl) of round ``number``; the rewards are kept as scores."""
    best, worst = best_and_worst(rewards)
    return Pair(
        id=f"round_{number}/{prompt.id}",
        prompt=prompt.messages,
        chosen=responses[best]["text"],
        rejected=responses[worst]["text"],
        source="implicit",
        round=number,
        chosen_truncated=responses[best]["truncated"],
        rejected_truncated=responses[worst]["truncated"],
        scores={"chosen": rewards[best], "rejected": rewards[worst]},
    )
