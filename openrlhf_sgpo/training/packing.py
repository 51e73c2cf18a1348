"""Groups as rows of tokens: padded, one per response, or packed into one; and samples as micro-batches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.packed.attention import Block, Packing


def padded_rows(groups: list[Group], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and response mask, one right-padded row per response."""
    rows = [(group.prompt, response) for group in groups for response in group.responses]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    attention = torch.zeros((len(rows), length), dtype=torch.long)
    is_response = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        attention[row, :end] = 1
        is_response[row, len(prompt) : end] = True
    return tokens, attention, is_response


def pack(groups: list[Group], device: torch.device) -> Packing:
    """The groups as one row, each prompt once and its responses behind it."""
    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    blocks: list[Block] = []
    for group in groups:
        prompt = range(len(tokens), len(tokens) + len(group.prompt))
        tokens += group.prompt
        positions += range(len(prompt))
        for number, response in enumerate(group.responses):
            start = len(tokens)
            end = start + len(response)
            blocks.append(Block(start, end, prompt) if number else Block(prompt.start, end, range(0)))
            tokens += response
            positions += range(len(prompt), len(prompt) + len(response))
            predictors += [prompt.stop - 1, *range(start, end - 1)][: len(response)]
            targets += response
            lengths.append(len(response))
    row, place, before, after = (
        torch.tensor(numbers, device=device) for numbers in (tokens, positions, predictors, targets)
    )
    response_of = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    return Packing(row[None], place[None], before, after, response_of, len(lengths), blocks)


def token_budget(config: Inference) -> int:
    """Tokens of a micro-batch: ``--train.max_tokens``, or those that as many pairs as a padded one has can have at most."""
    return config.train.max_tokens or 2 * config.data.max_len * config.train.micro_batch_size


def filled(sizes: Sequence[int], budget: int) -> list[slice]:
    """Consecutive samples as micro-batches of at most so many tokens, or of a single sample with more: as few as there can be,
    and of these the most even, whose largest needs least memory. sizes: their tokens."""
    fewest = len(_greedy(sizes, budget))
    smallest = bisect_left(range(budget), True, key=lambda tokens: len(_greedy(sizes, tokens)) == fewest)
    return _greedy(sizes, smallest)


def _greedy(sizes: Sequence[int], budget: int) -> list[slice]:
    starts, total = [0], 0
    for number, size in enumerate(sizes):
        if total and total + size > budget:
            starts.append(number)
            total = 0
        total += size
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def split_into(parts: list[slice], count: int) -> list[slice]:
    """The same samples in so many micro-batches: those with most samples are halved until there are enough."""
    parts = list(parts)
    while len(parts) < count:
        place = max(range(len(parts)), key=lambda number: parts[number].stop - parts[number].start)
        part = parts[place]
        middle = (part.start + part.stop) // 2
        parts[place : place + 1] = [slice(part.start, middle), slice(middle, part.stop)]
    return parts
