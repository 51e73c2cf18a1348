"""The pair trainer: OpenRLHF's DPOTrainer with an algorithm in place of its loss and references that are already known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from openrlhf_sgpo.algorithms.base import Algorithm, PairBatch
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.openrlhf import DistributedSampler, DPOTrainer
from openrlhf_sgpo.training.log_probs import response_log_probs

if TYPE_CHECKING:
    from openrlhf_sgpo.run_folder import Metrics


@dataclass(frozen=True)
class MicroBatch:
    """index (batch,): positions among the stage's pairs. reference (batch, 2): of chosen and rejected."""

    index: Tensor
    groups: list[Group]
    reference: Tensor


class PairDataset(Dataset):
    """Tokenised pairs with the reference log-probabilities of (chosen, rejected)."""

    def __init__(self, groups: list[Group], reference: Sequence[tuple[float, ...]]):
        self.groups = groups
        self.reference = torch.tensor(reference)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> MicroBatch:
        index = torch.tensor(indices)
        return MicroBatch(index, [self.groups[i] for i in indices], self.reference[index])


class PairTrainer(DPOTrainer):
    """One stage of training on pairs.

    Beside OpenRLHF's arguments: ``algorithm`` gives the per-pair loss, ``layout`` the forward (see ``log_probs``),
    ``metrics`` is where each step is logged under ``stage``. Reference log-probabilities come with the batch, so no
    reference model is held. Numbers are read from the device once per optimiser step.
    """

    def __init__(self, *, algorithm: Algorithm, layout: str, metrics: Metrics, stage: str, **openrlhf: Any):
        super().__init__(ref_model=None, eval_dataloader=None, **openrlhf)
        self.algorithm = algorithm
        self.layout = layout
        self.metrics = metrics
        self.stage = stage
        self.tokens_trained = 0

    def fit(self, args: Any = None, consumed_samples: int = 0, num_update_steps_per_epoch: int | None = None) -> None:
        """Train for ``max_epochs``; the signature is OpenRLHF's, the batches are ``MicroBatch``es."""
        micro_steps = len(self.train_dataloader)
        accumulation = self.strategy.accumulated_gradient
        if micro_steps < accumulation:
            raise ValueError(
                f"{self.stage}: {len(self.train_dataloader.dataset)} pairs are fewer than --train.batch_size "
                f"{self.strategy.train_batch_size}, so that no optimiser step would be taken: lower --train.batch_size"
            )
        total = self.epochs * micro_steps // accumulation
        device = next(self.model.parameters()).device
        records: list[Tensor] = []
        progress = tqdm(total=total, desc=f"{self.stage}: train", unit="step", disable=not self.strategy.is_rank_0())
        self.model.train()
        micro_step = 0
        for epoch in range(self.epochs):
            if isinstance(self.train_dataloader.sampler, DistributedSampler):
                self.train_dataloader.sampler.set_epoch(epoch)
            for batch in self.train_dataloader:
                records.append(self._micro_step(batch, device))
                micro_step += 1
                if micro_step % accumulation == 0:
                    self._finish_step(micro_step // accumulation, records, progress)
                    records = []
        progress.close()

    def _micro_step(self, batch: MicroBatch, device: torch.device) -> Tensor:
        """Forward, backward, and the optimiser at an accumulation boundary. Returns (batch, 6), detached."""
        pad = self.tokenizer.pad_token_id
        chosen, rejected = response_log_probs(self.model, batch.groups, self.layout, pad).view(-1, 2).T
        reference_chosen, reference_rejected = batch.reference.to(device).T
        pairs = PairBatch(chosen, rejected, reference_chosen, reference_rejected, batch.index.to(device))
        losses = self.algorithm.loss(pairs)
        self.strategy.backward(losses.mean(), self.model, self.optimizer)
        self.strategy.optimizer_step(self.optimizer, self.model, self.scheduler)
        self.tokens_trained += sum(map(len, batch.groups))
        reward_chosen = self.beta * (chosen - reference_chosen)
        reward_rejected = self.beta * (rejected - reference_rejected)
        columns = (losses, reward_chosen, reward_rejected, pairs.margins(self.beta), chosen, rejected)
        return torch.stack(columns, dim=1).detach()

    def _finish_step(self, step: int, records: list[Tensor], progress: tqdm) -> None:
        table = self.strategy.all_gather(torch.cat(records))
        extra = self.algorithm.after_step(table[:, 3])
        accurate = (table[:, 3] > 0).to(table)
        loss, chosen, rejected, margin, logp_chosen, logp_rejected, accuracy = (
            torch.cat([table, accurate[:, None]], dim=1).mean(0).tolist()
        )
        row = {
            "train/loss": loss,
            "train/rewards/chosen": chosen,
            "train/rewards/rejected": rejected,
            "train/rewards/margins": margin,
            "train/rewards/accuracies": accuracy,
            "train/logps/chosen": logp_chosen,
            "train/logps/rejected": logp_rejected,
            "train/grad_norm": self.strategy.get_grad_norm(self.model),
            "train/learning_rate": self.scheduler.get_last_lr()[0],
        } | {f"train/{name}": value for name, value in extra.items()}
        self.metrics.log(self.stage, step, row)
        progress.set_postfix(loss=f"{loss:.4f}", margin=f"{margin:.3f}", accuracy=f"{accuracy:.2f}")
        progress.update()
