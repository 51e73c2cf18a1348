"""A tiny reward model of OpenRLHF's own class, and its rewards without this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

import openrlhf_sgpo.openrlhf  # noqa: F401 - makes flash_attn optional

from openrlhf.models.model import _get_reward_model  # isort: skip


def _class_and_settings(folder: Path, normalise: bool) -> tuple[Any, Any]:
    config = AutoConfig.from_pretrained(folder)
    config.normalize_reward = normalise
    base = AutoModel._model_mapping[type(config)]
    return _get_reward_model(base.__base__, base), config


def make_reward_model(base: Path, folder: Path, seed: int = 0, **normalisation: float) -> Path:
    """A reward model on top of ``base`` as OpenRLHF's reward trainer leaves it: weights and head, mean and std in
    config.json, tokenizer. The head is random."""
    kind, config = _class_and_settings(base, normalise=False)
    model = kind.from_pretrained(base, config=config, dtype=torch.float32)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.score.weight)
    for name, value in normalisation.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def rewards_alone(folder: Path, sequences: Sequence[list[int]]) -> list[float]:
    """Rewards of token rows, normalised: one row per forward, so that there is no padding.

    The model is built by its constructor, because from_pretrained of transformers 5 leaves its mean and std undefined.
    """
    kind, config = _class_and_settings(folder, normalise=True)
    model = kind(config).eval()
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    model.load_state_dict(weights)
    with torch.no_grad():
        rows = [torch.tensor([sequence]) for sequence in sequences]
        return [model(row, attention_mask=torch.ones_like(row)).item() for row in rows]


def conversation(folder: Path, prompt: str, answer: str, finished: bool = True) -> list[int]:
    """Tokens of a question and its answer as the tiny model's template writes them, up to the end of the answer's turn."""
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}{'<|im_end|>' if finished else ''}"
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
