"""One stage of training: a policy folder and pairs in, a policy folder out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import PreTrainedTokenizerBase

from openrlhf_sgpo import ranks
from openrlhf_sgpo.algorithms.base import Algorithm
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.finite import NotFiniteError, weight_not_finite
from openrlhf_sgpo.memory import release_memory
from openrlhf_sgpo.metrics import Metrics
from openrlhf_sgpo.openrlhf import DEFAULT_ADAPTER, Actor, DeepspeedStrategy, load_actor, save_policy
from openrlhf_sgpo.run_folder import whole_folder
from openrlhf_sgpo.training.checkpoints import Checkpoints
from openrlhf_sgpo.training.sizes import optimiser_steps, too_few, warmup_ratio
from openrlhf_sgpo.training.trainer import PairDataset, PairTrainer, seed_generators


def check_enough(label: str, pairs: int, epochs: int, config: Config) -> int:
    """Steps of a stage with so many pairs. Raises ValueError if they train nothing."""
    world_size = distributed.get_world_size()
    if reason := too_few(pairs, epochs, config, world_size):
        raise ValueError(f"{label}: {reason}, and add --resume")
    return optimiser_steps(pairs, epochs, config.train, world_size)


def load_trained(
    start: str,
    config: Config,
    strategy: DeepspeedStrategy,
    learning_rate: float,
    steps: int,
    label: str,
    adapters: Mapping[str, float] | None = None,
) -> tuple[Actor, Any, Any]:
    """The policy in ``start`` with its optimiser and a schedule over ``steps``, prepared by the strategy.

    adapters: names of the LoRA adapters where there are several, each with its multiple of the learning rate.
    """
    # Adapters begin at random: with numbers of this stage, whatever the process did before.
    seed_generators(config.train.seed, label)
    actor = load_actor(start, config, strategy, trainable=True, adapters=tuple(adapters or (DEFAULT_ADAPTER,)))
    if adapters:
        actor.learning_rates = {name: multiple * learning_rate for name, multiple in adapters.items()}
    optimizer_settings = {
        "optim": "adam",
        "adam": vars(config.adam) | {"lr": learning_rate},
        "lr_scheduler": config.lr_scheduler,
        "lr_warmup_ratio": warmup_ratio(steps, config),
        "min_lr_ratio": config.min_lr_ratio,
        "max_norm": config.max_norm,
        "scheduler_steps": steps,
    }
    return strategy.prepare((actor, optimizer_settings))


def write_policy(
    actor: Actor,
    tokenizer: PreTrainedTokenizerBase,
    destination: Path,
    strategy: DeepspeedStrategy,
    adapter: str = DEFAULT_ADAPTER,
) -> None:
    """The policy as a Hugging Face folder that has its name once it is whole. Collective. Raises NotFiniteError on every rank
    if one of its weights is not finite."""
    name = weight_not_finite(actor)
    ranks.raise_together(
        NotFiniteError(f"{destination} is not written: its weight {name} is not finite") if name else None
    )
    # Rank 0 writes; the others take part in gathering and wait for the final name.
    if strategy.is_rank_0():
        with whole_folder(destination) as folder:
            save_policy(actor, tokenizer, str(folder), strategy, adapter)
    else:
        save_policy(actor, tokenizer, str(destination), strategy, adapter)
    ranks.barrier()


def train_stage(
    algorithm: Algorithm,
    groups: list[Group],
    reference: Sequence[tuple[float, ...]],
    *,
    start: str,
    loss_reference: str,
    destination: Path,
    epochs: int,
    learning_rate: float,
    label: str,
    config: Config,
    strategy: DeepspeedStrategy,
    tokenizer: PreTrainedTokenizerBase,
    metrics: Metrics,
) -> int:
    """Train the policy in ``start`` on pairs with known reference log-probabilities; returns the tokens trained on.

    reference: log-probabilities of (chosen, rejected) under ``loss_reference``, which is loaded only for an algorithm that
    extrapolates logits. Goes on from the checkpoints beside ``destination`` if an earlier process left some. Collective.
    Raises ValueError if the pairs are too few for one optimiser step.
    """
    steps = check_enough(label, len(groups), epochs, config)
    actor, optimizer, scheduler = load_trained(start, config, strategy, learning_rate, steps, label)
    held = None
    if algorithm.extrapolation:
        held = strategy.prepare(load_actor(loss_reference, config, strategy, trainable=False))
        held.eval()
    dataset = PairDataset(groups, reference)
    loader = strategy.setup_dataloader(dataset, config.train.micro_batch_size, shuffle=True, collate_fn=dataset.collate)
    trainer = PairTrainer(
        algorithm=algorithm,
        layout=config.train.layout,
        metrics=metrics,
        stage=label,
        steps=steps,
        checkpoints=Checkpoints(destination.with_name("checkpoints"), strategy),
        reference=held,
        model=actor,
        strategy=strategy,
        tokenizer=tokenizer,
        optim=optimizer,
        train_dataloader=loader,
        scheduler=scheduler,
        max_norm=config.max_norm,
        beta=config.model.beta,
        max_epochs=max(epochs, math.ceil(steps * strategy.accumulated_gradient / len(loader))),
    )
    try:
        consumed = trainer.restore()
        metrics.rewind(label, consumed // config.train.batch_size)
        trainer.fit(consumed_samples=consumed)
        write_policy(actor, tokenizer, destination, strategy)
        return int(strategy.all_reduce(trainer.tokens_trained, "sum"))
    finally:
        actor.model.destroy()
        if held is not None:
            held.model.destroy()
        del trainer, actor, held, optimizer, scheduler
        release_memory()
