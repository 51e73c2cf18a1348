"""Online IPO: regression on preferences between two answers of the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openrlhf_sgpo.algorithms.ipo import ipo_loss
from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Plays, Role

if TYPE_CHECKING:
    from torch import Tensor


def soft_ipo_loss(differences: Tensor, preferences: Tensor, tau: float) -> Tensor:
    """p * (h - 1 / (2 tau))^2 + (1 - p) * (-h - 1 / (2 tau))^2, any shape (Calandriello et al., arXiv 2403.08635).

    h = differences: s(y) - s(y') of the log-ratios of two answers; p = preferences: p(y > y'). Up to a constant this is
    (h - (p - 1/2) / tau)^2.
    """
    return preferences * ipo_loss(differences, tau) + (1 - preferences) * ipo_loss(-differences, tau)


class OnlineIPO(PlayAlgorithm):
    """IPO's regression on two fresh answers of the policy (Calandriello et al., arXiv 2403.08635), tau = ``--model.beta``.

    No gradient flows through sampling. The expected gradient is proportional to that of self-play, so the fixed point is the
    regularised Nash equilibrium.
    """

    name = "online_ipo"
    paper = "arXiv 2403.08635"
    summary = "Online IPO: regression on preferences between the policy's own answers"

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("policy", "policy")

    def loss(self, batch: Plays) -> Tensor:
        ratios = batch.log_ratios()
        return soft_ipo_loss(ratios[:, 0] - ratios[:, 1], batch.preferences[:, 0, 1], self.beta)
