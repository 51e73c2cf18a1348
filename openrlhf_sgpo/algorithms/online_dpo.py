"""Online DPO: DPO on two fresh answers of the policy, ranked by the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from openrlhf_sgpo.algorithms.cdpo import cdpo_loss
from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Plays, Role
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class OnlineDPOSettings:
    labels: Literal["ranked", "soft"] = setting(
        "ranked",
        "ranked: the preferred answer is chosen, whatever the margin (the paper); soft: each answer counts as chosen with "
        "the oracle's probability",
    )


class OnlineDPO(PlayAlgorithm):
    """DPO on two answers of the policy, ranked in every step (Guo et al., arXiv 2402.04792), beta = ``--model.beta``:

        -q log sigmoid(beta h) - (1 - q) log sigmoid(-beta h),   h = s(y) - s(y'),

    with s the log-ratios to the reference. With ``labels`` ranked, q is 1 where p(y > y') > 1/2, 0 where it is smaller and 1/2
    at a tie; with soft, q = p(y > y'). No gradient flows through sampling. It is iterative DPO with rounds of one step.

    With soft labels the fixed point is the Bradley-Terry fit to comparisons of its own answers,

        pi proportional to ref exp(r / beta),   E_{y' ~ pi}[ p(y > y') - sigmoid(r(y) - r(y')) ] = 0 for all y,

    which is RLHF's optimum where preferences are Bradley-Terry's and no Nash equilibrium where they are not. Ranked labels have
    no finite fixed point: as in all DPO on certain labels, beta and the number of steps decide how far the policy goes.
    """

    name = "online_dpo"
    paper = "arXiv 2402.04792"
    summary = "Online DPO: DPO on fresh answers, ranked in every step"
    settings: ClassVar[type] = OnlineDPOSettings

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("policy", "policy")

    def loss(self, batch: Plays) -> Tensor:
        ratios = batch.log_ratios()
        first = batch.preferences[:, 0, 1]
        if self.options.labels == "ranked":
            first = ((first - 0.5).sign() + 1) / 2
        return cdpo_loss(self.beta * (ratios[:, 0] - ratios[:, 1]), 1 - first)
