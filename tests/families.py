"""Small models of families of transformers, and tokens for them."""

from __future__ import annotations

import torch
import transformers

from openrlhf_sgpo.data.tokens import Group

GROUPS = [
    Group((1, 2, 3), ((4, 5), (6, 7, 8, 9), (10,))),
    Group((11,), ((12, 13, 14),)),
    Group((15, 16, 17, 18), ((19,), (20, 21))),
]

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}


def make_model(family, **settings):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**SMALL | settings)
    return config, transformers.AutoModelForCausalLM.from_config(config).double().eval()
