"""Weights that a folder lacks would be made up by transformers, and differently in every process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def headless(tiny_model, tmp_path) -> str:
    """A model whose config.json says that its head is not the embedding, and whose weights have no head."""
    folder = shutil.copytree(tiny_model, tmp_path / "headless")
    settings = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    return str(folder)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_model_that_lacks_weights_is_refused(headless, make_config, zero_stage):
    from openrlhf_sgpo.data.tokens import load_chat
    from openrlhf_sgpo.openrlhf import build_strategy, load_actor
    from openrlhf_sgpo.rollout import start_rollout

    config = make_config(ds__zero_stage=zero_stage, rollout__engine="hf")
    strategy = build_strategy(config)
    problem = rf"{headless} lacks weights of its model, which would be random \(lm_head.weight; 1 in all\)"
    for trainable in (True, False):
        with pytest.raises(ValueError, match=problem):
            load_actor(headless, config, strategy, trainable=trainable)
    with pytest.raises(ValueError, match=problem):
        start_rollout(config, load_chat(headless, False, "model", 64)[0], headless)
