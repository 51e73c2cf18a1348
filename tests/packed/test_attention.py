"""Attention within blocks against the definition, and models of other families, packed or left padded with a reason."""

from __future__ import annotations

from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import GROUPS, make_model
from torch.nn.functional import scaled_dot_product_attention

from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.packed import attention
from openrlhf_sgpo.packed.attention import attention_by_lengths, packed_attention
from openrlhf_sgpo.packed.head import Head
from openrlhf_sgpo.packed.model import accept_packings, why_padded
from openrlhf_sgpo.training.packing import filled, pack, split_into


def visible(groups):
    """Which token of the row sees which, from whom each belongs to: its group, and the prompt (0) or a response."""
    owners = [
        (group, part)
        for group, (prompt, responses) in enumerate((group.prompt, group.responses) for group in groups)
        for part, tokens in enumerate((prompt, *responses))
        for _ in tokens
    ]
    sees = torch.tensor([[a == c and d in (0, b) for c, d in owners] for a, b in owners])
    return sees & torch.ones_like(sees).tril()


def by_sequence(query, key, value, cu_q, cu_k, most_q, most_k, *, scale, window_size, enable_gqa):
    """What torch's varlen_attn computes on a GPU: causal attention in each sequence, aligned at its end."""
    assert window_size == (-1, 0) and most_q == cu_q.diff().max() and most_k == cu_k.diff().max()
    rows = []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(int(d - c - (b - a)))
        q, k, v = (x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d]))
        rows.append(scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_blocks_see_their_prompt_and_themselves(heads):
    packing = pack(GROUPS, torch.device("cpu"))
    length, sees = packing.tokens.shape[1], visible(GROUPS)
    assert length == sum(map(len, GROUPS)) == len(sees)
    torch.manual_seed(0)
    shapes = [(1, number, length, 8) for number in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = scaled_dot_product_attention(*inputs, sees, scale=0.3, enable_gqa=True).transpose(1, 2)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    outputs = [
        packed_attention(SimpleNamespace(), *inputs, None, 0.3, packing=packing)[0],
        attention_by_lengths(*inputs, packing, 0.3, by_sequence),
    ]
    for output in outputs:
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(torch.autograd.grad((output * weights).sum(), inputs), wanted)


PACKED = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 1024},
    "Gemma": {},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 8.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "Olmo2": {},
    "Phi": {},
    "GPTNeoX": {},
    "Starcoder2": {"sliding_window": None},
}


@pytest.mark.parametrize("family", PACKED)
def test_families_that_are_packed(family):
    """Each response in a forward of its own gives the same log-probabilities and the same gradient, in float64."""
    config, model = make_model(family, **PACKED[family])
    assert why_padded(Inference(), config) == ""
    expected = []
    for group in GROUPS:
        for response in group.responses:
            tokens = torch.tensor([group.prompt + response])
            log_probs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            expected.append(log_probs[len(group.prompt) - 1 :].sum())
    expected = torch.stack(expected)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))

    model.set_attn_implementation(attention.NAME)
    accept_packings(model)
    head, packing = Head(model), pack(GROUPS, torch.device("cpu"))
    per_token = model(packing=packing, figures=lambda states: head.log_probs(states, packing.targets))
    summed = torch.zeros_like(expected).index_add(0, packing.response_of, per_token)
    torch.testing.assert_close(summed, expected, rtol=1e-9, atol=1e-9)
    for gradient, right in zip(
        torch.autograd.grad((summed * weights).sum(), list(model.parameters())), wanted, strict=True
    ):
        # Their norms and rotations are in float32 whatever the model is in.
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6 * right.abs().max().item() + 1e-9)
    # Calls of other kinds are as before: a padded batch, and sampling with a cache.
    tokens, mask = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    packed_settings = model(tokens, attention_mask=mask).logits[mask.bool()], model.generate(tokens, max_new_tokens=3)
    model.set_attn_implementation("sdpa")
    plain_settings = model(tokens, attention_mask=mask).logits[mask.bool()], model.generate(tokens, max_new_tokens=3)
    torch.testing.assert_close(packed_settings, plain_settings)


