"""Which models can compute a packed row, and how they do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.packed.attention import Packing
from openrlhf_sgpo.packed.products import use_products
from openrlhf_sgpo.packed.recomputed import recomputing, use_recomputed

PADDED_BY_CHOICE = "--train.layout padded"


def why_padded(config: Inference, model: PretrainedConfig) -> str:
    """Why a model is not packed; empty if it is. It is not where a row with several sequences would not mean the same as each
    of them in a row of its own."""
    attention = config.ds.attn_implementation
    if config.train.layout == "padded":
        return PADDED_BY_CHOICE
    if config.ds.packing_samples:
        return "--ds.packing_samples is OpenRLHF's own packing"
    if attention != "sdpa" and not attention.startswith("flash_attention"):
        return f"--ds.attn_implementation {attention}"
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model), None)
    if kind is None or not (kind._supports_attention_backend and kind._supports_sdpa):
        return f"models of type {model.model_type} have an attention of their own"
    if model.get_text_config() is not model:
        return f"models of type {model.model_type} read more than text"
    window = getattr(model, "sliding_window", None) if getattr(model, "use_sliding_window", True) else None
    names = ("layer_types", "layers_block_type", "block_types")  # families call them differently
    kinds = {kind for name in names for kind in getattr(model, name, None) or ()}
    if others := kinds - {"full_attention", "sliding_attention", "attention"}:
        return f"the model has layers of kind {', '.join(sorted(others))}"
    if window and config.data.max_len > window and kinds != {"full_attention"}:
        return f"the model has a sliding window of {window} tokens, and --data.max_len is {config.data.max_len}"
    if getattr(model, "attn_logit_softcapping", None):
        return "the model caps the logits of its attention"
    rotary = getattr(model, "rope_parameters", None) or {}
    for settings in [rotary, *rotary.values()]:  # of all layers, or by their kind
        name = settings.get("rope_type") or "" if isinstance(settings, dict) else ""
        if "dynamic" in name or name == "longrope":
            longest = settings.get("original_max_position_embeddings") or model.max_position_embeddings
            if config.data.max_len > longest:
                return (
                    f"positions beyond {longest} change the model's {name} rotary embedding for all of a row, and "
                    f"--data.max_len is {config.data.max_len}"
                )
    return ""


def accept_packings(model: Any) -> None:
    """Lets the model's forward take ``packing`` and ``figures`` instead of its arguments: it then computes the hidden states
    (R, hidden) that predict response tokens, and returns what ``figures`` makes of them.

    So this happens within the calls of DeepSpeed's engine and of PEFT's models.
    """
    use_products(model.base_model)
    use_recomputed(model.base_model)
    plain: Callable[..., Any] = model.forward

    @functools.wraps(plain)
    def forward(
        *args: Any, packing: Packing | None = None, figures: Callable[[Tensor], Any] | None = None, **kwargs: Any
    ) -> Any:
        if packing is None or figures is None:
            return plain(*args, **kwargs)
        body: nn.Module = model.base_model
        with recomputing():
            output = body(input_ids=packing.tokens, position_ids=packing.positions, packing=packing, use_cache=False)
        return figures(output.last_hidden_state[0, packing.predictors])

    model.forward = forward
