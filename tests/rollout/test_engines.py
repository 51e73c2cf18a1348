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


# So that three of these prompts are in a batch, a long one is read in chunks, and two long answers crowd a third out.
CROWDED = {
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 3,
    "block_size": 32,
    "num_gpu_blocks_override": 5,
}


@pytest.fixture(scope="module", params=[pytest.param("vllm", marks=pytest.mark.slow), "hf"])
def rollout(request, tiny_model, other_tiny_model):
    """One rollout for the module, of the tiny model and the other one as its reference: engines take their time to start. Two
    engines for vLLM."""
    from openrlhf_sgpo.data.tokens import ChatFormat, load_tokenizer
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.rollout import start_rollout, vllm_on_cpu

    config = configuration(request.param)
    build_strategy(config)
    chat = ChatFormat(load_tokenizer(str(tiny_model), False, "model.model_name_or_path"), 64)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CROWDED.items():
            patch.setitem(vllm_on_cpu.CPU_ENGINE_ARGUMENTS, name, value)
        engine = start_rollout(config, chat, str(tiny_model), str(other_tiny_model))
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


def test_the_ends_of_the_mixture_are_reference_and_policy(rollout, other_tiny_model):
    """Token for token, temperature and top_p included."""

    def sampled(share):
        return rollout.generate(PROMPTS, Sampling(0.7, 0.9, 8, seed=5, n=2, share=share), label="")

    policy, reference, middle = sampled(0.0), sampled(1.0), sampled(0.5)
    assert policy != reference and middle not in (policy, reference)
    rollout.load(str(other_tiny_model))
    assert sampled(0.0) == sampled(0.5) == reference


LONG = [tuple(3 + (7 * place + place * place) % 250 for place in range(length)) for length in (40, 20, 50, 3)]
MANY = [*PROMPTS, *LONG, LONG[0][:34] + (9, 8), *TEXTS]


def mixture_log_probs(folders, share, tokens):
    """Of the next token at each place, by the two models in transformers."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
            for folder in folders
        )
    return ((1 - share) * policy + share * reference).log_softmax(-1)


@pytest.mark.parametrize("share", [0.125, 0.5])
def test_the_likeliest_answers_of_the_mixture(rollout, share, tiny_model, other_tiny_model):
    """Taken by the policy alone before: its cached keys and values are no use to the mixture."""
    alone, mixed = (
        rollout.generate(MANY, Sampling(0.0, 1.0, 12, seed=5, share=share), label="") for share in (0.0, share)
    )
    for prompt, (answer,) in zip(MANY, mixed, strict=True):
        log_probs = mixture_log_probs((tiny_model, other_tiny_model), share, prompt + answer.token_ids)
        taken = log_probs[len(prompt) - 1 : -1]
        best = taken.max(-1).values - taken.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert best.max() < 1e-4
    assert alone != mixed


@pytest.mark.parametrize("rollout", [pytest.param("vllm", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("share", [0.0, 0.125, 0.5, 1.0])
def test_an_engine_draws_from_the_mixture_of_transformers(rollout, share, tiny_model, other_tiny_model):
    """The probabilities with which it drew its tokens are those of the two models without an engine, for prompts of any length,
    more of them than a batch holds, and answers that are taken out of the batch and begun again."""
    import ray
    from vllm import SamplingParams

    rollout.generate(PROMPTS, Sampling(1.0, 1.0, 1, seed=5, share=share), label="")
    parameters = SamplingParams(temperature=1.0, max_tokens=14, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = ray.get([rollout.engines[0].generate.remote(list(prompt), parameters) for prompt in 2 * MANY])
    for prompt, output in zip(2 * MANY, outputs, strict=True):
        (answer,) = output.outputs
        log_probs = mixture_log_probs((tiny_model, other_tiny_model), share, prompt + tuple(answer.token_ids))
        exact = log_probs[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0].tolist()
        drawn = [row[token].logprob for token, row in zip(answer.token_ids, answer.logprobs, strict=True)]
        assert len(drawn) == 14 and drawn == pytest.approx(exact, abs=1e-4)
