"""Configurations of published models, written out; their weights are not needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

_LAYERS = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
CONFIGS = {
    "Mistral-7B-v0.1": {"model_type": "mistral", "vocab_size": 32000, "num_key_value_heads": 8, **_LAYERS},
    "Llama-3-8B": {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, **_LAYERS},
    # As large, in seven layers, which are counted sooner.
    "wide": {
        **{"model_type": "llama", "vocab_size": 32000, "num_key_value_heads": 8, "num_hidden_layers": 7},
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
    },
}


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, str]:
    """Folders by the models' names."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        Path(folder, name).mkdir()
        Path(folder, name, "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return {name: str(folder / name) for name in CONFIGS}
