"""XPO: online DPO against answers of the reference, with a bonus for leaving it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openrlhf_sgpo.algorithms.online_dpo import OnlineDPO, OnlineDPOSettings
from openrlhf_sgpo.algorithms.plays import Plays, Role
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class XPOSettings(OnlineDPOSettings):
    alpha: float = setting(1e-5, "weight of the bonus for leaving the reference (0: online DPO's loss)", low=0)


class XPO(OnlineDPO):
    """Exploratory preference optimisation (Xie et al., arXiv 2405.21046), beta = ``--model.beta``: y ~ pi, y' ~ ref, and

        (online DPO's loss of y and y') + alpha log pi(y'),    minimised.

    The sign: every policy is the optimum of E_pi[r] - beta KL(pi || ref) for a reward r = beta log(pi / ref) + V, with V the
    value of that optimum. Averaged over ref, V - E_ref[r] = beta KL(ref || pi) = -beta E_ref[log pi] + constant. So the
    optimist, who among the rewards that explain the comparisons believes the one that promises most over the reference, makes
    log pi small on the reference's answers, which the loss has to add. Subtracting it would be imitation of the reference.
    """

    name = "xpo"
    paper = "arXiv 2405.21046"
    summary = "XPO: online DPO with an optimist's bonus for leaving the reference"
    settings = XPOSettings

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("policy", "reference")

    def loss(self, batch: Plays) -> Tensor:
        return super().loss(batch) + self.options.alpha * batch.log_probs[:, 1].sum(-1)
