"""The pair trainer: OpenRLHF's DPOTrainer with an algorithm in place of its loss and references that are already known."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from openrlhf_sgpo.algorithms.base import Algorithm, PairBatch
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.finite import check_figures, check_trained
from openrlhf_sgpo.openrlhf import Actor, DistributedSampler, DPOTrainer
from openrlhf_sgpo.output import Progress
from openrlhf_sgpo.training.checkpoints import Checkpoints
from openrlhf_sgpo.training.log_probs import extrapolated_log_probs, response_log_probs, response_logits

if TYPE_CHECKING:
    from openrlhf_sgpo.metrics import Metrics


@dataclass(frozen=True)
class MicroBatch:
    """index (batch,): positions among the stage's pairs. reference (batch, 2): of chosen and rejected."""

    index: Tensor
    groups: list[Group]
    reference: Tensor


def seed_generators(*parts: object) -> None:
    """Seed torch's generators, of the GPUs too, with a number that stands for ``parts``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)


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
    ``metrics`` is where each step is logged under ``stage``, which ends after
    ``steps``. Reference log-probabilities come with the batch; a
    ``reference`` model is held only for an algorithm that extrapolates logits. Numbers are read from the device once per
    optimiser step. ``checkpoints`` are written every ``ckpt.save_steps`` steps.
    """

    def __init__(
        self,
        *,
        algorithm: Algorithm,
        layout: str,
        metrics: Metrics,
        stage: str,
        steps: int,
        checkpoints: Checkpoints | None = None,
        reference: Actor | None = None,
        **openrlhf: Any,
    ):
        super().__init__(ref_model=None, eval_dataloader=None, **openrlhf)
        self.algorithm = algorithm
        self.layout = layout
        self.metrics = metrics
        self.stage = stage
        self.steps = steps
        self.checkpoints = checkpoints
        self.reference = reference
        self.tokens_trained = 0

    def fit(self, args: Any = None, consumed_samples: int = 0, num_update_steps_per_epoch: int | None = None) -> None:
        """Train for ``steps``, within ``max_epochs``, from ``consumed_samples`` on; the signature is OpenRLHF's. Collective.

        Raises NotFiniteError on every rank at the first step whose loss, log-probabilities or gradient are not finite, and
        before a checkpoint or the end if the policy's weights or log-probabilities are not.
        """
        accumulation = self.strategy.accumulated_gradient
        micro_steps = len(self.train_dataloader)  # of an epoch, per rank
        first_step = step = consumed_samples // self.strategy.train_batch_size
        first_epoch, skipped = divmod(step * accumulation, micro_steps)
        device = next(self.model.parameters()).device
        records: list[Tensor] = []
        progress = Progress(
            total=self.steps,
            initial=step,
            desc=f"{self.stage}: train",
            unit="step",
            disable=not self.strategy.is_rank_0(),
        )
        self.model.train()
        for epoch in range(first_epoch, self.epochs):
            if isinstance(self.train_dataloader.sampler, DistributedSampler):
                done = skipped * self.strategy.micro_train_batch_size * self.strategy.world_size
                self.train_dataloader.sampler.set_epoch(epoch, consumed_samples=done if epoch == first_epoch else 0)
            for batch in self.train_dataloader:
                if step == self.steps:  # --train.max_steps, or what is left does not fill a batch
                    break
                if not records:
                    # Dropout draws the same numbers in a step, whether or not training was resumed before it.
                    seed_generators(self.args.train.seed, self.stage, step, self.strategy.get_rank())
                records.append(self._micro_step(batch, device))
                if len(records) == accumulation:
                    step += 1
                    self._finish_step(step, records, progress)
                    if self._saves(step):
                        self._check_policy(step, batch)
                        self._save_checkpoint(step)
                    records = []
        progress.close()
        if step > first_step:
            self._check_policy(step, batch)

    def restore(self) -> int:
        """Take up the latest checkpoint, if there is one; returns the samples that it has consumed. Collective."""
        state = self.checkpoints.restore(self.model.model) if self.checkpoints else None
        if state is None:
            return 0
        self.algorithm.load_state_dict(state["algorithm"])
        # The checkpoint has the sum over all ranks, and so will the end of the stage.
        self.tokens_trained = state["tokens_trained"] if self.strategy.is_rank_0() else 0
        return state["consumed_samples"]

    def _saves(self, step: int) -> bool:
        every = self.args.ckpt.save_steps
        return self.checkpoints is not None and every > 0 and step % every == 0

    def _check_policy(self, step: int, batch: MicroBatch) -> None:
        """Raises NotFiniteError if what a step has left cannot be used: a step may be finite and lead out of the range."""
        self.model.eval()
        with torch.no_grad():
            log_probs = response_log_probs(self.model, batch.groups, self.layout, self.tokenizer.pad_token_id)
        self.model.train()
        check_trained(self.model, log_probs, f"{self.stage}, after step {step}", self.strategy.args.ds.param_dtype)

    def _save_checkpoint(self, step: int) -> None:
        assert self.checkpoints is not None
        state = {
            "consumed_samples": step * self.strategy.train_batch_size,
            "tokens_trained": int(self.strategy.all_reduce(self.tokens_trained, "sum")),
            "algorithm": self.algorithm.state_dict(),
        }
        self.checkpoints.save(self.model.model, step, state)

    def _micro_step(self, batch: MicroBatch, device: torch.device) -> Tensor:
        """Forward, backward, and the optimiser at an accumulation boundary. Returns (batch, 7), detached."""
        log_probs, extrapolated = self._forward(batch.groups)
        chosen, rejected = log_probs.view(-1, 2).T
        reference_chosen, reference_rejected = batch.reference.to(device).T
        lengths = [[len(response) for response in group.responses] for group in batch.groups]
        chosen_length, rejected_length = torch.tensor(lengths, dtype=log_probs.dtype, device=device).T
        pairs = PairBatch(
            *(chosen, rejected, reference_chosen, reference_rejected, batch.index, chosen_length, rejected_length),
            *((None, None) if extrapolated is None else extrapolated.view(-1, 2).T),
        )
        losses = self.algorithm.loss(pairs)
        self.strategy.backward(losses.mean(), self.model, self.optimizer)
        self.strategy.optimizer_step(self.optimizer, self.model, self.scheduler)
        self.tokens_trained += sum(map(len, batch.groups))
        reward_chosen = self.beta * (chosen - reference_chosen)
        reward_rejected = self.beta * (rejected - reference_rejected)
        margins, watched = pairs.margins(self.beta), self.algorithm.watched(pairs)
        columns = (losses, reward_chosen, reward_rejected, margins, chosen, rejected, watched)
        return torch.stack(columns, dim=1).detach()

    def _forward(self, groups: list[Group]) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of all responses, and those under the extrapolated logits where the algorithm wants them."""
        pad = self.tokenizer.pad_token_id
        if self.reference is None:
            return response_log_probs(self.model, groups, self.layout, pad), None
        policy = response_logits(self.model, groups, self.layout, pad)
        with torch.no_grad():
            reference = response_logits(self.reference, groups, self.layout, pad)
            extrapolated = extrapolated_log_probs(policy, reference, self.algorithm.extrapolation)
        return policy.log_probs(), extrapolated

    def _finish_step(self, step: int, records: list[Tensor], progress: Progress) -> None:
        table = self.strategy.all_gather(torch.cat(records))
        accurate = (table[:, 3] > 0).to(table)
        loss, chosen, rejected, margin, logp_chosen, logp_rejected, accuracy = (
            torch.cat([table[:, :6], accurate[:, None]], dim=1).mean(0).tolist()
        )
        place, dtype = f"{self.stage}, step {step}", self.strategy.args.ds.param_dtype
        gradient_norm = self.strategy.get_grad_norm(self.model)
        # In this order: what comes first is the cause of what follows. All ranks have the same figures.
        figures = {
            "mean log-probability of the chosen responses": logp_chosen,
            "mean log-probability of the rejected responses": logp_rejected,
            "mean reward of the chosen responses, against their reference": chosen,
            "mean reward of the rejected responses, against their reference": rejected,
            "loss": loss,
            "gradient norm": gradient_norm,
        }
        check_figures(figures, place, dtype)
        extra = self.algorithm.after_step(table[:, 6])
        check_figures({f"metric {name}": value for name, value in extra.items()}, place, dtype)
        row = {
            "train/loss": loss,
            "train/rewards/chosen": chosen,
            "train/rewards/rejected": rejected,
            "train/rewards/margins": margin,
            "train/rewards/accuracies": accuracy,
            "train/logps/chosen": logp_chosen,
            "train/logps/rejected": logp_rejected,
            "train/grad_norm": gradient_norm,
            "train/learning_rate": self.scheduler.get_last_lr()[0],
        } | {f"train/{name}": value for name, value in extra.items()}
        self.metrics.log(self.stage, step, row)
        progress.set_postfix(loss=f"{loss:.4f}", margin=f"{margin:.3f}", accuracy=f"{accuracy:.2f}")
        progress.update()
