"""SLHF: a leader answers, and a follower sees the answer and improves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from openrlhf_sgpo.algorithms.plays import LEVEL_HELP, Level, PlayAlgorithm, Plays, Role, policy_gradient_loss
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.config import Config

IMPROVE = "Improve the previous answer. Phrase it as if it was the original response."


@dataclass
class SLHFSettings:
    follower_beta: float = setting(0.0, "the follower's tau (0: --model.beta, which is the leader's)", low=0)
    kappa: float = setting(5.0, "how much faster the follower learns than the leader", low=0)
    kappa_mode: Literal["loss_weight", "alternate", "learning_rate"] = setting(
        "loss_weight",
        "loss_weight: kappa weighs the follower's loss (one model); alternate: kappa steps of the follower, then one of the "
        "leader; learning_rate: the follower's is kappa times the leader's (two adapters)",
    )
    sharing: Literal["shared", "two_adapters"] = setting(
        "shared", "shared: one model in both roles; two_adapters: one LoRA adapter per role, sampled and trained in it"
    )
    followers: int = setting(1, "follower answers to each draft of the leader", low=1)
    follower_prompt: str = setting(IMPROVE, "instruction for the follower, after prompt and draft")
    follower_kl_credit: bool = setting(
        True,
        "add the follower's divergence to the leader's gain, as in the game (the released code does not)",
    )
    kl_level: Level = setting("sequence", LEVEL_HELP)
    parity: bool = setting(
        False,
        "use the released code's detached estimate k3, which is not the gradient of a divergence; needs kl_level token_local "
        "and follower_kl_credit false",
    )
    baseline: Literal["half", "leave_one_out"] = setting(
        "half", "baseline of the gains: one half, or the mean gain of the other plays in the micro-batch"
    )


class SLHF(PlayAlgorithm):
    """Stackelberg learning from human feedback (Pasztor et al., arXiv 2512.16626) with policy gradients in both roles.

        max_pi min_omega  E[ p(y > y') + tau_F KL(omega(.|x,y) || omega_ref(.|x,y)) ] - tau_L KL(pi || pi_ref),

    y ~ pi(.|x), y' ~ omega(.|x, y): the follower sees the draft that it improves. With s = log-ratio of an answer to its
    reference,

        leader    gains  p(y > y') + tau_F s_F      and pays tau_L s_L,
        follower  gains  p(y' > y)                  and pays tau_F s_F,

    and ``kappa`` weighs the follower's loss, so the follower learns faster than the leader. ``follower_kl_credit`` off drops
    tau_F s_F from the leader's gain, which moves the fixed point. Both roles are one model in two contexts, or, with
    ``sharing`` two_adapters, two LoRA adapters on one base. An adapter has only its role's loss, whose weight Adam divides out:
    there kappa is the ratio of the learning rates.
    """

    name = "slhf"
    paper = "arXiv 2512.16626"
    summary = "SLHF: a leader answers, and a follower sees the answer and improves it"
    settings = SLHFSettings
    defaults: ClassVar[dict[str, Any]] = {"model.beta": 0.001, "rollout.temperature": 0.9, "data.max_len": 1024}

    @classmethod
    def option_problems(cls, options: SLHFSettings) -> list[str]:
        problems = []
        if not options.follower_prompt.strip():
            problems.append("--slhf.follower_prompt is empty, but the follower needs an instruction for the draft")
        if options.kappa_mode == "alternate" and (options.kappa < 1 or options.kappa % 1):
            problems.append(
                f"--slhf.kappa {options.kappa} must be a whole number of steps, at least 1, with --slhf.kappa_mode alternate"
            )
        if options.kappa_mode == "learning_rate" and options.sharing == "shared":
            problems.append(
                "--slhf.kappa_mode learning_rate needs separate weights for the follower: use --slhf.sharing two_adapters"
            )
        if options.kappa_mode == "loss_weight" and options.sharing == "two_adapters":
            problems.append(
                "--slhf.kappa_mode loss_weight has no effect with --slhf.sharing two_adapters, because Adam divides out the "
                "weight of an adapter's only loss: use learning_rate or alternate"
            )
        if options.parity and (options.kl_level != "token_local" or options.follower_kl_credit):
            problems.append(
                "--slhf.parity needs --slhf.kl_level token_local and --slhf.follower_kl_credit false, as in the released code"
            )
        return problems

    def problems(self, config: Config) -> list[str]:
        problems = super().problems(config)
        if self.options.baseline == "leave_one_out" and config.train.micro_batch_size == 1:
            problems.append(
                "--train.micro_batch_size: 1 leaves no other play for --slhf.baseline leave_one_out; use at least 2"
            )
        return problems

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("policy", *("follower",) * self.options.followers)

    @property
    def coupled(self) -> bool:
        return self.options.baseline == "leave_one_out"

    @property
    def follower_beta(self) -> float:
        return self.options.follower_beta or self.beta

    @property
    def follower_prompt(self) -> str:
        return self.options.follower_prompt

    @property
    def adapters(self) -> dict[Role, str]:
        return {"policy": "leader", "follower": "follower"} if self.options.sharing == "two_adapters" else {}

    @property
    def learning_rates(self) -> dict[str, float]:
        rates = super().learning_rates
        return rates | {"follower": self.options.kappa} if self.options.kappa_mode == "learning_rate" else rates

    def resting(self, step: int) -> tuple[str, ...]:
        if self.options.kappa_mode != "alternate" or not self.adapters:
            return ()
        return ("leader",) if self._follower_learns(step) else ("follower",)

    @property
    def full_vocabulary(self) -> bool:
        return self.options.kl_level == "full_vocabulary"

    def loss(self, batch: Plays) -> Tensor:
        """The leader's loss plus the mean loss of the followers, weighted by kappa with kappa_mode loss_weight; with alternate
        only one of the two. Shape (batch,)."""
        wins = batch.preferences[:, 0, 1:]  # preferences for the draft over each follower answer
        gain = wins + self.follower_beta * self._divergences(batch) if self.options.follower_kl_credit else wins
        leader = self._role_loss(batch, 0, gain.mean(-1), self.beta)
        followers = [
            self._role_loss(batch, number, 1 - wins[:, number - 1], self.follower_beta)
            for number in range(1, 1 + self.options.followers)
        ]
        follower: Tensor = sum(followers) / len(followers)  # type: ignore[assignment]
        if self.options.kappa_mode == "alternate":
            return follower if self._follower_learns(batch.step) else leader
        return leader + (self.options.kappa if self.options.kappa_mode == "loss_weight" else 1.0) * follower

    def _follower_learns(self, step: int) -> bool:
        """With kappa_mode alternate: kappa steps for each step of the leader."""
        return bool(step % (self.options.kappa + 1))

    @staticmethod
    def _divergences(batch: Plays) -> Tensor:
        """Estimates of KL(omega(.|x,y) || omega_ref(.|x,y)), one per follower answer, shape (batch, followers), detached."""
        if batch.divergence is not None:
            return batch.divergence[:, 1:].sum(-1).detach()
        return batch.log_ratios()[:, 1:].detach()

    def _role_loss(self, batch: Plays, answer: int, gain: Tensor, beta: float) -> Tensor:
        baseline: Tensor | float = 0.5
        if self.options.baseline == "leave_one_out":
            baseline = (gain.sum() - gain) / (len(gain) - 1)
        log_probs, reference = batch.log_probs[:, answer], batch.reference[:, answer]
        if self.options.parity:
            return _released_loss(log_probs, reference, gain - baseline, beta)
        divergence = None if batch.divergence is None else batch.divergence[:, answer]
        return policy_gradient_loss(log_probs, reference, gain - baseline, beta, self.options.kl_level, divergence)


def _released_loss(log_probs: Tensor, reference: Tensor, gain: Tensor, beta: float) -> Tensor:
    """sum_t (beta * k3_t - gain) * log pi(y_t|..), shape (batch,), with k3 = exp(r) - 1 - r, r = log pi_ref - log pi, held
    fixed.

    As computed by the authors' script for small models. In expectation, k3 times the score is the gradient of
    KL(pi || ref) - KL(ref || pi), which drives a policy to a corner.
    """
    ratio = (reference - log_probs).detach().clamp(-40, 40)
    return ((beta * (ratio.exp() - 1 - ratio) - gain.detach().unsqueeze(-1)) * log_probs).sum(-1)
