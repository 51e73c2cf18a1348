from __future__ import annotations

import pytest


@pytest.fixture
def make_config(tiny_model, tmp_path):
    """A configuration for the tiny model in fp32, with changes by dotted name."""

    def make(**changes):
        from openrlhf_sgpo.config import Config

        config = Config()
        config.model.model_name_or_path = config.ref.model_name_or_path = str(tiny_model)
        config.ckpt.output_dir = str(tmp_path / "run")
        config.train.batch_size, config.train.micro_batch_size = 4, 2
        config.ds.param_dtype, config.ds.zero_stage = "fp32", 0
        config.adam.lr = 1e-3
        for name, value in changes.items():
            group, _, leaf = name.rpartition("__")
            target = config
            for part in filter(None, group.split("__")):
                target = getattr(target, part)
            setattr(target, leaf, value)
        return config

    return make


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def groups(tokenizer, tiny_data):
    """Tokens of the tiny pairs: prompts and responses of different lengths."""
    from openrlhf_sgpo.data import load_pairs
    from openrlhf_sgpo.data.tokens import ChatFormat

    chat = ChatFormat(tokenizer, 256)
    return [chat.pair(pair) for pair in load_pairs(str(tiny_data["pairs"]))]
