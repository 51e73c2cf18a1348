"""Loading models into OpenRLHF's Actor, and saving them.

OpenRLHF's loader always sets ``trust_remote_code`` and supports neither fp32 nor turning off a base model's ``use_cache``. Here
the model is loaded with the user's setting for remote code and passed to the Actor as a module.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import psutil
import torch
from openrlhf.models import Actor
from openrlhf.models.actor import _patch_zero3_weight_mapping
from openrlhf.models.utils import set_z3_leaf_modules
from openrlhf.utils.deepspeed import DeepspeedStrategy
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from openrlhf_sgpo import ranks
from openrlhf_sgpo.config import DTYPES, Inference
from openrlhf_sgpo.finite import check_complete, check_loaded
from openrlhf_sgpo.openrlhf.adapters import DEFAULT_ADAPTER, recompute_contexts
from openrlhf_sgpo.openrlhf.weights import with_adapter
from openrlhf_sgpo.output import say
from openrlhf_sgpo.packed import attention
from openrlhf_sgpo.packed.head import Head
from openrlhf_sgpo.packed.model import accept_packings, why_padded
from openrlhf_sgpo.shared_files import local


def fits_whole(folder: str, config: Inference) -> bool:
    """Whether a whole model takes at most half of the memory that is free, on every rank. Collective."""
    settings = AutoConfig.from_pretrained(local(folder), trust_remote_code=config.model.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.model.trust_remote_code)
    size = sum(weight.numel() for weight in model.parameters()) * getattr(torch, DTYPES[config.ds.param_dtype]).itemsize
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
    else:
        free = psutil.virtual_memory().available // torch.distributed.get_world_size()
    return all(ranks.gather(size <= free / 2))


def load_in_shards(config: Inference, strategy: DeepspeedStrategy, trainable: bool) -> HfDeepSpeedConfig | None:
    """With ZeRO-3 an object that makes transformers load every model in shards while it is referenced; otherwise None."""
    if strategy.stage != 3:
        return None
    _patch_zero3_weight_mapping()
    return HfDeepSpeedConfig(strategy.get_ds_train_config() if trainable else strategy.get_ds_eval_config())


def load_actor(
    folder: str,
    config: Inference,
    strategy: DeepspeedStrategy,
    *,
    trainable: bool,
    adapters: Sequence[str] = (DEFAULT_ADAPTER,),
) -> Actor:
    """An OpenRLHF Actor from a Hugging Face folder or hub name, not yet prepared by the strategy. Collective. Raises ValueError
    if one of its weights is not finite.

    trainable: with gradient checkpointing and LoRA as configured; otherwise a plain frozen model. adapters: names of the LoRA
    adapters, all trainable; the first is active. The actor's ``head`` is None if its layout is padded.
    """
    files = local(folder)
    settings = AutoConfig.from_pretrained(files, trust_remote_code=config.model.trust_remote_code)
    reason = why_padded(config, settings)
    if reason and config.train.layout == "auto" and strategy.is_rank_0():
        _say_padded(reason)
    shards = load_in_shards(config, strategy, trainable)  # kept until from_pretrained has run
    model, report = AutoModelForCausalLM.from_pretrained(
        files,
        dtype=DTYPES[config.ds.param_dtype],
        attn_implementation=config.ds.attn_implementation if reason else attention.NAME,
        trust_remote_code=config.model.trust_remote_code,
        output_loading_info=True,
    )
    del shards
    check_complete(folder, report)
    check_loaded(model, folder, config.ds.param_dtype)
    model.config.use_cache = False
    head = None if reason else Head(model)
    if head:
        accept_packings(model)
    if trainable and config.ds.lora.rank > 0:
        model.enable_input_require_grads()
        first, *others = adapters
        model = get_peft_model(model, LoraConfig(**config.ds.lora.of_peft()), adapter_name=first)
        for name in others:
            model.add_adapter(name, LoraConfig(**config.ds.lora.of_peft()))
        model.set_requires_grad(list(adapters))
    set_z3_leaf_modules(model, detect_hybrid=False)
    actor = Actor(model)
    # The Actor sets these only when it loads the model from a path.
    actor.packing_samples = config.ds.packing_samples
    actor.is_vlm = False
    actor.head = head
    if trainable and config.model.gradient_checkpointing_enable:
        several = config.ds.lora.rank > 0 and len(adapters) > 1
        context = {"context_fn": recompute_contexts(model)} if several else {}
        actor.gradient_checkpointing_enable({"use_reentrant": False, **context})
    if not trainable:
        actor.requires_grad_(False)
    return actor


@cache
def _say_padded(reason: str) -> None:
    say(f"layout padded: {reason}")


def _merged_state(state: dict[str, torch.Tensor], model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """The base model's state with each adapted W replaced by W + (alpha / rank) B A of one adapter."""
    scaling = model.peft_config[adapter].lora_alpha / model.peft_config[adapter].r
    prefix = "base_model.model."
    whole = {}
    for name, weight in state.items():
        name = name.removeprefix(prefix)
        if ".lora_" in name:
            continue
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            down, up = (state[f"{prefix}{stem}.lora_{side}.{adapter}.weight"] for side in "AB")
            weight = with_adapter(weight, down, up, scaling)
            name = f"{stem}.weight"
        whole[name.replace(".base_layer.", ".")] = weight
    return whole


def _whole_state(actor: Actor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The full state of a model prepared by the strategy. With ZeRO-3 gathering is collective, and only rank 0 gets it."""
    sharded = actor.model.zero_optimization_stage() == 3
    return actor.model._consolidated_16bit_state_dict() if sharded else model.state_dict()


def save_policy(
    actor: Actor,
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    strategy: DeepspeedStrategy,
    adapter: str = DEFAULT_ADAPTER,
) -> None:
    """Write the policy as a plain Hugging Face folder; a LoRA adapter is merged and also kept in ``folder/adapter``.

    Collective: every rank must call it; rank 0 writes.
    """
    model = strategy._unwrap_model(actor)
    model.config.use_cache = True
    if not isinstance(model, PeftModel):
        strategy.save_model(actor, tokenizer, folder)
        return
    state = _whole_state(actor, model)
    if strategy.is_rank_0():
        model.get_base_model().save_pretrained(folder, state_dict=_merged_state(state, model, adapter))
        adapter_folder = os.path.join(folder, "adapter")
        os.makedirs(adapter_folder, exist_ok=True)
        save_file(
            {
                name: weight.contiguous()
                for name, weight in get_peft_model_state_dict(model, state, adapter_name=adapter).items()
            },
            os.path.join(adapter_folder, "adapter_model.safetensors"),
        )
        settings = model.peft_config[adapter]
        settings.target_modules = sorted(settings.target_modules)  # a set, whose order differs between processes
        settings.save_pretrained(adapter_folder)
        tokenizer.save_pretrained(folder)
    torch.distributed.barrier()
