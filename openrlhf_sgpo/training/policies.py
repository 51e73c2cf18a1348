"""A policy in training: from a folder into memory with its optimiser, and into a folder again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from openrlhf_sgpo import ranks
from openrlhf_sgpo.finite import NotFiniteError, weight_not_finite
from openrlhf_sgpo.openrlhf import DEFAULT_ADAPTER, load_actor, save_policy
from openrlhf_sgpo.run_folder import whole_folder
from openrlhf_sgpo.training.sizes import warmup_ratio

if TYPE_CHECKING:
    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.openrlhf import Actor, DeepspeedStrategy


def load_trained(
    start: str,
    config: Config,
    strategy: DeepspeedStrategy,
    learning_rate: float,
    steps: int,
    generator: str,
    adapters: Mapping[str, float] | None = None,
) -> tuple[Actor, Any, Any]:
    """The policy in ``start`` with its optimiser and a schedule over ``steps``, prepared by the strategy. Collective.

    generator: names the random numbers with which adapters begin. adapters: names of the LoRA adapters where there are several,
    each with its multiple of the learning rate.
    """
    # The same numbers whatever the process did before.
    seed_generators(config.train.seed, generator)
    actor = load_actor(start, config, strategy, trainable=True, adapters=tuple(adapters or (DEFAULT_ADAPTER,)))
    if adapters:
        actor.learning_rates = {name: multiple * learning_rate for name, multiple in adapters.items()}
    settings = {
        "optim": "adam",
        "adam": vars(config.adam) | {"lr": learning_rate},
        "lr_scheduler": config.lr_scheduler,
        "lr_warmup_ratio": warmup_ratio(steps, config),
        "min_lr_ratio": config.min_lr_ratio,
        "max_norm": config.max_norm,
        "scheduler_steps": steps,
    }
    return strategy.prepare((actor, settings))


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


def seed_generators(*parts: object) -> None:
    """Seed torch's generators, of the GPUs too, with a number that stands for ``parts``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)
