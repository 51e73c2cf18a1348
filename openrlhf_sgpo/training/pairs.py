"""Stored pairs in training: their order, and the forward pass that turns a micro-batch into a batch for the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openrlhf_sgpo.algorithms.base import PairAlgorithm, PairBatch
from openrlhf_sgpo.data.records import LABEL_COLUMNS, Pair
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.openrlhf import DistributedSampler
from openrlhf_sgpo.training.embedded import embedded_log_probs
from openrlhf_sgpo.training.log_probs import (
    Predictions,
    extrapolated_log_probs,
    figures_of,
    predictions,
    response_log_probs,
)

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import Actor, DeepspeedStrategy

RECORDED = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


@dataclass(frozen=True)
class PairSamples:
    """Pairs of a step, or of a micro-batch. index (batch,): positions among the stage's pairs. reference (batch, 2): of chosen
    and rejected. labels: columns of ``label_columns``, each (batch,)."""

    index: Tensor
    groups: list[Group]
    reference: Tensor
    labels: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, part: slice) -> PairSamples:
        labels = {name: values[part] for name, values in self.labels.items()}
        return PairSamples(self.index[part], self.groups[part], self.reference[part], labels)


def label_columns(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The columns of ``LABEL_COLUMNS`` that are not 1 for all pairs, each (N,)."""
    columns = {name: torch.tensor([getattr(pair, name) for pair in pairs]) for name in LABEL_COLUMNS}
    return {name: values for name, values in columns.items() if bool((values != 1).any())}


def pair_losses(algorithm: PairAlgorithm, batch: PairBatch, nll_coef: float = 0.0) -> Tensor:
    """w [p L(batch) + (1 - p) L(batch with swapped labels)] per pair, shape (batch,), with w = ``batch.weight``, p =
    ``batch.chosen_probability``, and

        L = algorithm.loss + nll_coef * NLL of the chosen response / its tokens.

    The second term is that of RPO (Pang et al., arXiv 2404.19733; Liu et al., arXiv 2405.16436): it keeps the probability of
    chosen responses from falling. Without columns and with nll_coef 0 this is the algorithm's loss.
    """

    def of_label(labelled: PairBatch) -> Tensor:
        losses = algorithm.loss(labelled)
        if not nll_coef:
            return losses
        assert labelled.chosen_length is not None
        return losses - nll_coef * labelled.policy_chosen / labelled.chosen_length

    losses, probability = of_label(batch), batch.chosen_probability
    if probability is not None:
        losses = probability * losses + (1 - probability) * of_label(batch.swapped())
    return losses if batch.weight is None else batch.weight * losses


