"""Attention in one row of prompts, each with its responses behind it: a response sees its prompt and itself.

It is registered with transformers as an attention of its own, for models whose layers call attention through that interface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from openrlhf_sgpo.packed.recomputed import joined

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]
# Those of earlier versions of torch take fewer arguments.
HAS_KERNEL = (
    varlen_attn is not None and {"scale", "window_size", "enable_gqa"} <= signature(varlen_attn).parameters.keys()
)

NAME = "openrlhf_sgpo_packed"


class Block(NamedTuple):
    """Tokens ``start`` to ``end`` of the row, which see those of ``prompt``, and of their own those up to themselves."""

    start: int
    end: int
    prompt: range


@dataclass(frozen=True, eq=False)
class Packing:
    """A row of T tokens. blocks: of a prompt with its first response, and of each further response, in the order of the row.

    tokens, positions: (1, T). predictors (R,): places in the row that predict response tokens; targets (R,): these tokens;
    response_of (R,): the response that each belongs to, out of ``responses``.
    """

    tokens: Tensor
    positions: Tensor
    predictors: Tensor
    targets: Tensor
    response_of: Tensor
    responses: int
    blocks: list[Block]
    _masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def by_lengths(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """For a kernel of sequences, which are the blocks: the places (K,) of their keys in the row, those of their prompt
        before their own; where each begins among queries and among keys, (blocks + 1,); and the most queries and keys of
        one. The same for all layers, because copies to a GPU wait for it."""
        places: list[int] = []
        lengths = torch.zeros(2, len(self.blocks) + 1, dtype=torch.int32)
        for number, block in enumerate(self.blocks, start=1):
            places += [*block.prompt, *range(block.start, block.end)]
            lengths[:, number] = torch.tensor([block.end, len(places)])
        most_queries, most_keys = lengths.diff().amax(1).tolist()
        device = self.tokens.device
        queries, keys = lengths.to(device)
        return torch.tensor(places, device=device), queries, keys, most_queries, most_keys

    def mask(self, block: Block, dtype: torch.dtype) -> Tensor:
        """What the tokens of a response see of prompt and response, (response, prompt + response), as summands of logits: as
        booleans every layer would turn them into such and keep these for the backward pass."""
        prompt, size = len(block.prompt), block.end - block.start
        key = prompt, size, dtype
        if key not in self._masks:
            hidden = torch.full((size, prompt + size), -torch.inf, dtype=dtype, device=self.tokens.device)
            self._masks[key] = hidden.triu(prompt + 1)
        return self._masks[key]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over the blocks of ``packing``, and transformers' sdpa where there is none. query (1, heads, T, d), key and
    value (1, key heads, T, d); returns (1, T, heads, d)."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and not dropout and HAS_KERNEL:
        return attention_by_lengths(query, key, value, packing, scaling, varlen_attn), None
    outputs = []
    grouped = key.shape[1] != query.shape[1]
    for block in packing.blocks:
        place = slice(block.start, block.end)
        keys, values, mask = key[:, :, place], value[:, :, place], None
        if block.prompt:
            prompt = slice(block.prompt.start, block.prompt.stop)
            keys, values = (joined([full[:, :, prompt], full[:, :, place]], 2) for full in (key, value))
            mask = packing.mask(block, query.dtype)
        output = scaled_dot_product_attention(
            *(query[:, :, place], keys, values, mask, dropout, mask is None), scale=scaling, enable_gqa=grouped
        )
        outputs.append(output.transpose(1, 2))
    return joined(outputs, 1), None


def attention_by_lengths(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, kernel: Callable[..., Any]
) -> Tensor:
    """The same in one call of a kernel for sequences of different lengths (torch's ``varlen_attn``, which is FlashAttention's):
    blocks are its sequences, with the keys of their prompt copied before their own. Causal there means that the last query
    sees all keys."""
    places, *lengths = packing.by_lengths
    output = kernel(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1)[places],
        value[0].transpose(0, 1)[places],
        *lengths,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output[None]


def _mask(*, attention_mask: Tensor | None = None, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """None for a packed row, whose blocks are mask enough, and for one whole row; otherwise what sdpa gets."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(attention_mask=attention_mask, q_length=q_length, kv_length=kv_length, **kwargs)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _mask)
