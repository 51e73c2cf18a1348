"""SGPO for a script that already uses OpenRLHF's DPOTrainer: same arguments, same batches, same loop."""

from __future__ import annotations

from typing import Any

from openrlhf_sgpo.algorithms.sgpo import SGPOSettings
from openrlhf_sgpo.drop_in.loss import SGPOLoss
from openrlhf_sgpo.finite import check_saved
from openrlhf_sgpo.openrlhf import DPOTrainer


class SGPOTrainer(DPOTrainer):
    """OpenRLHF's ``DPOTrainer`` with ``SGPOLoss``; every other argument is OpenRLHF's. Raises ValueError for settings of
    OpenRLHF's own loss, which this one does not have."""

    def __init__(self, *args: Any, settings: SGPOSettings | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        model = self.args.model
        for name in ("ipo_enable", "label_smoothing"):
            if value := getattr(model, name):
                raise ValueError(
                    f"--model.{name} {value} belongs to OpenRLHF's DPOLoss, and SGPOLoss has none; leave it out"
                )
        self.loss_fn = SGPOLoss(self.beta, settings)

    def save_logs_and_checkpoints(self, args: Any, global_step: int, *rest: Any, **more: Any) -> None:
        """Raises NotFiniteError on every rank in place of a checkpoint whose weights are not finite."""
        if global_step % args.ckpt.save_steps == 0:
            check_saved(self.model, f"step {global_step}")
        super().save_logs_and_checkpoints(args, global_step, *rest, **more)
