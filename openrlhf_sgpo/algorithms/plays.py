"""Base of the algorithms that learn from fresh answers: who answers, and what the loss gets.

In a play, several roles answer one prompt, and an oracle gives the probability that one answer is preferred, for each pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, ClassVar, Literal

from openrlhf_sgpo.algorithms.base import Algorithm, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.config import Config

# policy: the current policy. mixture: the geometric mixture of policy and reference. reference: the reference alone. previous:
# the policy at the start of the round. follower: the policy in its second role, in which it sees the play's first answer.
Role = Literal["policy", "mixture", "reference", "previous", "follower"]
Level = Literal["sequence", "reward_to_go", "token_local", "full_vocabulary"]
Model = Literal["reference", "previous"]
LEVEL_HELP = (
    "divergence that weighs a token: of the whole sequence, of the tokens from it on, of the token alone (biased), or the "
    "exact one over the whole vocabulary"
)


@dataclass(frozen=True)
class Plays:
    """A micro-batch of plays with k answers each. Token tensors have shape (batch, k, T) and are 0 after an answer's end.

    log_probs: of the answers' tokens under the policy, in each answer's context and at the temperature at which it was sampled;
    with gradient. reference, previous: the same under the frozen reference and under the policy at the start of the round,
    without gradient; NaN if the algorithm does not name that model in ``models``. preferences: (batch, k, k), [b, i, j] the
    probability that answer i is preferred to answer j; 1/2 on the diagonal, and [b, i, j] + [b, j, i] = 1. divergence:
    KL(policy || reference) of the next-token distributions at each token, over the whole vocabulary, with gradient; None
    unless the algorithm sets ``full_vocabulary``. step: of training, from 1. rewards: (batch, k), the oracle's scores of the
    answers; None unless the algorithm is ``scored``. drift: log pi / mu of each token, (batch, k, T) without gradient; mu has
    sampled it, and the engine has reported its probability; pi should have, which for policy and follower is the policy that
    is trained, for previous and reference they themselves. NaN after an answer's end, and where mu or pi is not known.
    """

    log_probs: Tensor
    reference: Tensor
    previous: Tensor
    preferences: Tensor
    divergence: Tensor | None = None
    step: int = 1
    rewards: Tensor | None = None
    drift: Tensor | None = None

    def log_ratios(self) -> Tensor:
        """s = log pi(y|x) - log pi_ref(y|x) of whole answers, shape (batch, k), with gradient."""
        return (self.log_probs - self.reference).sum(-1)


class PlayAlgorithm(Algorithm[Plays]):
    """Base class of algorithms that sample in every step.

    models: those whose log-probabilities the loss reads, apart from the policy. steps_per_sync: optimiser steps between two
    syncs of the engines with the policy: 1, or 0 for one sync per round if answers come from the role ``previous``.
    """

    needs = Needs(rounds=True)
    fresh_answers = True
    models: ClassVar[tuple[Model, ...]] = ("reference",)
    steps_per_sync: ClassVar[int] = 1

    def problems(self, config: Config) -> list[str]:
        problems = []
        if config.rollout.top_p < 1:
            problems.append(
                f"--rollout.top_p: {config.rollout.top_p} truncates the distribution, but --algo {self.name} needs the "
                "log-probabilities of the whole one; use 1"
            )
        if self.adapters and config.ds.lora.rank == 0:
            names = " and ".join(self.adapters.values())
            problems.append(f"--ds.lora.rank: 0, but --algo {self.name} trains the adapters {names}; use at least 1")
        if self.shares and self.reference_rounds:
            problems.append(
                f"--algo {self.name}: the role {' and '.join(self.shares)} answers with the first reference, but the reference "
                "moves after every reference_rounds; use 0"
            )
        if "follower" in self.roles and 2 * config.rollout.max_new_tokens >= config.data.max_len:
            problems.append(
                f"--data.max_len: {config.data.max_len} leaves no room for a prompt, a draft and the follower's answer of "
                f"--rollout.max_new_tokens {config.rollout.max_new_tokens} each; raise the former or lower the latter"
            )
        cap = config.rollout.importance_cap
        if 0 < cap < 1:
            problems.append(
                f"--rollout.importance_cap: {cap} would lower the weight of plays that need no correction, whose ratio is 1; "
                "use at least 1, or 0 for none"
            )
        if cap and set(self.roles) == {"mixture"}:
            problems.append(
                "--rollout.importance_cap: the trainer does not compute the probabilities of the mixture that --algo "
                f"{self.name} samples from, so there is nothing to weigh with; use 0"
            )
        if config.rollout.steps_behind and self.adapters:
            names = " and ".join(self.adapters.values())
            problems.append(
                f"--rollout.steps_behind: 1, but --algo {self.name} samples from the adapters {names}, and engines that sample "
                "while the policy trains cannot change from one to the other; use 0"
            )
        return problems

    @property
    def roles(self) -> tuple[Role, ...]:
        """The role that gives each answer of a play, in order."""
        raise NotImplementedError

    @property
    def mixture(self) -> float:
        """The reference's share in the role ``mixture``: token by token, logits (1 - mixture) policy + mixture reference."""
        return 0.0

    @property
    def shares(self) -> dict[Role, float]:
        shares: dict[Role, float] = {"mixture": self.mixture, "reference": 1.0}
        return {role: share for role, share in shares.items() if share and role in self.roles}

    @property
    def adapters(self) -> dict[Role, str]:
        """The LoRA adapter of each role, if roles have separate weights; empty if they share one set."""
        return {}

    @property
    def learning_rates(self) -> dict[str, float]:
        """Factors of the learning rate, by adapter."""
        return dict.fromkeys(self.adapters.values(), 1.0)

    @property
    def scored(self) -> bool:
        """Whether the loss reads ``Plays.rewards``."""
        return False

    @property
    def full_vocabulary(self) -> bool:
        """Whether the loss reads ``Plays.divergence``."""
        return False

    def watched(self, batch: Plays) -> Tensor:
        """Mean preference for the first answer over the others, shape (batch,)."""
        return batch.preferences[:, 0, 1:].mean(-1)


