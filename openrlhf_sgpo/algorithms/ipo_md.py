"""IPO-MD: online IPO on answers from the geometric mixture."""

from __future__ import annotations

from dataclasses import dataclass

from openrlhf_sgpo.algorithms.online_ipo import OnlineIPO
from openrlhf_sgpo.algorithms.plays import Role
from openrlhf_sgpo.flags import setting


@dataclass
class IPOMDSettings:
    mixture: float = setting(
        0.125, "the reference's share in the mixture that is sampled (0: online IPO)", low=0, high=1
    )


class IPOMD(OnlineIPO):
    """The loss of online IPO on two answers from pi^(1 - b) pi_ref^b (Calandriello et al., arXiv 2403.08635), b = ``mixture``.

    Its fixed point is Nash-MD's with the same mixture.
    """

    name = "ipo_md"
    summary = "IPO-MD: online IPO on answers from a mixture of policy and reference"
    settings = IPOMDSettings

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("mixture", "mixture")

    @property
    def mixture(self) -> float:
        return self.options.mixture
