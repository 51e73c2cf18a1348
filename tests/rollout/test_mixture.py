"""Answers from a geometric mixture of policy and reference, with a key-value cache for both."""

from __future__ import annotations

import json

import pytest
import torch

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.rollout.base import Sampling, prompt_seed

PROMPTS = [(1, 10, 20, 30), (1, 40, 50, 60, 70, 80), (1, 9)]
NEW, SAMPLES, SEED = 8, 2, 5


@pytest.fixture(scope="module")
def rollout_with(tiny_model, other_tiny_model):
    """A rollout of the tiny model's policy, that can be mixed with the other tiny model."""
    from openrlhf_sgpo.data.tokens import ChatFormat, load_tokenizer
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.rollout.hf import HuggingFaceRollout

    config = Config()
    config.rollout.batch_size = 4
    config.ds.param_dtype, config.data.max_len = "fp32", 64
    config.train.batch_size = config.train.micro_batch_size = 1
    build_strategy(config)
    chat = ChatFormat(load_tokenizer(str(tiny_model), False, "model.model_name_or_path"), 64)
    return lambda policy=tiny_model: HuggingFaceRollout(config, chat, str(policy), str(other_tiny_model))


def sampled(rollout, share):
    answers = rollout.generate(PROMPTS, Sampling(0.7, 1.0, NEW, SEED, SAMPLES, share), label="")
    return [[answer.token_ids for answer in row] for row in answers]


def test_the_middle_is_the_mixture_of_logits(rollout_with, tiny_model, other_tiny_model):
    """Drawn again token by token, without a cache and one row at a time, with the same random numbers."""
    from transformers import AutoModelForCausalLM

    share, temperature = 0.25, 0.7
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for model in (tiny_model, other_tiny_model)
    )
    order = sorted(range(len(PROMPTS)), key=lambda index: -len(PROMPTS[index]))
    rows = [list(PROMPTS[index]) for index in order for _ in range(SAMPLES)]
    generator = torch.Generator().manual_seed(prompt_seed(SEED, PROMPTS[order[0]]))
    ended = [False] * len(rows)
    with torch.no_grad():
        for _ in range(NEW):
            logits = []
            for row in rows:
                policy_logits, reference_logits = (
                    model(torch.tensor([row])).logits[0, -1] for model in (policy, reference)
                )
                logits.append((1 - share) * policy_logits + share * reference_logits)
            drawn = torch.multinomial((torch.stack(logits) / temperature).softmax(-1), 1, generator=generator)[:, 0]
            for number, token in enumerate(drawn.tolist()):
                rows[number].append(policy.config.pad_token_id if ended[number] else token)
                ended[number] |= token == policy.config.eos_token_id
    expected = dict(zip(order, zip(rows[::SAMPLES], rows[1::SAMPLES], strict=True), strict=True))
    for index, answers in enumerate(sampled(rollout_with(), share)):
        for ids, row in zip(answers, expected[index], strict=True):
            assert list(ids) == row[len(PROMPTS[index]) :][: len(ids)]
            assert len(ids) == NEW or ids[-1] == policy.config.eos_token_id


def test_the_policy_moves_and_the_reference_stays(rollout_with, other_tiny_model):
    rollout = rollout_with()
    rollout.load(str(other_tiny_model))
    assert sampled(rollout, 0.5) == sampled(rollout, 0.0)


def test_answers_end_at_the_tokenizers_end_too(rollout_with, tiny_model, tmp_path):
    """As in vLLM: many chat models name another token in their generation settings."""
    import shutil

    other = shutil.copytree(tiny_model, tmp_path / "other")
    settings = other / "generation_config.json"
    settings.write_text(settings.read_text().replace('"eos_token_id": 2', '"eos_token_id": 77'))
    stop = rollout_with(other).stop
    assert stop.tokens == {2, 77} and rollout_with().stop.tokens == {2}
    assert stop.sample([5, 2, 9]).token_ids == (5, 2) and stop.sample([5, 77]).token_ids == (5, 77)
    assert stop.sample([5, 9]).truncated


@pytest.mark.parametrize("architecture", ["Unknown", "GptOssForCausalLM"])
def test_models_that_engines_of_vllm_cannot_mix_are_refused(architecture, tiny_model, tmp_path):
    from openrlhf_sgpo.rollout import check_rollout

    settings = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": [architecture]}))
    config = Config()
    config.model.model_name_or_path = str(tiny_model)
    check_rollout(config, str(tiny_model))
    with pytest.raises(ValueError, match=f"{architecture}, which engines .* cannot mix .* use --rollout.engine hf"):
        check_rollout(config, str(tmp_path))


def test_a_reference_that_moves_is_not_mixed():
    from openrlhf_sgpo.algorithms.nash_md import NashMD, NashMDSettings

    class Moving(NashMD):
        reference_rounds = 2

    (problem,) = Moving(NashMDSettings(), 0.1).problems(Config())
    assert problem == (
        "--algo nash_md: the role mixture answers with the first reference, but the reference moves after every "
        "reference_rounds; use 0"
    )
    assert Moving(NashMDSettings(mixture=0), 0.1).problems(Config()) == []
