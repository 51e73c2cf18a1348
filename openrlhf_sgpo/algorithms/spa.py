"""SPA: self-annotated rounds that smooth the labels of the least confident pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from openrlhf_sgpo.algorithms.base import Needs, PairAlgorithm, PairBatch, Stage
from openrlhf_sgpo.algorithms.cdpo import cdpo_loss
from openrlhf_sgpo.algorithms.recent import followed_by
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor

# Fixed in the authors' code: two order statistics of the latest 50 margins, for a share of one tenth.
RELEASED_WINDOW = 50
RELEASED_SHARE = 0.1


def spa_loss(margins: Tensor, noisy: Tensor, smoothing: float) -> Tensor:
    """-(1 - a z) log sigmoid(m) - a z log sigmoid(-m) per pair (Kim et al., ICLR 2025, arXiv 2406.04412).

    m = margins, any shape; z = noisy, same shape, true or 1 where the label is in doubt; a = smoothing. Where a z is 0,
    this is DPO's loss bit for bit.
    """
    return cdpo_loss(margins, smoothing * noisy.to(margins))


def share_threshold(recent: Tensor, share: float) -> float:
    """The value below which a new margin from the law of ``recent``, shape (n,), falls with probability ``share``.

    It is at position share * (n + 1) of the sorted margins, interpolated between two of them: on average the k-th smallest of n
    has k / (n + 1) of the law below it. Minus infinity if n is too small for that position, plus infinity if the position is
    beyond the largest margin: no margin is below a share of 0, all are below a share of 1.
    """
    position = share * (len(recent) + 1)
    if position < 1:
        return -math.inf
    if position > len(recent):
        return math.inf
    ordered = recent.double().sort().values
    left = int(position)
    right = min(left + 1, len(recent))
    return ordered[left - 1].lerp(ordered[right - 1], position - left).item()


def released_threshold(recent: Tensor) -> float:
    """The threshold of the authors' code: the mean of the 6th and 7th smallest of the latest 50 margins, 0 until there are
    50."""
    if len(recent) < RELEASED_WINDOW:
        return 0.0
    return recent[-RELEASED_WINDOW:].double().sort().values[5:7].mean().item()


@dataclass
class SPASettings:
    smoothing: float = setting(0.1, "label smoothing alpha of the pairs in doubt (0: no refinement)", low=0, below=0.5)
    noisy_share: float = setting(
        0.1, "K: share of the pairs, the least confident ones, that is in doubt", low=0, high=1
    )
    extrapolation: list[float] = setting(
        [0.5, 0.25, 0.125],
        "lambda of each round, the last one for all later rounds: confidence is that under logits (1 + lambda) policy "
        "- lambda reference (0: under the policy)",
        low=0,
    )
    warmup_share: float = setting(0.2, "share of a round's steps, at its start, without refinement", low=0, high=1)
    window: int = setting(50, "number of latest confidences that set the threshold of the least confident ones", low=1)
    threshold: Literal["quantile", "released"] = setting(
        "quantile",
        "quantile: below --spa.noisy_share of the window; released: the rule of the authors' code (window 50, share 0.1)",
    )


class SPA(PairAlgorithm):
    """Self-annotated rounds of DPO that smooth the labels that the policy doubts (Kim et al., arXiv 2406.04412).

    A pair is in doubt if its confidence is among the lowest ``noisy_share`` of the latest ones. The confidence is the win
    probability under extrapolated logits (de-coupled noise detection). Sigmoid is monotone, so margins are compared instead.
    Each round's loss is relative to the policy that enters it.
    """

    name = "spa"
    paper = "arXiv 2406.04412"
    summary = "SPA: self-annotated rounds that smooth the labels of the least confident pairs"
    settings = SPASettings
    needs = Needs(rounds=True, samples_per_prompt=2)
    label_columns = ("weight",)  # what is in doubt depends on the label
    defaults: ClassVar[dict[str, Any]] = {"rounds.loss_reference": "previous"}

    @classmethod
    def option_problems(cls, options: SPASettings) -> list[str]:
        problems = []
        if not options.extrapolation:
            problems.append("--spa.extrapolation is empty: give one or more numbers of at least 0 (0: off)")
        if options.threshold == "released":
            if (options.window, options.noisy_share) != (RELEASED_WINDOW, RELEASED_SHARE):
                problems.append(
                    f"--spa.threshold released needs --spa.window {RELEASED_WINDOW} and --spa.noisy_share "
                    f"{RELEASED_SHARE}: the authors' code fixes both"
                )
        elif 0 < options.noisy_share < 1:
            # With a smaller window, this share would silently mean no pairs, or all of them.
            smallest = math.ceil(round(1 / min(options.noisy_share, 1 - options.noisy_share) - 1, 6))
            if options.window < smallest:
                problems.append(
                    f"--spa.window {options.window} cannot resolve --spa.noisy_share {options.noisy_share}, "
                    f"use at least {smallest}"
                )
        return problems

    @classmethod
    def drop_in_problems(cls, options: SPASettings) -> list[str]:
        problems = cls.option_problems(options)
        if any(options.extrapolation):
            problems.append(
                "--spa.extrapolation needs two models in every step, as openrlhf-sgpo train has them; use 0"
            )
        return problems

    def __init__(self, options: SPASettings, beta: float):
        super().__init__(options, beta)
        self._stage = Stage()
        self._steps = 0
        self._recent: Tensor | None = None  # the latest detection margins, oldest first, on the CPU
        self._threshold = -math.inf
        self._forget()

    def begin_stage(self, stage: Stage) -> dict[str, Any]:
        """Forget the confidences of the previous round, whose reference was different."""
        self._stage = stage
        values = self.options.extrapolation
        # Without smoothing no pair needs to be in doubt, and extrapolation costs two forward passes.
        refines = self.options.smoothing and self.options.noisy_share and self.options.warmup_share < 1
        self.extrapolation = values[min(max(stage.number, 1), len(values)) - 1] if refines else 0.0
        self._forget()
        return {}

    def loss(self, batch: PairBatch) -> Tensor:
        """Raises ValueError if ``extrapolation`` is on and the batch has no extrapolated log-probabilities."""
        return spa_loss(batch.margins(self.beta), self._noisy(self.watched(batch)), self.options.smoothing)

    def watched(self, batch: PairBatch) -> Tensor:
        """Detection margins, shape (batch,), detached: the confidence is their sigmoid."""
        if not self.extrapolation:
            return batch.margins(self.beta).detach()
        if batch.extrapolated_chosen is None or batch.extrapolated_rejected is None:
            raise ValueError(
                f"--spa.extrapolation {self.extrapolation} needs log-probabilities under extrapolated logits, which this "
                "batch does not have; use --spa.extrapolation 0"
            )
        extrapolated = batch.extrapolated_chosen - batch.extrapolated_rejected
        return (self.beta * (extrapolated - (batch.reference_chosen - batch.reference_rejected))).detach()

    def after_step(self, watched: Tensor) -> dict[str, Any]:
        """Add the step's detection margins, shape (train.batch_size,). Metrics: the share of these pairs that the loss
        smoothed, and the next step's threshold if it is finite."""
        latest = watched.detach().cpu()
        metrics = {"spa/noisy_share": self._noisy(latest).double().mean().item()}
        self._recent = followed_by(self._recent, latest, self.options.window)
        self._steps += 1
        self._update_threshold()
        if math.isfinite(self._threshold):  # JSON has no infinity
            metrics["spa/threshold"] = self._threshold
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self._recent, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._recent, self._steps = state["recent"], state["steps"]
            self._update_threshold()

    def _forget(self) -> None:
        self._recent, self._steps = None, 0
        self._update_threshold()

    def _update_threshold(self) -> None:
        import torch

        recent = torch.empty(0) if self._recent is None else self._recent
        if self.options.threshold == "released":
            self._threshold = released_threshold(recent)
        else:
            self._threshold = share_threshold(recent, self.options.noisy_share)

    def _noisy(self, detection: Tensor) -> Tensor:
        """Whether to smooth each pair's label, shape of ``detection``, bool."""
        import torch

        # Divide, do not multiply: in floating point 0.28 * 25 is more than 7, but 7 / 25 is 0.28.
        if self._steps / max(self._stage.steps, 1) < self.options.warmup_share:
            return torch.zeros_like(detection, dtype=torch.bool)
        return detection <= self._threshold if self.options.threshold == "released" else detection < self._threshold


__all__ = ["SPA", "SPASettings", "released_threshold", "share_threshold", "spa_loss"]
