"""Answers to a benchmark's items by a tiny model."""

from __future__ import annotations

import json

import pytest
from tiny import make_tiny_model

from openrlhf_sgpo.benchmarks import answers
from openrlhf_sgpo.benchmarks.answers import Answerer
from openrlhf_sgpo.benchmarks.task import Item
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.openrlhf import build_strategy

ITEMS = [
    Item("0", ("What is 1?",), temperature=0.0),
    Item("1", ("What is 2?", "And then?"), temperature=0.0),
    Item("2", ("What is 3?", "And then?"), temperature=1.0),
    Item("3", ("What is 4?",)),
]


@pytest.fixture
def config(tiny_model):
    config = Config()
    config.model.model_name_or_path = str(tiny_model)
    config.rollout.engine, config.rollout.max_new_tokens, config.rollout.temperature = "hf", 6, 0.5
    config.data.max_len, config.ds.param_dtype, config.ds.zero_stage = 128, "fp32", 0
    config.train.batch_size = config.train.micro_batch_size = 1
    build_strategy(config)
    return config


def ask(config, folder, path, items=ITEMS):
    answerer, cost = Answerer(config), {}
    path.parent.mkdir(parents=True, exist_ok=True)
    chat = answerer.chat(str(folder))
    responses = answerer.answer(chat, str(folder), "toy", items, path, cost)
    answerer.close()
    return responses, cost


def greedy(folder, messages, new=6):
    """The likeliest tokens one after the other, without a cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    drawn = []
    while len(drawn) < new:
        token = model(torch.tensor([tokens + drawn])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        drawn.append(token)
    return tokenizer.decode(drawn, skip_special_tokens=True)


def test_turns_see_the_answers_before_them_and_temperature_0_is_greedy(config, tiny_model, tmp_path):
    responses, cost = ask(config, tiny_model, tmp_path / "toy.jsonl")
    assert list(responses) == ["0", "1", "2", "3"]
    first = greedy(tiny_model, [{"role": "user", "content": "What is 2?"}])
    assert responses["1"].turns[0] == first
    conversation = [
        {"role": "user", "content": "What is 2?"},
        {"role": "assistant", "content": first.strip()},
        {"role": "user", "content": "And then?"},
    ]
    assert responses["1"].turns[1] == greedy(tiny_model, conversation)
    assert [len(response.turns) for response in responses.values()] == [1, 2, 2, 1]
    assert cost == {"samples": 6, "tokens_generated": sum(sum(response.tokens) for response in responses.values())}
    assert config.rollout.temperature == 0.5  # an item's own temperature is its own only


@pytest.mark.slow
def test_what_is_there_is_not_made_again(config, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "BLOCK", 2)
    whole, _ = ask(config, tiny_model, tmp_path / "whole/toy.jsonl")
    path = tmp_path / "cut/toy.jsonl"
    ask(config, tiny_model, path, ITEMS[:2])
    with open(path, "a") as file:
        file.write('{"id": "2", "tur')  # a killed process was writing
    kept = path.read_text().splitlines()[:2]
    responses, cost = ask(config, tiny_model, path)
    assert responses == whole
    assert cost["samples"] == 3  # two turns of item 2, one of item 3
    assert path.read_text() == (tmp_path / "whole/toy.jsonl").read_text()
    assert path.read_text().splitlines()[:2] == kept
    assert ask(config, tiny_model, path)[1] == {}


def test_an_item_that_asks_something_else_is_answered_again(config, tiny_model, tmp_path):
    path = tmp_path / "toy.jsonl"
    ask(config, tiny_model, path)
    changed = [Item("0", ("What is 5?",), temperature=0.0), *ITEMS[1:]]
    responses, cost = ask(config, tiny_model, path, changed)
    assert cost["samples"] == 1
    assert responses["0"].turns == (greedy(tiny_model, [{"role": "user", "content": "What is 5?"}]),)
    assert len(path.read_text().splitlines()) == 5  # nothing is thrown away


def test_answers_of_another_model_or_decoding_are_not_mixed(config, tiny_model, other_tiny_model, tmp_path):
    path = tmp_path / "toy.jsonl"
    ask(config, tiny_model, path)
    with pytest.raises(ValueError, match=r"made with other settings \(model: .*another name in --models"):
        ask(config, other_tiny_model, path)
    config.rollout.max_new_tokens = 5
    with pytest.raises(ValueError, match="decoding: .*'max_new_tokens': 6.* now .*'max_new_tokens': 5"):
        ask(config, tiny_model, path)
    assert json.loads(path.with_suffix(".settings.json").read_text())["decoding"]["max_new_tokens"] == 6


@pytest.mark.slow
def test_engines_are_kept_for_models_of_one_kind_only(config, tiny_model, other_tiny_model, tmp_path):
    larger = make_tiny_model(tmp_path / "larger", layers=3)
    answerer, responses, engines = Answerer(config), {}, []
    for name, folder in [("tiny", tiny_model), ("other", other_tiny_model), ("larger", larger)]:
        chat = answerer.chat(str(folder))
        responses[name] = answerer.answer(chat, str(folder), "toy", ITEMS, tmp_path / f"{name}.jsonl", {})
        engines.append(answerer.rollout)
        assert responses[name]["0"].turns == (greedy(folder, [{"role": "user", "content": "What is 1?"}]),)
    answerer.close()
    assert engines[0] is engines[1] and engines[1] is not engines[2]


def test_answers_need_room_for_every_turn(config, tiny_model):
    answerer = Answerer(config)
    chat = answerer.chat(str(tiny_model))
    item = ITEMS[1]
    question = [{"role": "user", "content": item.turns[0]}, {"role": "assistant", "content": ""}]
    needed = len(chat.prompt([*question, {"role": "user", "content": item.turns[1]}])) + 2 * 6
    config.data.max_len = needed
    assert answerer.fitting(chat, "tiny", "toy", ITEMS, False) == ITEMS  # item 2 is as long
    config.data.max_len = needed - 1
    message = (
        rf"tiny: 2 of 4 items of toy have no room .* item 1 needs {needed} tokens.* --data.max_len {needed - 1} to that"
    )
    with pytest.raises(ValueError, match=message):
        answerer.fitting(chat, "tiny", "toy", ITEMS, False)
    assert answerer.fitting(chat, "tiny", "toy", ITEMS, True) == [ITEMS[0], ITEMS[3]]
    with pytest.raises(ValueError, match="2 of 2 items"):
        answerer.fitting(chat, "tiny", "toy", ITEMS[1:3], True)  # nothing is left to do


def test_a_longer_limit_keeps_the_answers(config, tiny_model, tmp_path):
    path = tmp_path / "toy.jsonl"
    responses, _ = ask(config, tiny_model, path)
    config.data.max_len = 256
    assert ask(config, tiny_model, path) == (responses, {})
