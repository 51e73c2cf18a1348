"""metrics.jsonl, with a row per optimiser step, and trackers, which get the same names, evaluations and images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from openrlhf_sgpo import keys
from openrlhf_sgpo.run_folder import METRICS, json_text, keep_rows, read_jsonl

Figures = Mapping[str, float]
Images = Mapping[str, Any]  # by name, (height, width, 3) of uint8


class Tracker(Protocol):
    """Where figures and images go besides the run folder. step: over the whole run."""

    def log(self, figures: Figures, images: Images, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: str):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder)

    def log(self, figures: Figures, images: Images, step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        for name, image in images.items():
            self.writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandbLike:
    """W&B, or a package with its functions. run: has ``log`` and ``finish``. image: makes an image from an array."""

    def __init__(self, run: Any, image: Any):
        self.run = run
        self.image = image

    def log(self, figures: Figures, images: Images, step: int) -> None:
        self.run.log({**figures, **{name: self.image(array) for name, array in images.items()}}, step=step)

    def close(self) -> None:
        self.run.finish()


def open_trackers(logger: Any, resolved: dict[str, Any]) -> list[Tracker]:
    """The trackers of these logger settings, each with one run for all rounds. resolved: every setting of the run."""
    wandb_settings, trackers = logger.wandb, list[Tracker]()
    if wandb_settings.key:
        import wandb

        # `env` is W&B's default. Other keys are passed to this process only; login would write them to ~/.netrc.
        key = None if wandb_settings.key == "env" else keys.read_key(wandb_settings.key, "WANDB_API_KEY")
        run = wandb.init(
            entity=wandb_settings.org or None,
            project=wandb_settings.project,
            group=wandb_settings.group or None,
            name=wandb_settings.run_name,
            config=resolved,
            settings=wandb.Settings(api_key=key) if key else None,
        )
        trackers.append(WandbLike(run, lambda array: wandb.Image(array)))
    if logger.trackio_project:
        import trackio

        trackio.init(
            logger.trackio_project,
            name=wandb_settings.run_name,
            group=wandb_settings.group or None,
            config=resolved,
            embed=False,
        )
        trackers.append(WandbLike(trackio, trackio.Image))
    if logger.tensorboard_dir:
        trackers.append(TensorBoard(os.path.join(logger.tensorboard_dir, wandb_settings.run_name)))
    return trackers


class Metrics:
    """Writes metrics.jsonl and, if configured, to trackers, as one run for all rounds."""

    def __init__(self, folder: Path, config: Any, resolved: dict[str, Any], writes: bool):
        self.every = config.logger.logging_steps
        self.file = None
        self.trackers: list[Tracker] = []
        self._step = 0
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / METRICS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open for the run
        self.trackers = open_trackers(config.logger, resolved)

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
        figures = {name: value for name, value in row.items() if value is not None}
        self.file.write(json_text({"stage": stage, "step": step, **figures}) + "\n")
        self.track(figures)

    def track(self, figures: Figures, images: Images | None = None) -> None:
        """Figures and images of the policy after the latest step, for the trackers alone: what is measured between stages is
        in files of its own."""
        for tracker in self.trackers:
            tracker.log(figures, images or {}, self._step)

    def close(self) -> None:
        if self.file:
            self.file.close()
        for tracker in self.trackers:
            tracker.close()