class PairBatches:
    """The pairs of each step on this rank, in the order of OpenRLHF's data loader: shuffled in every epoch, in whole
    micro-batches, with steps that may reach from one epoch into the next.

    reference: log-probabilities of (chosen, rejected) of each group under the loss's reference. labels: ``label_columns``.
    """

    def __init__(
        self,
        groups: list[Group],
        reference: Sequence[tuple[float, ...]],
        strategy: DeepspeedStrategy,
        labels: Mapping[str, Tensor] | None = None,
    ):
        self.groups = groups
        self.labels = labels or {}
        self.reference = torch.tensor(reference)
        self.size: int = strategy.micro_train_batch_size
        self.accumulation: int = strategy.accumulated_gradient
        self.sampler = DistributedSampler(
            groups,
            num_replicas=strategy.world_size,
            rank=strategy.get_rank(),
            seed=strategy.seed,
            drop_last=True,
        )
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def step(self, number: int) -> PairSamples:
        """The pairs of a step, which count from 1."""
        places = range((number - 1) * self.accumulation, number * self.accumulation)
        index = [pair for place in places for pair in self._micro_batch(place)]
        labels = {name: values[index] for name, values in self.labels.items()}
        return PairSamples(torch.tensor(index), [self.groups[pair] for pair in index], self.reference[index], labels)

    def _micro_batch(self, place: int) -> list[int]:
        epoch, place = divmod(place, len(self.sampler) // self.size)
        return self._order(epoch)[place * self.size : (place + 1) * self.size]

    def _shuffled(self, epoch: int) -> list[int]:
        self.sampler.set_epoch(epoch)
        return list(self.sampler)


class PairForward:
    """Forward passes over micro-batches of pairs. frozen: the model ``reference``, for an algorithm that extrapolates logits;
    other algorithms need only its log-probabilities, which come with the pairs. nll_coef: see ``pair_losses``.

    Log-probabilities are taken at temperature 1, whatever ``--rollout.temperature`` is: the implicit reward is that of the
    policy itself, and human pairs were not sampled at any temperature.
    """

    def __init__(
        self,
        algorithm: PairAlgorithm,
        pad_token_id: int,
        frozen: Mapping[str, Actor],
        nll_coef: float = 0.0,
    ):
        self.algorithm = algorithm
        self.pad_token_id = pad_token_id
        self.nll_coef = nll_coef
        self.reference = frozen.get("reference")

    def batch(self, model: Actor, samples: PairSamples, step: int) -> PairBatch:
        """What the loss reads, with gradient."""
        extrapolated, more = None, dict(samples.labels)
        if self.algorithm.reads_embeddings:
            log_probs, more["embeddings"] = embedded_log_probs(model, samples.groups, self.pad_token_id)
        else:
            log_probs, extrapolated = self._log_probs(model, samples)
        lengths = [[len(response) for response in group.responses] for group in samples.groups]
        policy_chosen, policy_rejected = log_probs.view(-1, 2).T
        reference_chosen, reference_rejected = samples.reference.to(log_probs.device).T
        chosen_length, rejected_length = torch.tensor(lengths, dtype=log_probs.dtype, device=log_probs.device).T
        return PairBatch(
            policy_chosen,
            policy_rejected,
            reference_chosen,
            reference_rejected,
            samples.index,
            chosen_length,
            rejected_length,
            *((None, None) if extrapolated is None else extrapolated.view(-1, 2).T),
            **{name: values.to(log_probs.device) for name, values in more.items()},
        )

    def losses(self, batch: PairBatch) -> Tensor:
        return pair_losses(self.algorithm, batch, self.nll_coef)

    def log_probs(self, model: Actor, samples: PairSamples) -> Tensor:
        """Of all responses under the policy, shape (2 * batch,)."""
        return response_log_probs(model, samples.groups, self.pad_token_id)

    def recorded(self, batch: PairBatch) -> Tensor:
        """What a step records of each pair, shape (batch, len(RECORDED))."""
        chosen = self.algorithm.beta * (batch.policy_chosen - batch.reference_chosen)
        rejected = self.algorithm.beta * (batch.policy_rejected - batch.reference_rejected)
        margins = batch.margins(self.algorithm.beta)
        return torch.stack([chosen, rejected, margins, batch.policy_chosen, batch.policy_rejected], dim=1)

    def tokens(self, samples: PairSamples) -> list[int]:
        """Of each pair, the prompt once."""
        return list(map(len, samples.groups))

    def summary(self, recorded: Tensor) -> tuple[dict[str, float], dict[str, float]]:
        """Figures that must be finite, causes before their effects; and metrics of a step."""
        accurate = (recorded[:, 2] > 0).to(recorded)
        means = dict(zip(RECORDED, recorded.mean(0).tolist(), strict=True))
        causes = {
            "mean log-probability of the chosen responses": means["logps/chosen"],
            "mean log-probability of the rejected responses": means["logps/rejected"],
            "mean reward of the chosen responses, against their reference": means["rewards/chosen"],
            "mean reward of the rejected responses, against their reference": means["rewards/rejected"],
        }
        return causes, means | {"rewards/accuracies": accurate.mean().item()}

    def _log_probs(self, model: Actor, samples: PairSamples) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of all responses, and those under the extrapolated logits where the algorithm wants them."""
        if self.reference is None:
            return self.log_probs(model, samples), None
        reference, extrapolation = (
            predictions(self.reference, samples.groups, self.pad_token_id),
            self.algorithm.extrapolation,
        )

        def figures(policy: Predictions) -> tuple[Tensor, Tensor]:
            return policy.sums(policy.log_probs()), extrapolated_log_probs(policy, reference, extrapolation)

        return figures_of(model, samples.groups, self.pad_token_id, figures)
