"""The trainer: optimiser steps on batches of either kind, on OpenRLHF's DeepSpeed strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from openrlhf_sgpo import ranks
from openrlhf_sgpo.algorithms.base import Algorithm
from openrlhf_sgpo.finite import check_figures, check_trained
from openrlhf_sgpo.ledger import Stopwatch
from openrlhf_sgpo.memory import release_memory
from openrlhf_sgpo.openrlhf import Extragradient, destroy, load_actor, resting
from openrlhf_sgpo.training.checkpoints import Checkpoints
from openrlhf_sgpo.training.packing import filled, split_into, token_budget
from openrlhf_sgpo.training.policies import load_trained, seed_generators, write_policy

if TYPE_CHECKING:
    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.openrlhf import Actor, DeepspeedStrategy


class Forward(Protocol):
    """What differs between the two kinds of samples; see ``PairForward`` and ``PlayForward``. Samples are those of a step or,
    as a slice of them, of a micro-batch."""

    def batch(self, model: Actor, samples: Any, step: int) -> Any:
        """What the loss reads of a micro-batch, with gradient."""

    def losses(self, batch: Any) -> Tensor:
        """Loss of each sample of a batch, shape (batch,)."""

    def log_probs(self, model: Actor, samples: Any) -> Tensor:
        """Of the responses of a micro-batch under the policy, one dimension."""

    def recorded(self, batch: Any) -> Tensor:
        """What a step records of each sample of a batch, shape (batch, c)."""

    def tokens(self, samples: Any) -> list[int]:
        """Tokens of each sample."""

    def summary(self, recorded: Tensor) -> tuple[dict[str, float], dict[str, float]]:
        """Figures that must be finite, causes first, and metrics of a step, from all that it recorded."""


@dataclass(frozen=True)
class TrainingStage:
    """What is trained, from which policy and step to which.

    number, label: of the round. algorithm: after ``begin_stage``. forward: makes the forward pass from the frozen models by
    name. start: folder of the policy. frozen: folders of the models that the forward pass reads. first, last: steps after
    ``first`` are taken, up to ``last``, of a learning-rate schedule over ``scheduled`` steps. adapters: names of the LoRA
    adapters where there are several, each with its multiple of the learning rate. policies: where the policy of each adapter
    goes. checkpoints: their folder. keeps_optimizer: the next stage goes on with this optimiser, so the last step is a
    checkpoint too. generator: seeds the random numbers of adapters and dropout. facts: for the manifest. clock: times parts of
    the stage, and holds what it has cost so far.
    """

    number: int
    algorithm: Algorithm[Any]
    forward: Callable[[Mapping[str, Actor]], Forward]
    start: str
    learning_rate: float
    first: int
    last: int
    scheduled: int
    policies: dict[str, Path]
    checkpoints: Path
    generator: str
    frozen: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, float] = field(default_factory=dict)
    keeps_optimizer: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    clock: Stopwatch = field(default_factory=Stopwatch)

    @property
    def label(self) -> str:
        return f"round {self.number}"


class Trainer:
    """Trains the policy of a stage, step by step. A context: inside it the models are in memory. Every method is collective.

    A step is OpenRLHF's: the mean loss of its samples, whose gradient accumulates over micro-batches, is clipped and taken by
    optimiser and schedule. Numbers are read from the device once per step.
    """

    def __init__(
        self, stage: TrainingStage, config: Config, strategy: DeepspeedStrategy, tokenizer: PreTrainedTokenizerBase
    ):
        self.stage = stage
        self.config = config
        self.strategy = strategy
        self.tokenizer = tokenizer
        self.algorithm = stage.algorithm
        self.checkpoints = Checkpoints(stage.checkpoints, strategy)
        self.ahead: Any = None  # of the source, from the checkpoint that was taken up
        self._latest: Any = None  # micro-batch

    def __enter__(self) -> Trainer:
        stage, config = self.stage, self.config
        self.actor, self.optimizer, self.scheduler = load_trained(
            *(stage.start, config, self.strategy, stage.learning_rate, stage.scheduled, stage.generator, stage.adapters)
        )
        self.frozen = {}
        for name, folder in stage.frozen.items():
            self.frozen[name] = self.strategy.prepare(load_actor(folder, config, self.strategy, trainable=False))
            self.frozen[name].eval()
        self.forward = stage.forward(self.frozen)
        self.extragradient = Extragradient(self.actor) if self.algorithm.extragradient else None
        return self

    def __exit__(self, *_: object) -> None:
        for model in (self.actor, *self.frozen.values()):
            destroy(model)
        del model, self.actor, self.optimizer, self.scheduler, self.frozen, self.forward, self.extragradient
        release_memory()

    def restore(self) -> int:
        """Take up the latest checkpoint, if there is one; returns the step after which training goes on."""
        state = self.checkpoints.restore(self.actor.model)
        if state is None or state["step"] < self.stage.first:
            return self.stage.first
        if state["step"] > self.stage.first:  # otherwise it is the end of the stage before
            self.algorithm.load_state_dict(state["algorithm"])
            self.ahead = state.get("ahead")  # not in checkpoints of earlier versions
            self.stage.clock.cost.update(state["cost"])
        return state["step"]

    def step(self, number: int, samples: Any) -> tuple[dict[str, Any], Tensor]:
        """One optimiser step on this rank's samples. Returns its metrics, and what was recorded of every sample of all
        ranks, shape (train.batch_size, c).

        Raises NotFiniteError on every rank if a loss, a log-probability or the gradient is not finite.
        """
        # Dropout draws the same numbers in a step, whether or not training was resumed before it.
        seed_generators(self.config.train.seed, self.stage.generator, number, self.strategy.get_rank())
        self.actor.train()
        if self.extragradient:
            self.extragradient.step = number
        learning_rate = self.scheduler.get_last_lr()[0]
        with self.stage.clock("train"):
            parts = self._micro_batches(samples)
            rows = [self._micro_step(number, samples[part], len(samples), part is parts[-1]) for part in parts]
            table = self.strategy.all_gather(torch.cat(rows)).cpu()
        self._latest = samples[parts[-1]]
        losses, watched, tokens, recorded = table[:, 0], table[:, 1], table[:, 2], table[:, 3:]
        place, dtype = f"{self.stage.label}, step {number}", self.config.ds.param_dtype
        causes, metrics = self.forward.summary(recorded)
        metrics = {"loss": losses.mean().item(), **metrics, "grad_norm": self.strategy.get_grad_norm(self.actor)}
        check_figures(causes | {"loss": metrics["loss"], "gradient norm": metrics["grad_norm"]}, place, dtype)
        figures = self.algorithm.after_step(watched)
        check_figures({f"metric {name}": value for name, value in figures.items()}, place, dtype)
        cost = self.stage.clock.cost
        cost["tokens_trained"] = cost.get("tokens_trained", 0) + int(tokens.double().sum())
        metrics |= {"learning_rate": learning_rate, **figures}
        return {f"train/{name}": value for name, value in metrics.items()}, recorded

    @torch.no_grad()
    def watched(self, number: int, samples: Any) -> Tensor:
        """What the algorithm watches of this rank's samples of a step, under the policy as it is: shape (samples,), on the
        CPU. No step is taken."""
        self.actor.eval()
        batches = (self.forward.batch(self.actor, samples[part], number) for part in self._micro_batches(samples))
        return torch.cat([self.algorithm.watched(batch) for batch in batches]).cpu()

    def end_step(self, number: int, ahead: Callable[[], Any] = lambda: None) -> None:
        """Check the policy and save a checkpoint where one is due, or the stage ends, with what the source has ``ahead``.
        Raises NotFiniteError on every rank if a weight of the policy, or a log-probability of its latest responses, is not
        finite: a step may be finite and lead out of the range."""
        every, last = self.config.ckpt.save_steps, number == self.stage.last
        due = (every > 0 and number % every == 0) or (last and self.stage.keeps_optimizer)
        if due or last:
            self.actor.eval()
            with torch.no_grad():
                log_probs = self.forward.log_probs(self.actor, self._latest)
            self.actor.train()
            place = f"{self.stage.label}, after step {number}"
            check_trained(self.actor, log_probs, place, self.config.ds.param_dtype)
        if due:
            cost = self.stage.clock.cost
            state = {"step": number, "algorithm": self.algorithm.state_dict(), "ahead": ahead(), "cost": cost}
            self.checkpoints.save(self.actor.model, number, state)

    def write_policies(self) -> None:
        """The policy of each adapter, see ``write_policy``."""
        for adapter, destination in self.stage.policies.items():
            write_policy(self.actor, self.tokenizer, destination, self.strategy, adapter)

    def _micro_batches(self, samples: Any) -> list[slice]:
        """Filled to the budget of tokens if the model takes packed rows, and equally many on every rank, because they gather
        weights and gradients together."""
        train = self.config.train
        if self.actor.head is None or self.algorithm.coupled:
            size = train.micro_batch_size
            return [slice(start, start + size) for start in range(0, len(samples), size)]
        parts = filled(self.forward.tokens(samples), token_budget(self.config))
        return split_into(parts, max(ranks.gather(len(parts))))

    def _micro_step(self, number: int, samples: Any, of: int, last: bool) -> Tensor:
        """Forward, backward, and the optimiser after the last micro-batch of a step. of: the rank's samples in the step.
        Returns (batch, 3 + c), detached: loss, what the algorithm watches, tokens, and what is recorded."""
        batch = self.forward.batch(self.actor, samples, number)
        losses = self.forward.losses(batch)
        self.strategy.accumulate(losses.sum() / of, self.actor, last)
        with resting(self.actor, self.algorithm.resting(number)):
            self.strategy.optimizer_step(self.optimizer, self.actor, self.scheduler)
        columns = torch.stack(
            [losses, self.algorithm.watched(batch), losses.new_tensor(self.forward.tokens(samples))], dim=1
        )
        return torch.cat([columns, self.forward.recorded(batch)], dim=1).detach()
