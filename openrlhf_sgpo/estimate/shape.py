"""What a model is made of, from its configuration alone: parameters, and what a backward pass keeps for each token.

The model is built on torch's meta device, where tensors have shapes and no contents, so that a model of any size takes a
second and no memory. Its weights are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from openrlhf_sgpo.config import DTYPES, LoraSettings, ModelSettings
from openrlhf_sgpo.packed.recomputed import recipe_of, use_recomputed

NAME = "openrlhf_sgpo_counted"
TOKENS = 64  # of the row that is counted; what is kept grows in proportion to it


@dataclass(frozen=True)
class Kept:
    """Bytes that are kept of a token for the backward pass: by a layer, outside of the layers, and by the largest tensor of a
    layer."""

    layer: float
    other: float
    largest: float


@dataclass(frozen=True)
class ModelShape:
    """A causal language model as it is trained.

    parameters, trained: their numbers; with LoRA only those of the adapters are trained. embedding: parameters of the
    input embedding. tied: whether it is the head too; otherwise it takes part in no matrix product. layers: their number.
    hidden, vocabulary: sizes. kv_elements: keys and values of a token, of all layers. element: bytes of a weight. padded,
    packed: what is kept of a token in either layout.
    """

    kind: str
    parameters: int
    trained: int
    embedding: int
    tied: bool
    layers: int
    hidden: int
    vocabulary: int
    kv_elements: int
    element: int
    padded: Kept
    packed: Kept

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with."""
        return self.parameters - (0 if self.tied else self.embedding)


class _Kept(torch.autograd.Function):
    """What FlashAttention and torch's fused kernels keep of queries (1, heads, T, d), keys and values: these three, the output,
    and a float32 logarithm per head and token (Dao et al., arXiv 2205.14135, appendix B)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Kept.apply(*(states.transpose(1, 2) for states in (query, key, value))), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda **_: None)


def model_configuration(model: ModelSettings) -> PretrainedConfig:
    """config.json of a Hugging Face folder or hub name. Raises ValueError if there is none."""
    name = model.model_name_or_path
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model.model_name_or_path {name}: no configuration can be read ({_first_line(error)}); give a folder with the "
            "model's config.json, its weights are not needed"
        ) from error


def model_shape(model: ModelSettings, dtype: str, lora: LoraSettings) -> ModelShape:
    """The shape of the model in a Hugging Face folder, of which only config.json is read, or of a hub name. dtype: a value of
    --ds.param_dtype. Raises ValueError if there is no configuration, or if the model cannot be counted."""
    config = model_configuration(model)
    try:
        return _shape(config, model.trust_remote_code, getattr(torch, DTYPES[dtype]), lora)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--model.model_name_or_path {model.model_name_or_path}: estimate cannot count a model of type "
            f"{config.model_type} ({_first_line(error)})"
        ) from error


def _shape(config: PretrainedConfig, trust: bool, dtype: torch.dtype, lora: LoraSettings) -> ModelShape:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=NAME, trust_remote_code=trust
        )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        body = model.base_model
        if lora.rank:
            model.enable_input_require_grads()
            model = get_peft_model(model, LoraConfig(**lora.of_peft()), autocast_adapter_dtype=False)
            model.to(dtype)  # PEFT has adapters in float32, DeepSpeed makes them like the rest
    model.train()
    padded = _kept(model, body, layers)
    use_recomputed(body)
    packed = _kept(model, body, layers)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(
        kind=type(body).__name__.removesuffix("Model"),
        parameters=parameters,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        embedding=embedding.numel(),
        tied=head is embedding,
        layers=len(layers),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        kv_elements=2 * len(layers) * heads * size,
        element=dtype.itemsize,
        padded=padded,
        packed=packed,
    )


def _kept(model: Any, body: Any, layers: list[Any]) -> Kept:
    """What autograd keeps of a row of ``TOKENS`` tokens."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    stored: dict[int, Tensor] = {}  # by the address of a storage, which stays taken while the tensor is here
    sizes: dict[int | None, list[int]] = {None: []}  # by layer; None: outside of them
    place: list[int | None] = [None]

    def entering(number: int | None) -> Callable[..., None]:
        return lambda *_: place.__setitem__(0, number)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in stored and not recipe_of(tensor):
            stored[storage._cdata] = tensor
            sizes.setdefault(place[0], []).append(storage.nbytes())
        return tensor

    hooks = []
    for number, layer in enumerate(layers):
        hooks += [layer.register_forward_pre_hook(entering(number)), layer.register_forward_hook(entering(None))]
    row = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        body(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
    for hook in hooks:
        hook.remove()
    in_layers = [size for number, of_layer in sizes.items() if number is not None for size in of_layer]
    return Kept(sum(in_layers) / len(layers) / TOKENS, sum(sizes[None]) / TOKENS, max(in_layers) / TOKENS)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
