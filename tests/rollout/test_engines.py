"""Rollout engines, started for real: vLLM on Ray through OpenRLHF's actor, and transformers."""

from __future__ import annotations

import pytest
import torch

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.rollout import Sampling

PROMPTS = [(1, 10, 20, 30), (1, 40, 50, 60, 70, 80), (1, 9)]
TEXTS = [(1, 10, 20, 30, 40, 50), (1, 99, 98, 97, 3, 4, 5)]


def configuration(engine: str) -> Config:
    config = Config()
    config.rollout.engine = engine
    config.ds.param_dtype, config.data.max_len = "fp32", 64
    config.train.batch_size = config.train.micro_batch_size = 1
    config.vllm.num_engines = 2
    return config


@pytest.fixture(scope="module", params=[pytest.param("vllm", marks=pytest.mark.slow), "hf"])
def rollout(request, tiny_model):
    """One rollout for the module: engines take their time to start. Two engines for vLLM."""
    from openrlhf_sgpo.data.tokens import ChatFormat, load_tokenizer
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.rollout import start_rollout

    config = configuration(request.param)
    build_strategy(config)
    chat = ChatFormat(load_tokenizer(str(tiny_model), False, "model.model_name_or_path"), 64)
    engine = start_rollout(config, chat, str(tiny_model))
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def first_weights(rollout, tiny_model):
    rollout.load(str(tiny_model))


def transformers_log_probs(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for text in TEXTS:
        tokens = torch.tensor([text])
        log_probs = model(tokens).logits[0, :-1].log_softmax(-1)
        rows.append(log_probs.gather(-1, tokens[0, 1:, None])[:, 0].tolist())
    return rows


def flat(rows):
    return [value for row in rows for value in row]


def test_log_probs_are_those_of_transformers(rollout, tiny_model):
    assert flat(rollout.log_probs(TEXTS)) == pytest.approx(flat(transformers_log_probs(tiny_model)), abs=1e-4)


def test_loading_replaces_every_weight_tied_embeddings_included(rollout, tiny_model, other_tiny_model):
    rollout.load(str(other_tiny_model))
    assert getattr(rollout, "compared", 1.0) == 1.0
    loaded = flat(rollout.log_probs(TEXTS))
    assert loaded == pytest.approx(flat(transformers_log_probs(other_tiny_model)), abs=1e-4)
    assert loaded != pytest.approx(flat(transformers_log_probs(tiny_model)), abs=0.1)


def test_n_samples_per_prompt_in_order_and_within_the_limit(rollout):
    samples = rollout.generate(PROMPTS, Sampling(1.0, 1.0, 8, seed=5, n=3), label="test")
    assert [len(group) for group in samples] == [3, 3, 3]
    assert all(0 < answer.tokens <= 8 for group in samples for answer in group)
    assert all(answer.truncated == (answer.tokens == 8) or answer.tokens == 8 for group in samples for answer in group)
    assert len({answer.text for group in samples for answer in group}) > 4, "samples of a random model should differ"


def test_the_seed_decides_the_samples(rollout):
    first = rollout.generate(PROMPTS, Sampling(1.0, 1.0, 8, seed=5, n=2), label="test")
    assert rollout.generate(PROMPTS, Sampling(1.0, 1.0, 8, seed=5, n=2), label="test") == first
    assert rollout.generate(PROMPTS, Sampling(1.0, 1.0, 8, seed=6, n=2), label="test") != first


def test_samples_follow_the_new_weights(rollout, other_tiny_model):
    """Equal seeds and prompts: if cached keys and values of the old weights were reused, samples would not change."""
    before = rollout.generate(PROMPTS, Sampling(1.0, 1.0, 8, seed=5, n=2), label="test")
    rollout.load(str(other_tiny_model))
    after = rollout.generate(PROMPTS, Sampling(1.0, 1.0, 8, seed=5, n=2), label="test")
    assert after != before


def test_the_probe_accepts_the_new_policy_and_rejects_the_old_one(rollout, tiny_model, other_tiny_model):
    from openrlhf_sgpo.data.tokens import Group
    from openrlhf_sgpo.training.probe import WeightSyncError, check_weights_arrived

    probes = [Group(text[:2], (text[2:],)) for text in TEXTS]
    old, new = ([sum(row[1:]) for row in transformers_log_probs(folder)] for folder in (tiny_model, other_tiny_model))
    with pytest.raises(WeightSyncError, match="does not hold the trained policy"):
        check_weights_arrived(rollout, probes, new, old, "fp32", noise=1e-5)
    rollout.load(str(other_tiny_model))
    figures = check_weights_arrived(rollout, probes, new, old, "fp32", noise=1e-5)
    assert figures["engine_to_trainer"] < 1e-4 < figures["moved_by_training"]
