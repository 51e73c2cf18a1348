"""Extragradient steps with any optimiser that DeepSpeed wraps."""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.models import Actor


class Extragradient:
    """Makes pairs of an actor's optimiser steps: the second begins where the first began, with the gradient at the point where
    the first ended (Korpelevich, 1976). step: of training, from 1, to be set before each; odd ones are the first of a pair.

    Adam's moments take in both gradients, as in ExtraAdam (Gidel et al., arXiv 1802.10551). Where a pair began is kept in
    memory only, so a checkpoint must not be taken between its steps.
    """

    def __init__(self, actor: Actor):
        self.step = 1
        self._starts: dict[torch.Tensor, torch.Tensor] = {}
        # DeepSpeed's optimiser steps this one, possibly several times, each time for a part of the parameters. What this one
        # holds is the truth, in fp32, which then goes into the model, whatever the ZeRO stage.
        actor.model.basic_optimizer.register_step_pre_hook(self._begin)

    def _begin(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if self.step % 2:
                self._starts[parameter] = parameter.detach().clone()
            elif parameter in self._starts:  # not if the loss scale was too high for the first step, which was skipped
                parameter.data.copy_(self._starts.pop(parameter))
