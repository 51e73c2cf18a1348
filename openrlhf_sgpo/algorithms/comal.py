"""COMAL: INPO whose reference moves, towards the Nash equilibrium without regularisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from openrlhf_sgpo.algorithms.inpo import INPO, INPOSettings
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from openrlhf_sgpo.config import Config


@dataclass
class COMALSettings(INPOSettings):
    reference_rounds: int = setting(
        3, "rounds after which the policy of that moment becomes the reference (0: never, which is INPO)", low=0
    )


class COMAL(INPO):
    """The convergent meta-algorithm (Liu et al., arXiv 2410.23223) over INPO: every ``reference_rounds`` rounds the policy
    becomes the reference. Where these rounds solve the game that is regularised by the reference ref_k, the next one is

        ref_{k+1} proportional to ref_k exp(p(y > ref_{k+1}) / tau),    tau = ``--model.beta``,

    a proximal step, and the last iterate converges to a Nash equilibrium of the game without regularisation. With a reset
    after every round the reference is the previous policy: multiplicative weights, which circle as SPPO's do.
    """

    name = "comal"
    paper = "arXiv 2410.23223"
    summary = "COMAL: INPO whose reference is reset, towards the unregularised Nash equilibrium"
    settings = COMALSettings
    defaults: ClassVar[dict[str, Any]] = {**INPO.defaults, "rounds.count": 6}

    def problems(self, config: Config) -> list[str]:
        problems = super().problems(config)
        if self.options.reference_rounds >= config.rounds.count:
            problems.append(
                f"--comal.reference_rounds: {self.options.reference_rounds} means that the reference is never reset in "
                f"--rounds.count {config.rounds.count}; use fewer, more rounds, or --algo inpo"
            )
        return problems

    @property
    def reference_rounds(self) -> int:
        return self.options.reference_rounds
