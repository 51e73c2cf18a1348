"""The study's world: prompts and answers of letters, a gold reward that is a function of both, and the initial policy.

A prompt is six letters, an answer eight. Every answer is written in a style: how often a letter is copied from the prompt, how
often the next one of the alphabet follows, and how much each third of the alphabet is liked. The initial policy has read
answers in all styles, so it has the features that the gold reward is made of, and no opinion on them.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

LETTERS = "abcdefghijkl"
GROUP = {letter: number // 4 for number, letter in enumerate(LETTERS)}
PROMPT, ANSWER = 6, 8
# Reward of the share of letters in each third of the alphabet, of letters copied from the prompt, and of ascents.
TASTE = (1.0, -1.0, 0.0)
COPIES, ASCENTS = 0.2, 0.4
SCALE = 5.0


def gold(prompt: str, answer: str) -> float:
    """Reward of an answer: by the shares of its letters in the first and in the second third of the alphabet, of letters that
    the prompt has, and of neighbours in the order of the alphabet. Other characters than these letters do not count."""
    letters = [letter for letter in answer if letter in GROUP]
    if not letters:
        return 0.0
    neighbours = list(pairwise(letters))
    pairs = max(len(neighbours), 1)
    return SCALE * (
        sum(TASTE[GROUP[letter]] for letter in letters) / len(letters)
        + COPIES * sum(letter in prompt for letter in letters) / len(letters)
        + ASCENTS * sum(LETTERS.index(right) == LETTERS.index(left) + 1 for left, right in neighbours) / pairs
    )


def write_prompts(count: int, random: np.random.Generator) -> list[str]:
    """Different prompts."""
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts["".join(random.choice(list(LETTERS), PROMPT))] = None
    return list(prompts)


def write_answer(prompt: str, random: np.random.Generator) -> str:
    """An answer in a style of its own."""
    copying, following = random.beta(0.3, 0.9, 2)
    liked = np.repeat(random.dirichlet([0.4] * 3), 4) / 4
    answer = ""
    for _ in range(ANSWER):
        if answer and random.random() < following:
            answer += LETTERS[(LETTERS.index(answer[-1]) + 1) % len(LETTERS)]
        elif random.random() < copying:
            answer += prompt[random.integers(PROMPT)]
        else:
            answer += LETTERS[random.choice(len(LETTERS), p=liked)]
    return answer


def write_pairs(prompts: list[str], random: np.random.Generator, clean: bool) -> list[dict[str, Any]]:
    """A pair per prompt. Its label is drawn from the Bradley-Terry model, or, if ``clean``, is the better answer by gold."""
    rows = []
    for prompt in prompts:
        left, right = write_answer(prompt, random), write_answer(prompt, random)
        while left == right:
            right = write_answer(prompt, random)
        difference = gold(prompt, left) - gold(prompt, right)
        first = difference > 0 if clean else random.random() < 1 / (1 + math.exp(-difference))
        chosen, rejected = (left, right) if first else (right, left)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def write_policy(folder: Path, steps: int, seed: int = 0) -> None:
    """Write the initial policy: a Llama of 2 layers and 64 units on bytes, trained on prompts and answers in all styles."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[3], pad_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:3]})
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            eos_token_id=3,
            pad_token_id=0,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    for _ in range(steps):
        prompts = write_prompts(64, random)
        texts = [f"<|user|>{prompt}<|end|><|assistant|>{write_answer(prompt, random)}<|end|>" for prompt in prompts]
        tokens = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
        labels = tokens.masked_fill(torch.arange(tokens.shape[1]) < PROMPT + 3, -100)
        loss = model(tokens, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    print(
        f"{folder}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters, loss {loss.item():.3f}"
    )
