"""metrics.jsonl and trackers, with a row per optimiser step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openrlhf_sgpo import keys
from openrlhf_sgpo.run_folder import METRICS, json_text, keep_rows, read_jsonl


class Metrics:
    """Writes metrics.jsonl and, if configured, to W&B and TensorBoard, as one run for all rounds."""

    def __init__(self, folder: Path, config: Any, resolved: dict[str, Any], writes: bool):
        self.every = config.logger.logging_steps
        self.file = None
        self._trackers: list[Any] = []
        self._step = 0
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / METRICS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open for the run
        wandb_settings = config.logger.wandb
        if wandb_settings.key:
            import wandb

            # `env` is W&B's default. Other keys are passed to this process only; login would write them to ~/.netrc.
            key = None if wandb_settings.key == "env" else keys.read_key(wandb_settings.key, "WANDB_API_KEY")
            self._trackers.append(
                wandb.init(
                    entity=wandb_settings.org or None,
                    project=wandb_settings.project,
                    group=wandb_settings.group or None,
                    name=wandb_settings.run_name,
                    config=resolved,
                    settings=wandb.Settings(api_key=key) if key else None,
                )
            )
        if config.logger.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._trackers.append(SummaryWriter(os.path.join(config.logger.tensorboard_dir, wandb_settings.run_name)))

    def rewind(self, stage: str, step: int) -> None:
        """Drops the rows that a killed process logged after ``step`` of this stage, because these steps are repeated."""
        if self.file is None:
            return
        path = Path(self.file.name)
        if keep_rows(path, lambda row: row["stage"] != stage or row["step"] <= step):
            self.file.close()  # the file was replaced
            self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        # Trackers continue counting after the kept steps.
        self._step = self.every * len(read_jsonl(path))

    def log(self, stage: str, step: int, row: Mapping[str, float | None]) -> None:
        """Logs a step, counted within the stage; trackers count over the whole run. Metrics that are None are left out."""
        self._step += 1
        if self.file is None or step % self.every:
            return
        row = {name: value for name, value in row.items() if value is not None}
        self.file.write(json_text({"stage": stage, "step": step, **row}) + "\n")
        for tracker in self._trackers:
            if hasattr(tracker, "add_scalar"):
                for name, value in row.items():
                    tracker.add_scalar(name, value, self._step)
            else:
                tracker.log(row, step=self._step)

    def close(self) -> None:
        if self.file:
            self.file.close()
        for tracker in self._trackers:
            (tracker.close if hasattr(tracker, "add_scalar") else tracker.finish)()
