"""Losses that turn into NaN at a step, for --algo toy_losses:Pairs and toy_losses:FreshAnswers.

POISONED_STEP in the environment is that step; without it the losses are DPO's and online IPO's. POISONED is what is not finite:
the loss, or, with ``gradient``, only its gradient. POISONED_RANK is the only rank that meets it; without it all do.
"""

from __future__ import annotations

import os

from openrlhf_sgpo.algorithms.dpo import DPO
from openrlhf_sgpo.algorithms.online_ipo import OnlineIPO


def poisoned(losses, step: int):
    rank = os.environ.get("RANK", "0")
    if step != int(os.environ.get("POISONED_STEP", "0")) or rank != os.environ.get("POISONED_RANK", rank):
        return losses
    if os.environ.get("POISONED") == "gradient":
        zero = (losses - losses).clamp(min=0)
        return losses + zero.sqrt()  # the slope of a root at 0 is infinite, and 0 times infinity is not a number
    return losses * float("nan")


class Pairs(DPO):
    name = "poisoned_pairs"

    def __init__(self, options, beta):
        super().__init__(options, beta)
        self.step = 1

    def loss(self, batch):
        return poisoned(super().loss(batch), self.step)

    def after_step(self, watched):
        self.step += 1
        return {}

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class FreshAnswers(OnlineIPO):
    name = "poisoned_answers"

    def loss(self, batch):
        return poisoned(super().loss(batch), batch.step)
