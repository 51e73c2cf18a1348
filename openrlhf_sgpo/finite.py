"""Errors that stop a run when a loss, log-probability, gradient norm or weight is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from openrlhf_sgpo import ranks

if TYPE_CHECKING:
    from torch import Tensor, nn


class NotFiniteError(ValueError):
    """A figure is NaN or infinite."""


def in_training(place: str, what: str, dtype: str) -> NotFiniteError:
    """The error that ends a training stage. place: stage and step. what: the figure, and that it is not finite."""
    precision = ", --ds.param_dtype bf16, whose range is larger than that of fp16," if dtype == "fp16" else ""
    return NotFiniteError(
        f"{place}: {what}. This step is discarded, and the stage writes no policy: --resume continues from the checkpoint "
        "before it, or from the start of the stage. If it happens again, try a lower learning rate (--adam.lr, in a seed "
        f"stage --seed.lr){precision} or look for extreme rows in the data; to use other settings, start a new run in another "
        "--ckpt.output_dir (--ckpt.fork_from reuses a finished seed stage)"
    )


def check_figures(figures: Mapping[str, Any], place: str, dtype: str) -> None:
    """Raises the error of ``in_training`` for the first figure that is not finite."""
    for name, value in figures.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise in_training(place, f"the {name} is {value}", dtype)


def check_margins(margins: Tensor, place: str = "") -> None:
    """Raises NotFiniteError if a margin is not finite. For the trainers of other packages, which would go on and save the
    policy. place: what the message begins with."""
    if not margins.isfinite().all():
        raise NotFiniteError(
            f"{place}the margins of a batch are not finite, so the policy, or its reference, is lost: go on from a checkpoint "
            "before, with a lower learning rate, or in bf16 instead of fp16, or without the batch's rows"
        )


def weight_not_finite(model: nn.Module) -> str:
    """The first parameter with a value that is not finite, empty if all are finite; with ZeRO-3, of this rank's values."""
    import torch

    weights = {name: getattr(weight, "ds_tensor", weight).detach() for name, weight in model.named_parameters()}
    # A sum is finite only if every term is; it needs no mask of the weight's size, and all sums are read at once.
    sums = torch.stack([weight.sum(dtype=torch.float32) for weight in weights.values()])
    suspects = [name for name, good in zip(weights, sums.isfinite().tolist(), strict=True) if not good]
    return next((name for name in suspects if not weights[name].isfinite().all()), "")


def check_loaded(model: nn.Module, folder: str, dtype: str) -> None:
    """Raises NotFiniteError on every rank if a weight of the model loaded from ``folder`` is not finite. Collective."""
    name = weight_not_finite(model)
    precision = (
        ", or, if they are finite there, use --ds.param_dtype bf16, whose range is larger" if dtype == "fp16" else ""
    )
    problem = NotFiniteError(
        f"the model {folder} has values in {name} that are not finite: use an undamaged copy of it, or another "
        f"checkpoint{precision}"
    )
    ranks.raise_together(problem if name else None)


def check_complete(folder: str, report: Mapping[str, Any]) -> None:
    """Raises ValueError if weights of a model were not in ``folder``: transformers makes them up, and differently every time.
    report: transformers' ``output_loading_info``."""
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder} lacks weights of its model, which would be random ({missing[0]}; {len(missing)} in all): its files are "
            "incomplete, or do not belong to the config.json beside them"
        )


def check_saved(model: nn.Module, place: str) -> None:
    """Raises NotFiniteError on every rank if the trainer of another package is about to save a weight that is not finite: a
    step with finite margins may lead there. Collective."""
    name = weight_not_finite(model)
    problem = NotFiniteError(
        f"{place}: the weight {name} is not finite, so the policy is not saved: go on from a checkpoint before, with a lower "
        "learning rate, or in bf16 instead of fp16"
    )
    ranks.raise_together(problem if name else None)


def check_trained(actor: Any, log_probs: Tensor, place: str, dtype: str) -> None:
    """Raises ``in_training`` on every rank if a weight or log-probability of the actor is not finite. Collective."""
    problem = f"the weight {name} is not finite" if (name := weight_not_finite(actor)) else ""
    if not problem and not log_probs.isfinite().all():
        problem = "the policy's log-probabilities are not finite"
    ranks.raise_together(in_training(place, problem, dtype) if problem else None)
