"""An algorithm that samples in every step and keeps a running figure, for --algo toy_states:RunningBaseline."""

from __future__ import annotations

from dataclasses import replace

from openrlhf_sgpo.algorithms.nash_md import NashMD


class RunningBaseline(NashMD):
    """Nash-MD whose gain is measured against the running mean of the wins in this round, not against one half."""

    name = "running_baseline"
    summary = "Nash-MD with a running baseline"

    def __init__(self, options, beta):
        super().__init__(options, beta)
        self.baseline = 0.5

    def loss(self, batch):
        return super().loss(replace(batch, preferences=batch.preferences + 0.5 - self.baseline))

    def after_step(self, watched):
        self.baseline += 0.3 * (watched.mean().item() - self.baseline)
        return {"running_baseline/baseline": self.baseline}

    def state_dict(self):
        return {"baseline": self.baseline}

    def load_state_dict(self, state):
        self.baseline = state["baseline"]
