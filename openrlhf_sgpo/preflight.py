"""Checks of a run by its files and their sizes, before torch is imported and a model is loaded."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms import Algorithm
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.files import check_data_source, count_rows
from openrlhf_sgpo.fork import check_source as check_fork
from openrlhf_sgpo.resume import accepted_changes
from openrlhf_sgpo.run_folder import RunFolder
from openrlhf_sgpo.training.sizes import check_sizes


def check_run(config: Config, algorithm: type[Algorithm], options: Any) -> None:
    """Raises ValueError if data files are missing, of an unknown kind or too small for a stage, if --data.max_len exceeds the
    model's positions, or if the run folder is unusable. Rows of hub datasets and JSON arrays are not counted."""
    data, is_first = config.data, os.environ.get("RANK", "0") == "0"
    prompts = data.prompt_dataset if config.rounds.count else ""
    counts = []
    for source, split in (
        (data.dataset, data.dataset_split),
        (prompts, data.prompt_split),
        (config.eval.dataset, config.eval.split),
    ):
        # The machine of another rank need not have the files.
        is_here = source and (is_first or os.path.exists(source))
        if is_here:
            check_data_source(source, split)
        counts.append(count_rows(source) if is_here else None)
    pairs = None if algorithm.fresh_answers else counts[0]
    if pairs is not None and data.max_samples:
        pairs = min(pairs, data.max_samples)
    check_sizes(config, algorithm, pairs, counts[1], int(os.environ.get("WORLD_SIZE", "1")))
    _check_positions(config)
    if is_first:  # other ranks would find the folder held by rank 0
        _check_folder(config, algorithm, options)


def _check_positions(config: Config) -> None:
    """The same check as in ``load_chat``, if the model's config.json is local."""
    model = config.model.model_name_or_path
    try:
        settings = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
        longest = settings.get("text_config", settings).get("max_position_embeddings", config.data.max_len)
    except (OSError, ValueError, AttributeError):
        return  # a hub name, or a problem that loading reports
    if isinstance(longest, int) and config.data.max_len > longest:
        raise ValueError(
            f"--data.max_len {config.data.max_len} exceeds the {longest} positions of --model.model_name_or_path {model}; "
            "lower it"
        )


def _check_folder(config: Config, algorithm: type[Algorithm], options: Any) -> None:
    folder = RunFolder(config.ckpt.output_dir)
    existing = next(parent for parent in (folder.path, *folder.path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"--ckpt.output_dir {folder.path}: {existing} cannot be written to ({error.strerror}); choose another folder, or "
            "change its permissions"
        ) from error
    resolved = {"": replace(config, resume=False), algorithm.name: options}
    folder.check_free()
    accepted_changes(folder, config, algorithm, flags.dump(resolved))
    if config.ckpt.fork_from:
        check_fork(RunFolder(config.ckpt.fork_from), folder, flags.to_dict(resolved), {})
