"""The pair losses of this package in TRL: ``from openrlhf_sgpo.trl import DPOConfig, DPOTrainer`` in place of TRL's own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from torch import Tensor

from openrlhf_sgpo import algorithms, flags
from openrlhf_sgpo.algorithms.base import PairAlgorithm, PairBatch, Stage
from openrlhf_sgpo.data.records import LABEL_COLUMNS
from openrlhf_sgpo.finite import check_margins, check_saved

STATE = "algorithm.pt"  # in every checkpoint, beside TRL's files


@dataclass
class DPOConfig(trl.DPOConfig):
    """TRL's ``DPOConfig``, and which algorithm takes the place of its ``loss_type``."""

    _VALID_DICT_FIELDS = trl.DPOConfig._VALID_DICT_FIELDS + ["algorithm_settings"]

    algorithm: str = field(
        default="sgpo",
        metadata={
            "help": "Algorithm that learns from pairs, as `openrlhf-sgpo algorithms` lists them, or `module:Class`."
        },
    )
    algorithm_settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Settings of the algorithm, such as {"radius": 0.05}; `openrlhf-sgpo train` has them as flags.'
        },
    )


class DPOTrainer(trl.DPOTrainer):
    """TRL's ``DPOTrainer`` with a pair loss of this package; every other argument, setting and metric is TRL's.

    There is no stage that begins with known margins: the follower of ``sgpo`` is solved on the latest margins of all ranks,
    after every ``refresh_steps`` optimiser steps, in the support window of the first solution. Until then the loss is DPO's.
    Its certificate is among the logs (``sgpo/value``, ``sgpo/gap``, ...). Its state is in every checkpoint of TRL's, so
    ``train(resume_from_checkpoint=...)`` goes on with the same follower.

    args: a ``DPOConfig`` of this module. Raises ValueError before a model is loaded for settings that are out of range, do not
    go together, or need the rounds of ``openrlhf-sgpo train``; NotFiniteError on every rank if a margin, or a weight
    that would be saved, is not finite.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: DPOConfig | None = None, **kwargs: Any):
        args = args or DPOConfig()
        self._algorithm_type, self._options = _checked(args, kwargs.get("train_dataset"))
        self._algorithm = self._algorithm_type(self._options, args.beta)
        self._algorithm.begin_stage(Stage(seed=args.seed))  # for an evaluation before training
        self._step_margins: list[Tensor] = []  # of the micro-batches since the last optimiser step
        super().__init__(model, ref_model, args, **kwargs)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """A stage begins, or goes on from a checkpoint."""
        self._algorithm = self._algorithm_type(self._options, self.beta)
        self._algorithm.begin_stage(Stage(steps=max_steps, seed=self.args.seed))
        self._step_margins.clear()
        if resume_from_checkpoint is not None:
            path = os.path.join(resume_from_checkpoint, STATE)
            if not os.path.isfile(path):
                raise ValueError(f"{path} is missing: only a checkpoint of {type(self).__module__} can be resumed")
            self._algorithm.load_state_dict(torch.load(path, weights_only=True))
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The algorithm's mean loss, from the log-probabilities that TRL computes for its own loss and metrics."""
        if not self.precompute_ref_logps:
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        outputs: list[Any] = []

        def recorded(**arguments: Any) -> Any:
            outputs.append(model(**arguments))
            return outputs[-1]

        # TRL then takes the reference from the inputs.
        precompute, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super()._compute_loss(recorded, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precompute
        mask = inputs["completion_mask"][..., 1:]
        lengths = mask.sum(dim=1)
        per_token = outputs[0].log_probs[:, -mask.size(1) :]
        policy_chosen, policy_rejected = per_token.sum(dim=1).chunk(2)
        batch = PairBatch(
            policy_chosen,
            policy_rejected,
            inputs["ref_chosen_logps"],
            inputs["ref_rejected_logps"],
            None,
            *lengths.to(per_token.dtype).chunk(2),
        )
        loss = self._algorithm.loss(batch).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs[0].aux_loss
        if self.model.training:
            watched = torch.stack([self._algorithm.watched(batch), batch.margins(self.beta)], dim=1).detach()
            self._step_margins.append(self.accelerator.gather(watched).cpu())
        return (loss, result[1]) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            watched, margins = torch.cat(self._step_margins).T
            self._step_margins.clear()
            check_margins(margins, f"step {self.state.global_step + 1}: ")
            for name, value in self._algorithm.after_step(watched).items():
                self._metrics["train"][name].append(value)
        return loss

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        check_saved(self.model, f"step {self.state.global_step}")
        super().save_model(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            torch.save(self._algorithm.state_dict(), os.path.join(folder, STATE))


def _checked(args: DPOConfig, train_dataset: Any) -> tuple[type[PairAlgorithm], Any]:
    """The algorithm and its settings. Raises ValueError with every problem."""
    if not isinstance(args, DPOConfig):
        raise ValueError(
            f"args is a {type(args).__module__}.{type(args).__name__}: give a DPOConfig of openrlhf_sgpo.trl"
        )
    algorithm = algorithms.get(args.algorithm)
    if not issubclass(algorithm, PairAlgorithm):
        raise ValueError(f"--algo {algorithm.name} samples in every step: use openrlhf-sgpo train")
    given = args.algorithm_settings or {}
    if not isinstance(given, dict):
        raise ValueError(f"algorithm_settings {given!r}: give a dictionary, in a shell as JSON")
    words = []
    for name, value in given.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        words += [
            f"--{algorithm.name}.{name}",
            *(item if isinstance(item, str) else json.dumps(item) for item in items),
        ]
    options = flags.parse(words, {algorithm.name: algorithm.settings}).instances[algorithm.name]
    problems = flags.out_of_range({algorithm.name: options}) + algorithm.drop_in_problems(options)
    usual = trl.DPOConfig.__dataclass_fields__
    for name in ("loss_weights", "label_smoothing", "use_weighting", "ld_alpha", "f_divergence_type"):
        if getattr(args, name) != usual[name].default:
            problems.append(
                f"{name} {getattr(args, name)} belongs to TRL's losses, and algorithm={args.algorithm} has none"
            )
    if args.loss_type != ["sigmoid"]:
        problems.append(f"loss_type {args.loss_type}: algorithm={args.algorithm} takes its place, leave it out")
    columns = getattr(train_dataset, "column_names", None) or []
    for column in LABEL_COLUMNS:
        if column in columns:
            problems.append(f"column {column} of train_dataset: TRL drops it; remove it, or use openrlhf-sgpo train")
    flags.refuse(problems)
    return algorithm, options


__all__ = ["DPOConfig", "DPOTrainer"]