LEFT_PADDED = {
    "Gemma2": ({"attn_logit_softcapping": 50.0, "sliding_window": 4096}, "caps the logits of its attention"),
    "GptOss": ({}, "an attention of their own"),
    "Mistral": ({"sliding_window": 128}, "a sliding window of 128 tokens, and --data.max_len is 512"),
    "Gemma3Text": ({"sliding_window": 128}, "a sliding window of 128 tokens"),
    "Bloom": ({}, "an attention of their own"),
    "Mamba": ({}, "an attention of their own"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"] * 16}, "layers of kind conv"),
    "Llama4": ({}, "read more than text"),
    "RecurrentGemma": ({}, "layers of kind recurrent"),
    "Llama": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 256},
        "positions beyond 256 change the model's dynamic rotary embedding for all of a row",
    ),
    "Phi3": (
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            "original_max_position_embeddings": 256,
        },
        "positions beyond 256 change the model's longrope rotary embedding",
    ),
}


@pytest.mark.parametrize("family", LEFT_PADDED)
def test_families_that_are_not(family):
    settings, reason = LEFT_PADDED[family]
    config = getattr(transformers, f"{family}Config")(**settings)
    assert reason in why_padded(Inference(), config)


def test_settings_that_are_not():
    config, settings = transformers.LlamaConfig(), Inference()
    settings.ds.attn_implementation = "eager"
    assert why_padded(settings, config) == "--ds.attn_implementation eager"
    settings.ds.attn_implementation, settings.ds.packing_samples = "flash_attention_2", True
    assert "--ds.packing_samples" in why_padded(settings, config)
    settings.ds.packing_samples = False
    assert why_padded(settings, config) == ""
    settings.train.layout = "padded"
    assert why_padded(settings, config) == "--train.layout padded"


def test_a_rotary_embedding_that_no_row_outgrows_is_packed():
    rotary = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = transformers.LlamaConfig(rope_parameters=rotary, max_position_embeddings=512)
    assert why_padded(Inference(), config) == ""


def test_an_empty_response_has_no_predictors():
    packing = pack([Group((1, 2), ((), (3, 4)))], torch.device("cpu"))
    assert packing.predictors.tolist() == [1, 2] and packing.targets.tolist() == [3, 4]
    assert packing.response_of.tolist() == [1, 1] and packing.responses == 2


def test_micro_batches_are_few_and_even():
    sizes = [3, 4, 2, 9, 1, 1, 5]
    parts = filled(sizes, 7)
    assert [sizes[part] for part in parts] == [[3, 4], [2], [9], [1, 1, 5]]
    assert [sizes[part] for part in filled(sizes, 1)] == [[size] for size in sizes]
    assert filled(sizes, 100) == [slice(0, 7)]
    assert filled([5, 5, 5, 5], 15) == filled([5, 5, 5, 5], 10) == [slice(0, 2), slice(2, 4)]
    for budget in range(1, 26):  # against all ways to cut
        ways = []
        for cuts in product([False, True], repeat=len(sizes) - 1):
            places = [0, *(place for place, cut in enumerate(cuts, start=1) if cut), len(sizes)]
            parts_there = [sizes[start:end] for start, end in pairwise(places)]
            if all(sum(part) <= budget or len(part) == 1 for part in parts_there):
                ways.append((len(parts_there), max(map(sum, parts_there))))
        chosen = [sizes[part] for part in filled(sizes, budget)]
        assert [size for part in chosen for size in part] == sizes
        assert (len(chosen), max(map(sum, chosen))) == min(ways)


def test_micro_batches_are_split_where_most_samples_are():
    sizes = [3, 4, 2, 9, 1, 1, 5]
    parts = filled(sizes, 7)
    assert [sizes[part] for part in split_into(parts, 6)] == [[3], [4], [2], [9], [1], [1, 5]]
    assert [sizes[part] for part in split_into(parts, 7)] == [[size] for size in sizes]
    assert split_into(parts, 2) == parts