def policy_gradient_loss(
    log_probs: Tensor, reference: Tensor, gain: Tensor, beta: float, level: Level, divergence: Tensor | None = None
) -> Tensor:
    """A loss, shape (batch,), whose expected gradient is that of -(E[gain] - beta * KL(pi || pi_ref)).

    log_probs (batch, T) with gradient and reference (batch, T): of answers sampled from pi; gain (batch,): no gradient flows
    through it. With k_t = log pi(y_t|..) - log pi_ref(y_t|..) (the estimate k1) held fixed,

        sequence:      -( gain - beta * sum_t k_t ) * sum_t log pi(y_t|..)
        reward_to_go:  sum_t ( beta * sum_{u >= t} k_u - gain ) * log pi(y_t|..),   the same in expectation, with less variance
        token_local:   sum_t ( beta * k_t - gain ) * log pi(y_t|..),   which ignores how a token affects later divergence

    The last is that of TRL's Nash-MD and of the released SLHF (arXiv 2512.16626); for answers of one token all three are equal.
    With d_t = KL(pi(.|s_t) || pi_ref(.|s_t)) at the tokens' contexts s_t, given as ``divergence`` (batch, T) with gradient,

        full_vocabulary:  sum_t beta * d_t + sum_t ( beta * sum_{u > t} [d_u] - gain ) * log pi(y_t|..),   [.] held fixed,

    the gradient of sum_t E d_t by the product rule, exact over the vocabulary at each context.
    """
    if level == "full_vocabulary":
        assert divergence is not None
        fixed = divergence.detach()
        weights = _sum_to_go(fixed) - fixed
    else:
        weights = (log_probs - reference).detach()
        if level == "sequence":
            weights = weights.sum(-1, keepdim=True)
        elif level == "reward_to_go":
            weights = _sum_to_go(weights)
    loss = ((beta * weights - gain.detach().unsqueeze(-1)) * log_probs).sum(-1)
    return loss if level != "full_vocabulary" or divergence is None else loss + beta * divergence.sum(-1)


def importance_weights(drift: Tensor, cap: float) -> Tensor:
    """Truncated importance weights, shape (batch,), without gradient, from ``Plays.drift`` (batch, k, T):

        w = min( cap, prod_i pi(y_i|..) / mu(y_i|..) ).

    The answers of a play are sampled from mu one after the other, so mu's probability of all of them is a product, and without
    truncation E_mu[w * loss] = E_pi[loss], whatever the loss makes of them. Truncation bounds the variance, and pulls what is
    learned towards what would be learned if mu were the policy (rho-bar of Espeholt et al., arXiv 1802.01561; for engines whose
    probabilities differ from the trainer's: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"). Tokens whose pi or mu is not known count as 1.
    """
    return drift.detach().nansum((1, 2)).clamp(max=log(cap)).exp()


def _sum_to_go(values: Tensor) -> Tensor:
    """sum_{u >= t} of values (batch, T)."""
    return values.flip(-1).cumsum(-1).flip(-1)


__all__ = [
    "LEVEL_HELP",
    "Level",
    "Model",
    "PlayAlgorithm",
    "Plays",
    "Role",
    "importance_weights",
    "policy_gradient_loss",
]
