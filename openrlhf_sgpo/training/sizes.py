"""How many prompts, pairs and optimiser steps the stages of a run have, and whether that is enough. Imports no torch."""

from __future__ import annotations

from openrlhf_sgpo.algorithms import Algorithm
from openrlhf_sgpo.config import Config, TrainSettings
from openrlhf_sgpo.flags import refuse


def optimiser_steps(pairs: int, epochs: int, train: TrainSettings, world_size: int) -> int:
    """Steps that a stage takes: ``--train.max_steps``, or those of its epochs, in which each rank has its share of the pairs
    in whole micro-batches, which go on over epochs."""
    if train.max_steps:
        return train.max_steps
    size = train.micro_batch_size
    return epochs * (pairs // world_size // size) // (train.batch_size // size // world_size)


def stage_epochs(number: int, config: Config) -> int:
    return config.seed.max_epochs if number == 0 and config.rounds.count > 0 else config.train.max_epochs


def prompt_counts(config: Config, available: int) -> list[int]:
    """Prompts of each round. Raises ValueError if there are too few."""
    rounds = config.rounds
    counts = list(rounds.prompts) or [available // rounds.count] * rounds.count
    if sum(counts) > available or 0 in counts:
        raise ValueError(
            f"--data.prompt_dataset holds {available} usable prompts, {rounds.count} rounds need "
            f"{counts or 'at least one each'}: lower --rounds.prompts or --rounds.count"
        )
    return counts


def too_few(pairs: int, epochs: int, config: Config, world_size: int) -> str:
    """Why so many pairs train nothing, and what to do; empty if they do."""
    batch = config.train.batch_size
    if pairs < batch:
        return f"{pairs} pairs are fewer than --train.batch_size {batch}, so that no optimiser step would be taken: lower it"
    return without_learning_rate(optimiser_steps(pairs, epochs, config.train, world_size), config)


def warmup_ratio(steps: int, config: Config) -> float:
    """``--lr_warmup_ratio``, but none for a stage of one step: OpenRLHF rounds the warm-up up to whole steps, and the first of
    them has learning rate 0."""
    return 0.0 if steps == 1 and config.lr_warmup_ratio < 1 else config.lr_warmup_ratio


def without_learning_rate(steps: int, config: Config) -> str:
    """Why a schedule of so many steps moves nothing; empty if it does."""
    if steps > 1 or config.lr_scheduler == "constant" or config.lr_warmup_ratio < 1:
        return ""
    return (
        "the one optimiser step has learning rate 0, because --lr_warmup_ratio 1 makes it the warm-up: lower that, or take "
        "more steps by a lower --train.batch_size"
    )


def check_sizes(
    config: Config, algorithm: type[Algorithm], pairs: int | None, prompts: int | None, world_size: int
) -> None:
    """Raises SettingsError with every stage that so many usable human pairs and prompts, None where that is not known, leave
    with too few. Of a round the pairs are not known yet, but they are not more than its prompts."""
    if problem := config.train.uneven(world_size):
        refuse([problem])
    problems, counts = [], []
    if algorithm.fresh_answers:
        batch = config.train.batch_size
        if prompts is not None and prompts < batch:
            problems.append(
                f"--data.prompt_dataset holds {prompts} usable prompts, fewer than --train.batch_size {batch}: give more, "
                "or lower it"
            )
        if reason := without_learning_rate(config.rounds.count * config.rounds.steps, config):
            problems.append(f"--rounds.steps {config.rounds.steps}: {reason}")
        refuse(problems)
        return
    if pairs is not None and config.seed.size > pairs:
        problems.append(f"--seed.size {config.seed.size} exceeds the {pairs} pairs of --data.dataset; lower it")
    seed = config.seed.size or pairs
    if seed is not None and (reason := too_few(seed, stage_epochs(0, config), config, world_size)):
        problems.append(f"--data.dataset: {reason}")
    if config.rounds.count and prompts is not None:
        try:
            counts = prompt_counts(config, prompts)
        except ValueError as error:
            problems.append(str(error))
    for number, count in enumerate(counts if config.rounds.data == "new" else [], start=1):
        if reason := too_few(count, config.train.max_epochs, config, world_size):
            problems.append(f"round {number} with {count} prompts: {reason}")
    refuse(problems)
