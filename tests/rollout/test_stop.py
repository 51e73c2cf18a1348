"""Sampling stops at the end of turn that training appends, whether or not the model calls it its end."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.tokens import ChatFormat, load_tokenizer
from openrlhf_sgpo.rollout.base import Sampling, Stop

LIMIT = 12
QUESTION = [{"role": "user", "content": "Why?"}]


def speaker(tiny_model, folder, end: str):
    """A model whose template ends turns with ``end``, whose eos is another token, and that answers "Hi", ``end``, and the like
    for ever: without attention and feed-forward layers each token depends on the one before it alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", end)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=False, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        states = model.model.norm(model.model.embed_tokens.weight)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(states))
        said = tokenizer(f"\nHi{end}\n", add_special_tokens=False)["input_ids"]
        for before, after in pairwise(said):
            model.lm_head.weight[after] += 20 * states[before] / states[before].norm()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def speakers(tiny_model, tmp_path_factory):
    """A model by the end of its turns: one token, and two."""
    folder = tmp_path_factory.mktemp("model")
    return {end: str(speaker(tiny_model, folder / str(len(end)), end)) for end in ("<|im_end|>", "#$")}


@pytest.mark.parametrize("engine", [pytest.param("vllm", marks=pytest.mark.slow), "hf", "mixture"])
def test_every_engine_stops_at_the_end_that_training_appends(engine, speakers):
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.rollout import start_rollout
    from openrlhf_sgpo.rollout.hf import HuggingFaceRollout

    config = Config()
    config.rollout.engine = "vllm" if engine == "vllm" else "hf"
    config.ds.param_dtype, config.data.max_len = "fp32", 64
    config.train.batch_size = config.train.micro_batch_size = 1
    build_strategy(config)
    rollout = None
    for end, model in speakers.items():
        chat = ChatFormat(load_tokenizer(model, False, "model.model_name_or_path"), 64)
        if engine == "mixture":
            rollout = HuggingFaceRollout(config, chat, model, model)
        elif rollout is None:
            rollout = start_rollout(config, chat, model)
        else:  # an engine takes its time to start, and its stop is this package's
            rollout.load(model)
            rollout.stop = Stop(chat)
            rollout.stop.add_ends_of(model, False)
        other = [{"role": "user", "content": "Another, longer question?"}]
        prompts = [chat.prompt(QUESTION), chat.prompt(other)]
        sampling = Sampling(1.0, 1.0, LIMIT, 1, 2, share=0.5 if engine == "mixture" else 0.0)
        for sample in (answer for row in rollout.generate(prompts, sampling, label="") for answer in row):
            assert (sample.text, sample.truncated) == ("Hi", False)
            assert sample.token_ids == chat.response("Hi", False, LIMIT)
            assert chat.tokenizer.decode(sample.token_ids) == f"Hi{end}"
    rollout.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model), False, "model.model_name_or_path")
    tokenizer.eos_token = tokenizer.pad_token
    return tokenizer


def test_an_end_that_was_drawn_in_other_tokens_is_written_as_training_writes_it(tokenizer):
    lengthy = copy.deepcopy(tokenizer)
    lengthy.add_tokens(["i#", "#!"])
    lengthy.chat_template = tokenizer.chat_template.replace("<|im_end|>", "##")
    chat = ChatFormat(lengthy, 64)
    stop = Stop(chat)
    drawn = lengthy.convert_tokens_to_ids(["H", "i#", "#!", "H", "#", "#"])
    sample = stop.sample(drawn)
    assert (sample.text, sample.truncated) == ("Hi", False)
    assert sample.token_ids == tuple(lengthy.convert_tokens_to_ids(["H", "i", "#", "#"]))
    assert [stop.reached(drawn[:length]) for length in (1, 2, 3)] == [False, False, True]


def test_half_an_end_at_the_limit_is_a_truncated_response(tokenizer):
    lengthy = copy.deepcopy(tokenizer)
    lengthy.chat_template = tokenizer.chat_template.replace("<|im_end|>", "##")
    drawn = lengthy.convert_tokens_to_ids(["H", "i", "#"])
    sample = Stop(ChatFormat(lengthy, 64)).sample(drawn)
    assert (sample.text, sample.truncated, sample.token_ids) == ("Hi#", True, tuple(drawn))


def test_the_end_of_sequence_still_ends_a_response(tokenizer):
    """The model's, the tokenizer's and the template's end: whichever comes first; what follows is padding."""
    stop = Stop(ChatFormat(tokenizer, 64))
    stop.tokens.add(7)
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    for end in (eos, turn, 7):
        assert stop.sample([50, end, 51, eos]).token_ids == (50, end)
        assert not stop.sample([50, end]).truncated


def test_a_decoder_that_tidies_spaces_changes_no_answer(tokenizer):
    tidy = copy.deepcopy(tokenizer)
    tidy.clean_up_tokenization_spaces = True
    ids = tidy("Yes , I do n't", add_special_tokens=False)["input_ids"]
    assert Stop(ChatFormat(tidy, 64)).sample(ids).text == "Yes , I do n't"


def test_engines_are_not_shared_by_models_that_end_their_answers_differently(tiny_model, tmp_path):
    import shutil

    from openrlhf_sgpo.benchmarks.answers import kind_of

    def changed(name, file, old, new):
        folder = shutil.copytree(tiny_model, tmp_path / name)
        path = folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return kind_of(str(folder))

    assert changed("same", "config.json", json.dumps("float32"), json.dumps("bfloat16")) == kind_of(str(tiny_model))
    assert changed("template", "chat_template.jinja", "im_end", "im_stop") != kind_of(str(tiny_model))
    assert changed("eos", "generation_config.json", '"eos_token_id": 2', '"eos_token_id": 7') != kind_of(
        str(tiny_model)
    )
