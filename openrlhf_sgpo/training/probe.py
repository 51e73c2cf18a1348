"""Proof that the rollout engines hold the policy that was just trained."""

from __future__ import annotations

from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.rollout import Rollout

# Mean absolute difference, in nats per token, that other kernels and reduction orders make for the same weights.
TOLERANCE = {"bf16": 0.1, "fp16": 0.05, "fp32": 0.001}


class WeightSyncError(RuntimeError):
    """The engines' log-probabilities are not those of the policy they were given."""


def check_weights_arrived(
    engine: Rollout,
    probes: list[Group],
    trained: list[float],
    before: list[float] | None,
    dtype: str,
    noise: float | None = None,
) -> dict[str, float]:
    """Compare the engine's log-probabilities of fixed responses with the trainer's.

    probes: groups whose first response is the fixed text. trained, before: the trainer's summed log-probabilities of
    these responses under the new policy and the one before it. noise: the distance that was measured on equal weights,
    if it was.
    The engine must agree with the new policy within the dtype's tolerance; and where training moved the probes by more
    than twice the noise, it must be nearer to the new policy than to the old one.
    Returns the figures, in nats per response token. Raises WeightSyncError. Collective.
    """
    sequences = [group.prompt + group.responses[0] for group in probes]
    answers = engine.log_probs(sequences)
    lengths = [len(group.responses[0]) for group in probes]
    # Entry t of an answer belongs to token t + 1.
    sums = [sum(answer[len(group.prompt) - 1 :]) for answer, group in zip(answers, probes, strict=True)]

    def distance(others: list[float]) -> float:
        return sum(abs(a - b) for a, b in zip(sums, others, strict=True)) / sum(lengths)

    figures = {"engine_to_trainer": distance(trained)}
    if before is not None:
        figures["engine_to_previous"] = distance(before)
        figures["moved_by_training"] = sum(abs(a - b) for a, b in zip(trained, before, strict=True)) / sum(lengths)
    visible = TOLERANCE[dtype] if noise is None else 2 * noise
    stale = figures.get("moved_by_training", 0) > visible and (
        figures["engine_to_trainer"] > figures["engine_to_previous"]
    )
    if stale or not figures["engine_to_trainer"] <= TOLERANCE[dtype]:
        raise WeightSyncError(
            "the rollout engine does not hold the trained policy: log-probabilities of fixed texts differ by "
            f"{figures['engine_to_trainer']:.3g} nats per token (tolerance {TOLERANCE[dtype]} for {dtype}); {figures}"
        )
    return figures
