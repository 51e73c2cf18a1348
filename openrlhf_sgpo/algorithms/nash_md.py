"""Nash-MD: policy gradient against the geometric mixture of policy and reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from openrlhf_sgpo.algorithms.plays import LEVEL_HELP, Level, PlayAlgorithm, Plays, Role, policy_gradient_loss
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class NashMDSettings:
    mixture: float = setting(
        0.125,
        "the reference's share in the opponent (0: self-play, 1: best response to the reference)",
        low=0,
        high=1,
    )
    kl_level: Level = setting("sequence", LEVEL_HELP)


class NashMD(PlayAlgorithm):
    """Nash-MD-PG (Munos et al., arXiv 2312.00886): the policy learns to win against a mixture of itself and the
    reference,

        E[ (p(y > y') - 1/2 - tau * s(y)) * grad log pi(y) ],   y ~ pi,  y' ~ pi^(1 - b) pi_ref^b,

    with tau = ``--model.beta`` and b = ``mixture``. Its fixed point is pi proportional to pi_ref exp(p(y > mixture) / tau):
    the regularised Nash equilibrium for b = 0, and for other b and answers of one token, a policy whose mixture is the
    equilibrium at tau / (1 - b); for longer answers, mixing token by token differs from mixing whole answers.
    Only with b tied to the step size, as in the paper's tabular algorithm, is it the equilibrium at tau itself.
    """

    name = "nash_md"
    paper = "arXiv 2312.00886"
    summary = "Nash-MD-PG: policy gradient against a mixture of policy and reference"
    settings = NashMDSettings
    defaults: ClassVar[dict[str, Any]] = {"model.beta": 0.008}

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("policy", "mixture")

    @property
    def mixture(self) -> float:
        return self.options.mixture

    @property
    def full_vocabulary(self) -> bool:
        return self.options.kl_level == "full_vocabulary"

    def loss(self, batch: Plays) -> Tensor:
        gain = batch.preferences[:, 0, 1] - 0.5
        log_probs, reference = batch.log_probs[:, 0], batch.reference[:, 0]
        divergence = None if batch.divergence is None else batch.divergence[:, 0]
        return policy_gradient_loss(log_probs, reference, gain, self.beta, self.options.kl_level, divergence)
