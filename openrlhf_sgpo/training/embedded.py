"""A forward pass that keeps the input embeddings, for losses that differentiate by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openrlhf_sgpo.data.tokens import Group

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import Actor


def embedded_log_probs(actor: Actor, groups: list[Group], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (R,) of all responses in float32, and the input embeddings (R, T, D) from which they were computed.

    One padded row per response, and plain operations only, because fused kernels have no second derivative. The actor must be
    prepared by the strategy, and not packed.
    """
    device = next(actor.parameters()).device
    rows = [
        (len(group.prompt), torch.tensor(group.prompt + response)) for group in groups for response in group.responses
    ]
    tokens = pad_sequence([row for _, row in rows], batch_first=True, padding_value=pad_token_id).to(device)
    place = torch.arange(tokens.shape[1])
    attention = torch.stack([place < len(row) for _, row in rows]).to(device)
    is_response = torch.stack([(place >= prompt) & (place < len(row)) for prompt, row in rows])[:, 1:].to(device)
    embeddings: list[Tensor] = []
    # DeepSpeed's engine takes every backward pass through its outputs for the one that ends in the optimiser.
    model = getattr(actor.model, "module", actor.model)
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: embeddings.append(output))
    try:
        logits = model(tokens, attention_mask=attention.long(), use_cache=False)["logits"][:, :-1].float()
    finally:
        hook.remove()
    per_token = logits.gather(-1, tokens[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    return (per_token * is_response).sum(-1), embeddings[0]
