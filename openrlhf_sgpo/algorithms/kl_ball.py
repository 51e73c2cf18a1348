"""The two sides of a KL ball around the pairs: what ``dr_dpo`` and ``kl_dpo`` have in common."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from openrlhf_sgpo.algorithms.base import PairAlgorithm, PairBatch, Stage
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.recent import drawn, followed_by

if TYPE_CHECKING:
    from torch import Tensor

UNCAPPED = 1e30  # no weight gets that far, and its exponential still fits into float32


def tilted_level(losses: Tensor, temperature: float, max_weight: float = UNCAPPED) -> float:
    """The level c at which the weights min(exp((l - c) / t), M) of ``losses`` l, shape (n,), have a mean of 1.

    t = temperature, of either sign but not 0; M = max_weight, above 1. If no weight reaches M, c = t log mean exp(l / t), which
    is above the mean loss for t > 0 and below it for t < 0. Computed in float64.
    """
    import torch

    exponents = (losses.double() / temperature).sort(descending=True).values
    count = len(exponents)
    cap = min(max_weight, count)  # a larger weight would have a mean above 1 by itself
    # If the k largest weights are M, those of the others sum to n - k M.
    others = exponents.flip(0).logcumsumexp(0).flip(0)
    mass = count - cap * torch.arange(count, dtype=torch.float64)
    # Where nothing but rounding is left for the others, fewer are at the cap.
    levels = (others - mass.log())[mass > 1e-9 * count]
    capped = int((exponents[: len(levels)] - levels > math.log(cap)).sum())
    return temperature * float(levels[min(capped, len(levels) - 1)])


def tilted_loss(losses: Tensor, level: float, temperature: float, max_weight: float = UNCAPPED) -> Tensor:
    """c + t [min(w, M) - 1] + t M (log w - log M)_+ of each loss l, any shape, with w = exp((l - c) / t), c = level.

    Its derivative by l is the weight of the pair, min(w, M). If c is the ``tilted_level`` of the same losses, their mean is

        t > 0:  max_Q { E_Q[l] - t KL(Q || P) : dQ/dP <= M },        t < 0:  min_Q { E_Q[l] + |t| KL(Q || P) },

    over distributions Q on the pairs, P being uniform; if no weight reaches M, that is t log mean exp(l / t) (Donsker and
    Varadhan, 1975). As |t| goes to infinity, only l is left.
    """
    exponents, top = (losses - level) / temperature, math.log(max_weight)
    return level + temperature * (exponents.clamp(max=top).expm1() + max_weight * (exponents - top).clamp(min=0))


class KLBall(PairAlgorithm):
    """Base class: pairs have weights exp((l - c) / t), and the level c follows the latest losses.

    The objective is over all pairs, while a micro-batch holds a few of them. So c comes from the margins of all pairs when the
    stage begins and, after each step, from the latest ``window`` margins of all ranks: micro-batches and ranks make no
    difference. A level that lags behind multiplies every weight below the cap by the same number.

    temperature: t. max_weight: the largest weight.
    """

    def __init__(self, options: Any, beta: float, temperature: float, max_weight: float = UNCAPPED):
        super().__init__(options, beta)
        self.temperature = temperature
        self.max_weight = max_weight
        self._recent: Tensor | None = None  # the latest margins, oldest first, on the CPU
        self._level = 0.0

    def begin_stage(self, stage: Stage) -> dict[str, Any]:
        """Take the level of the stage's margins, or that of a policy that equals its reference. There is no certificate."""
        import torch

        margins = torch.zeros(1) if stage.margins is None else stage.margins
        self._recent = drawn(margins, self.options.window, stage.seed)
        self._update_level()
        return {}

    def loss(self, batch: PairBatch) -> Tensor:
        """Raises ValueError before ``begin_stage``."""
        if self._recent is None:
            raise ValueError(
                f"--algo {self.name} weighs pairs against all others: pass their margins to begin_stage first"
            )
        losses = dpo_loss(batch.margins(self.beta))
        return tilted_loss(losses, self._level, self.temperature, self.max_weight)

    def after_step(self, watched: Tensor) -> dict[str, Any]:
        """Take the level of the latest margins. Metrics: this level, and the largest weight of the step's pairs under it."""
        latest = watched.detach().cpu()
        self._recent = followed_by(self._recent, latest, self.options.window)
        self._update_level()
        weights = ((dpo_loss(latest) - self._level) / self.temperature).exp().clamp(max=self.max_weight)
        return {f"{self.name}/level": self._level, f"{self.name}/largest_weight": weights.max().item()}

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self._recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._recent = state["recent"]
            self._update_level()

    def _update_level(self) -> None:
        assert self._recent is not None
        self._level = tilted_level(dpo_loss(self._recent), self.temperature, self.max_weight)
