"""Proof that the rollout engines hold the policy that was just trained."""

from __future__ import annotations

import math

from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.rollout import Rollout

# Largest mean difference, in nats per token, that other kernels and reduction orders make for the same weights.
TOLERANCE = {"bf16": 0.1, "fp16": 0.05, "fp32": 0.001}
# The engine must have followed at least half of training's movement, where that stands out from the noise.
FOLLOWED, CONCLUSIVE = 0.5, 1 / 6


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
    these responses under the new policy and the one before it. noise: root mean square of engine minus trainer per text,
    in nats, measured on equal weights (default: the tolerance).

    The engine must agree with the new policy within the dtype's tolerance. And of the movement m = trained - before it
    must have followed its share, <engine - before, m> / <m, m>, which is 1 for the new weights and 0 for the old ones; that
    counts where the movement per text is at least six times the noise. A small step in bf16 is not: there the proof is the
    engine's checksums of all its weights (``openrlhf/checksums.py``).

    Returns the figures: ``engine_to_trainer`` and ``moved_by_training`` in nats per response token, ``noise``, ``tokens``, the
    mean of a response, ``followed`` and ``noise_to_movement``. Raises WeightSyncError. Collective.
    """
    answers = engine.log_probs([group.prompt + group.responses[0] for group in probes])
    # Entry t of an answer belongs to token t + 1.
    sums = [sum(answer[len(group.prompt) - 1 :]) for answer, group in zip(answers, probes, strict=True)]
    tokens = sum(len(group.responses[0]) for group in probes)
    errors = [engine_sum - trainer_sum for engine_sum, trainer_sum in zip(sums, trained, strict=True)]
    figures = {
        "engine_to_trainer": sum(map(abs, errors)) / tokens,
        "noise": math.dist(sums, trained) / len(probes) ** 0.5,
        "tokens": tokens / len(probes),
    }
    stale = False
    if before is not None:
        movement = [new - old for new, old in zip(trained, before, strict=True)]
        squares = sum(change * change for change in movement)
        figures["moved_by_training"] = sum(map(abs, movement)) / tokens
        if squares > 0:
            noise = TOLERANCE[dtype] * tokens / len(probes) if noise is None else noise
            product = sum((now - old) * change for now, old, change in zip(sums, before, movement, strict=True))
            figures["followed"] = product / squares
            figures["noise_to_movement"] = noise / (squares / len(probes)) ** 0.5
            stale = figures["noise_to_movement"] < CONCLUSIVE and figures["followed"] < FOLLOWED
    if stale or not figures["engine_to_trainer"] <= TOLERANCE[dtype]:
        raise WeightSyncError(
            "the rollout engine does not hold the trained policy: log-probabilities of fixed texts differ by "
            f"{figures['engine_to_trainer']:.3g} nats per token (tolerance {TOLERANCE[dtype]} for {dtype}); {figures}"
        )
    return figures
