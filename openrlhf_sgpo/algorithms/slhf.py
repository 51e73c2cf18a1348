"""SLHF: a leader that answers, and a follower that sees the answer and improves on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from openrlhf_sgpo.algorithms.on_policy import Level, OnPolicyAlgorithm, Plays, Role, policy_gradient_loss
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor

IMPROVE = "Improve the previous answer. Phrase it as if it was the original response."


@dataclass
class SLHFSettings:
    follower_beta: float = setting(0.0, "the follower's tau (0: --model.beta, which is the leader's)")
    kappa: float = setting(5.0, "weight of the follower's loss against the leader's")
    followers: int = setting(1, "follower answers to each draft of the leader")
    follower_prompt: str = setting(IMPROVE, "what the follower is told after it has seen the prompt and the draft")
    follower_kl_credit: bool = setting(
        True,
        "the leader is credited with the follower's divergence, as the game says (the released code leaves it out)",
    )
    kl_level: Level = setting(
        "sequence",
        "divergence that weighs a token: of the sequence, of what is to come, or its own (biased)",
    )
    baseline: Literal["half", "leave_one_out"] = setting(
        "half", "what gains are measured against: one half, or the mean gain of the other plays of the micro-batch"
    )


class SLHF(OnPolicyAlgorithm):
    """Stackelberg learning from human feedback (Pasztor et al., arXiv 2512.16626), by policy gradients in both roles.

        max_pi min_omega  E[ p(y > y') + tau_F KL(omega(.|x,y) || omega_ref(.|x,y)) ] - tau_L KL(pi || pi_ref),

    y ~ pi(.|x), y' ~ omega(.|x, y): the follower answers a draft that it sees. With s = log-ratio of an answer to its
    reference,

        leader    gains  p(y > y') + tau_F s_F      and pays tau_L s_L,
        follower  gains  p(y' > y)                  and pays tau_F s_F,

    and ``kappa`` weighs the follower's loss, which makes the follower the faster of the two. ``follower_kl_credit`` off
    drops tau_F s_F from the leader's gain, which moves the fixed point. Both roles are one model in two contexts.
    """

    name = "slhf"
    paper = "arXiv 2512.16626"
    summary = "SLHF: a leader answers, a follower that sees the answer improves it"
    settings = SLHFSettings

    @classmethod
    def check(cls, options: SLHFSettings) -> list[str]:
        problems = []
        if options.followers < 1:
            problems.append(f"--slhf.followers {options.followers} is too few, use at least 1")
        for flag in ("follower_beta", "kappa"):
            if getattr(options, flag) < 0:
                problems.append(f"--slhf.{flag} {getattr(options, flag)} is out of range, use 0 or more")
        if not options.follower_prompt.strip():
            problems.append("--slhf.follower_prompt is empty: the follower would not know what to do with the draft")
        return problems

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("policy", *("follower",) * self.options.followers)

    @property
    def follower_beta(self) -> float:
        return self.options.follower_beta or self.beta

    def loss(self, batch: Plays) -> Tensor:  # type: ignore[override]
        """Leader's loss plus kappa times the mean of the followers' losses, shape (batch,)."""
        wins = batch.preferences[:, 0, 1:]  # of the draft against each follower answer
        credit = self.follower_beta * batch.log_ratios()[:, 1:].detach() if self.options.follower_kl_credit else 0.0
        leader = self._role_loss(batch, 0, (wins + credit).mean(-1), self.beta)
        followers = [
            self._role_loss(batch, number, 1 - wins[:, number - 1], self.follower_beta)
            for number in range(1, 1 + self.options.followers)
        ]
        return leader + self.options.kappa * sum(followers) / len(followers)

    def _role_loss(self, batch: Plays, answer: int, gain: Tensor, beta: float) -> Tensor:
        baseline: Tensor | float = 0.5
        if self.options.baseline == "leave_one_out" and len(gain) > 1:
            baseline = (gain.sum() - gain) / (len(gain) - 1)
        own, reference = batch.log_probs[:, answer], batch.reference[:, answer]
        return policy_gradient_loss(own, reference, gain - baseline, beta, self.options.kl_level)
