"""A forward pass that keeps the input embeddings, for losses that differentiate by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.packed.head import log_softmax_at
from openrlhf_sgpo.training.packing import padded_rows

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import Actor


def embedded_log_probs(actor: Actor, groups: list[Group], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (R,) of all responses in float32, and the input embeddings (R, T, D) from which they were computed.

    One padded row per response, and plain operations only, because fused kernels have no second derivative. The actor must be
    prepared by the strategy, and not packed.
    """
    device = next(actor.parameters()).device
    tokens, attention, is_response = (rows.to(device) for rows in padded_rows(groups, pad_token_id))
    embeddings: list[Tensor] = []
    # DeepSpeed's engine takes every backward pass through its outputs for the one that ends in the optimiser.
    model = getattr(actor.model, "module", actor.model)
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: embeddings.append(output))
    try:
        logits = model(tokens, attention_mask=attention, use_cache=False)["logits"][:, :-1].float()
    finally:
        hook.remove()
    return (log_softmax_at(logits, tokens[:, 1:]) * is_response[:, 1:]).sum(-1), embeddings[0]
