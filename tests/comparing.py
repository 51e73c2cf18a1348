"""Small runs for the tests of comparisons."""

from __future__ import annotations

from pathlib import Path


def arguments(model: Path, data: dict[str, Path], folder: Path, seed: int, *more: str) -> list[str]:
    """A run of one round in fp32, without ``--algo`` and what only some algorithms read."""
    return [
        *("--model.model_name_or_path", str(model), "--eval.dataset", str(data["held_out"]), "--eval.max_prompts", "2"),
        *("--data.prompt_dataset", str(data["prompts"]), "--data.max_len", "128", "--ckpt.output_dir", str(folder)),
        *("--train.batch_size", "4", "--train.micro_batch_size", "2", "--train.seed", str(seed), "--adam.lr", "1e-2"),
        *("--ds.zero_stage", "0", "--ds.param_dtype", "fp32", "--rounds.count", "1", "--rollout.engine", "hf"),
        *("--rollout.max_new_tokens", "8", "--rollout.temperature", "1.0", *more),
    ]
