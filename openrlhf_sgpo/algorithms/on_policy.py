"""What algorithms that learn from their own fresh answers have in common: who answers, and what they get back.

In every play some answers are drawn for one prompt, each by a role, and an oracle says for all of them who is preferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from openrlhf_sgpo.algorithms.base import Algorithm, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.config import Config

# policy: the policy as it is. mixture: the geometric mixture of policy and reference. previous: the policy as it was when the
# round began. follower: the policy in its second role, which sees the play's first answer.
Role = Literal["policy", "mixture", "previous", "follower"]
Level = Literal["sequence", "reward_to_go", "token_local", "full_vocabulary"]
Model = Literal["reference", "previous"]
LEVEL_HELP = (
    "divergence that weighs a token: of the sequence, of what is to come, its own (biased), or the exact one over the whole "
    "vocabulary"
)


@dataclass(frozen=True)
class Plays:
    """A micro-batch of plays with k answers each. Token tensors have shape (batch, k, T) and are 0 behind an answer's end.

    log_probs: of the answers' tokens under the policy, in the context in which each answer was given, at the temperature at
    which it was drawn; with gradient. reference, previous: the same under the frozen reference and under the policy of the
    round's beginning, without gradient; not a number where the algorithm does not name that model in ``models``.
    preferences: (batch, k, k), [b, i, j] the probability that answer i is preferred to answer j; 1/2 on the diagonal, and
    [b, i, j] + [b, j, i] = 1. divergence: KL(policy || reference) of the next-token distributions at each token, over the
    whole vocabulary, with gradient; None unless the algorithm asks for it by ``full_vocabulary``. step: of training, from 1.
    """

    log_probs: Tensor
    reference: Tensor
    previous: Tensor
    preferences: Tensor
    divergence: Tensor | None = None
    step: int = 1

    def log_ratios(self) -> Tensor:
        """s = log pi(y|x) - log pi_ref(y|x) of whole answers, shape (batch, k), with gradient."""
        return (self.log_probs - self.reference).sum(-1)


class OnPolicyAlgorithm(Algorithm):
    """Base of the algorithms that sample in training. ``loss`` takes ``Plays`` and returns one value per play, (batch,).

    models: whose log-probabilities the loss reads beside the policy's. steps_per_sync: optimiser steps between two times
    that the engines take over the policy: 1, or 0 for once a round, where answers come from the role ``previous``.
    """

    needs = Needs(rounds=True)
    models: ClassVar[tuple[Model, ...]] = ("reference",)
    steps_per_sync: ClassVar[int] = 1

    def problems(self, config: Config) -> list[str]:
        """Problems of the algorithm's settings with the shared ones, each naming its flag; empty when all is well."""
        return []

    @property
    def roles(self) -> tuple[Role, ...]:
        """Who gives the answers of a play, in their order."""
        raise NotImplementedError

    @property
    def mixture(self) -> float:
        """The reference's share in the role ``mixture``: token by token, logits (1 - mixture) policy + mixture reference."""
        return 0.0

    @property
    def follower_prompt(self) -> str:
        """What the role ``follower`` is told after it has seen prompt and draft."""
        return ""

    @property
    def adapters(self) -> dict[Role, str]:
        """The LoRA adapter of each role, where roles have weights of their own; empty: one set of weights for all."""
        return {}

    @property
    def learning_rates(self) -> dict[str, float]:
        """Multiples of the learning rate, by adapter."""
        return dict.fromkeys(self.adapters.values(), 1.0)

    def resting(self, step: int) -> tuple[str, ...]:
        """Adapters that stay as they are in this step."""
        return ()

    @property
    def full_vocabulary(self) -> bool:
        """Whether the loss reads ``Plays.divergence``."""
        return False

    def loss(self, batch: Plays) -> Tensor:  # type: ignore[override]
        raise NotImplementedError


def policy_gradient_loss(
    log_probs: Tensor, reference: Tensor, gain: Tensor, beta: float, level: Level, divergence: Tensor | None = None
) -> Tensor:
    """A loss, shape (batch,), whose expected gradient is that of -(E[gain] - beta * KL(pi || pi_ref)).

    log_probs (batch, T) with gradient and reference (batch, T): of answers that pi has drawn; gain (batch,), no gradient
    flows through it. With k_t = log pi(y_t|..) - log pi_ref(y_t|..) (the estimate k1) held fixed,

        sequence:      -( gain - beta * sum_t k_t ) * sum_t log pi(y_t|..)
        reward_to_go:  sum_t ( beta * sum_{u >= t} k_u - gain ) * log pi(y_t|..),   the same in expectation, with less noise
        token_local:   sum_t ( beta * k_t - gain ) * log pi(y_t|..),   which ignores what a token does to later divergence

    The last is what TRL's Nash-MD and the released SLHF (arXiv 2512.16626) do; for answers of one token all three are one.
    With d_t = KL(pi(.|s_t) || pi_ref(.|s_t)) at the tokens' contexts s_t, given as ``divergence`` (batch, T) with gradient,

        full_vocabulary:  sum_t beta * d_t + sum_t ( beta * sum_{u > t} [d_u] - gain ) * log pi(y_t|..),   [.] held fixed,

    the gradient of sum_t E d_t by the product rule: no token of the vocabulary is left to chance.
    """
    if level == "full_vocabulary":
        assert divergence is not None
        fixed = divergence.detach()
        weights = _to_come(fixed) - fixed
    else:
        weights = (log_probs - reference).detach()
        if level == "sequence":
            weights = weights.sum(-1, keepdim=True)
        elif level == "reward_to_go":
            weights = _to_come(weights)
    loss = ((beta * weights - gain.detach().unsqueeze(-1)) * log_probs).sum(-1)
    return loss if level != "full_vocabulary" or divergence is None else loss + beta * divergence.sum(-1)


def _to_come(values: Tensor) -> Tensor:
    """sum_{u >= t} of values (batch, T)."""
    return values.flip(-1).cumsum(-1).flip(-1)


__all__ = ["LEVEL_HELP", "Level", "Model", "OnPolicyAlgorithm", "Plays", "Role", "policy_gradient_loss"]
