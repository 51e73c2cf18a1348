"""Trainers without a run around them, for tests of training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from openrlhf_sgpo.ledger import Stopwatch
from openrlhf_sgpo.openrlhf import DEFAULT_ADAPTER
from openrlhf_sgpo.training.pairs import PairBatches, PairForward
from openrlhf_sgpo.training.plays import PlayForward
from openrlhf_sgpo.training.trainer import Trainer, TrainingStage


def make_trainer(algorithm, config, strategy, tokenizer, folder: Path, steps: int, reference: str = "") -> Trainer:
    """Of the model of the configuration, for ``steps`` steps of either kind; policies and checkpoints go to ``folder``.
    reference: folder of the frozen model of an algorithm that samples."""
    pad = 0
    more: dict[str, Any] = {}
    forward = partial(PairForward, algorithm, pad, nll_coef=config.train.nll_coef)
    if algorithm.fresh_answers:
        forward = partial(PlayForward, algorithm, pad, config.rollout, Stopwatch())
        more = {"frozen": {"reference": reference}, "adapters": algorithm.learning_rates}
    stage = TrainingStage(
        1,
        algorithm,
        forward,
        config.model.model_name_or_path,
        config.adam.lr,
        first=0,
        last=steps,
        scheduled=steps,
        policies={DEFAULT_ADAPTER: folder / "policy"},
        checkpoints=folder / "checkpoints",
        generator="round 1",
        **more,
    )
    return Trainer(stage, config, strategy, tokenizer)


def train_on_pairs(trainer: Trainer, batches: PairBatches, look=lambda step, metrics: None) -> list[float]:
    """The losses of the steps that are left. look: sees the metrics of every step, and step None before the policy is
    written."""
    losses = []
    with trainer:
        step = trainer.restore()
        while step < trainer.stage.last:
            step += 1
            metrics, _ = trainer.step(step, batches.step(step))
            losses.append(metrics["train/loss"])
            look(step, metrics)
            trainer.end_step(step)
        look(None, {})
        trainer.write_policies()
    return losses
