"""SGPO's loss in place of OpenRLHF's ``DPOLoss``. Needs torch only."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms.base import PairBatch
from openrlhf_sgpo.algorithms.sgpo import SGPO, SGPOSettings
from openrlhf_sgpo.finite import check_margins


class SGPOLoss(nn.Module):
    """Stands where OpenRLHF's ``DPOLoss`` stands; the follower lives on a sliding window of recent margins.

    settings: see ``SGPOSettings``; here the follower is solved every ``refresh_steps`` training calls on the last
    ``refresh_window`` margins of all ranks, in a support window around those of the first solve, and until then the loss is
    DPO's. The recent margins are not part of OpenRLHF's checkpoints: after a restart the loss is DPO's again until the first
    solve. A follower that is solved once per stage, and the proximal term, need the rounds of ``openrlhf-sgpo train``.

    Raises ValueError for settings that are out of range or do not go together.
    """

    def __init__(self, beta: float, settings: SGPOSettings | None = None):
        super().__init__()
        settings = settings or SGPOSettings()
        flags.refuse(flags.out_of_range({SGPO.name: settings}) + SGPO.drop_in_problems(settings))
        self.beta = beta
        self.algorithm = SGPO(settings, beta)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(mean loss, rewards of chosen (batch,), rewards of rejected (batch,)), the rewards detached, as DPOLoss has it.

        Raises NotFiniteError on every rank if a margin in training is not finite.
        """
        batch = PairBatch(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
        loss = self.algorithm.loss(batch).mean()
        if torch.is_grad_enabled():  # evaluation must not move the follower
            margins = _over_ranks(batch.margins(self.beta).detach()).cpu()
            check_margins(margins)
            self.algorithm.after_step(margins)
        chosen = self.beta * (policy_chosen_logps - reference_chosen_logps).detach()
        rejected = self.beta * (policy_rejected_logps - reference_rejected_logps).detach()
        return loss, chosen, rejected


def _over_ranks(margins: Tensor) -> Tensor:
    """Margins of all ranks, so that every rank finds the same worst case."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return margins
    parts = [torch.empty_like(margins) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, margins)
    return torch.cat(parts)
