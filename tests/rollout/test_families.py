"""Engines take over weights of models whose layers vLLM packs, or fills, in ways of their own."""

from __future__ import annotations

import pytest
import torch
import transformers

from openrlhf_sgpo.config import Config

SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    # vLLM puts packed experts in the place of plain ones.
    "Qwen3Moe": {"moe_intermediate_size": 64, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2},
    # Its loader reorders queries, keys and values before it copies them.
    "GPTNeoX": {},
}
TEXTS = [(5, 6, 7, 8, 9, 10, 11), (20, 21, 22)]


@torch.no_grad()
def log_probs_of(folder: str) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [model(torch.tensor([text])).logits[0, :-1].log_softmax(-1) for text in TEXTS]
    return [
        float(row[place, token]) for row, text in zip(rows, TEXTS, strict=True) for place, token in enumerate(text[1:])
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_engines_compute_with_the_new_weights(family, tiny_model, tmp_path):
    from openrlhf_sgpo.data.tokens import load_chat
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.rollout import start_rollout

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    config_class, model_class = (getattr(transformers, f"{family}{name}") for name in ("Config", "ForCausalLM"))
    folders = [str(tmp_path / name) for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model_class(config_class(vocab_size=len(tokenizer), **SIZES, **FAMILIES[family])).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = Config()
    config.rollout.engine, config.model.model_name_or_path = "vllm", folders[0]
    config.ds.param_dtype, config.data.max_len, config.vllm.num_engines = "fp32", 64, 1
    config.train.batch_size = config.train.micro_batch_size = 1
    build_strategy(config)
    rollout = start_rollout(config, load_chat(folders[0], False, "model", 64)[0], folders[0])
    try:
        for folder in (*folders, folders[0]):
            rollout.load(folder)
            actual = [value for row in rollout.log_probs(TEXTS) for value in row]
            assert actual == pytest.approx(log_probs_of(folder), abs=1e-4), folder
        # What is reordered in memory of its own cannot be proved.
        assert rollout.compared == 1 if family != "GPTNeoX" else 0.5 < rollout.compared < 1
    finally:
        rollout.close()
