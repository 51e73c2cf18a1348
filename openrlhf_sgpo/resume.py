"""Settings that a resumed run may change: those on which no finished result depends.

Some may always change (``run_folder.FREE``). Others are read only by later stages: more rounds, training settings before any
training, and a smaller batch for a round with too few pairs. Does not import torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from openrlhf_sgpo.algorithms import Algorithm
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.run_folder import STORED, RunFolder, read_configuration
from openrlhf_sgpo.training.sizes import stage_epochs, too_few

_SEED = ("seed.lr", "seed.max_epochs")
_ROUND = ("adam.lr", "train.max_epochs")
TRAINING = (
    *(
        "adam.",
        "train.batch_size",
        "train.micro_batch_size",
        "train.max_steps",
        "train.nll_coef",
        "lr_",
        "min_lr_ratio",
        "max_norm",
    ),
    *(*_SEED, *_ROUND),
)
COUNT = ("rounds.count", "rounds.prompts")


def accepted_changes(
    folder: RunFolder, config: Config, algorithm: type[Algorithm], resolved_config: str
) -> dict[str, tuple[Any, Any]]:
    """(old, new) values of accepted settings that differ from the run in the folder.

    Raises ValueError if the folder holds a run and ``config.resume`` is off, and for changes that are not accepted, naming
    every one.
    """
    changed = folder.changes(resolved_config, config.resume)
    trained = [
        number
        for number in folder.rounds()
        if {"train", "play"} & folder.manifest(number)["stages"].keys()
        or (folder.round(number) / "checkpoints").exists()
        or (folder.path / "checkpoints").exists()
    ]
    why = ""
    of_training = (*TRAINING, f"{algorithm.name}.")
    accepted = {
        key
        for key in changed
        if key.startswith(of_training) and not any(_reads(key, number, config, algorithm) for number in trained)
    }
    if changed.keys() & set(COUNT):
        why = _why_not_other_rounds(folder, config, algorithm, trained)
        accepted |= set() if why else set(COUNT)
    if "train.batch_size" in changed and not algorithm.fresh_answers:
        old, _ = changed["train.batch_size"]
        accepted |= {"train.batch_size"} if _is_stuck(folder, config, old) else set()
    if "seed.lr" in changed.keys() - accepted and "adam.lr" in changed:
        why += f"\nWithout --seed.lr the seed stage follows --adam.lr: add --seed.lr {changed['seed.lr'][0]} to keep its value"
    folder.refuse({key: values for key, values in changed.items() if key not in accepted}, why)
    return changed


def _reads(key: str, number: int, config: Config, algorithm: type[Algorithm]) -> bool:
    """Whether the training of this round depends on this training setting."""
    if config.rounds.count == 0 or algorithm.fresh_answers:
        return True
    if key.startswith(f"{algorithm.name}."):
        return number > 0 or not algorithm.needs.rounds
    return number == 0 if key in _SEED else number > 0 if key in _ROUND else True


def _why_not_other_rounds(folder: RunFolder, config: Config, algorithm: type[Algorithm], trained: list[int]) -> str:
    """Why the planned rounds cannot be changed; empty if they can."""
    count, prompts = config.rounds.count, config.rounds.prompts
    old = read_configuration(folder.path / STORED).get("rounds", {}).get("count")
    if (count == 0) != (old == 0):
        return "\nWithout rounds the human pairs are trained on with other settings: choose another --ckpt.output_dir"
    if algorithm.fresh_answers:
        if not trained or (config.lr_scheduler == "constant" and (folder.path / "checkpoints").exists()):
            return ""
        return (
            f"\nThe learning rate of --algo {algorithm.name} follows one schedule over all rounds (except --lr_scheduler "
            "constant), and a run that has ended no longer has its optimiser: choose another --ckpt.output_dir"
        )
    stages = {number: folder.manifest(number)["stages"] for number in folder.rounds()}
    used = [finished["generate"]["prompts"] for _, finished in sorted(stages.items()) if "generate" in finished]
    if not used or prompts[: len(used)] == used:
        return ""
    listed = " ".join(map(str, used))
    return (
        f"\nThe rounds so far had {listed} prompts, which an even split over --rounds.count {count} or other --rounds.prompts "
        f"would change: give --rounds.prompts {listed}, followed by the numbers for later rounds"
    )


def _is_stuck(folder: RunFolder, config: Config, old: int) -> bool:
    """Whether a round has too few pairs for the old batch, so the run cannot continue, but enough for the new one."""
    if config.rounds.data == "all":
        return False
    before = replace(config, train=replace(config.train, batch_size=old))
    for number in folder.rounds():
        stages = folder.manifest(number)["stages"]
        if "pairs" in stages and "train" not in stages:
            size = stages["pairs"]["pairs"], stage_epochs(number, config)
            return bool(too_few(*size, before, 1)) and not too_few(*size, config, 1)
    return False
