"""Loading a reward model written by OpenRLHF's reward trainer."""

from __future__ import annotations

from typing import Any

from openrlhf.models.model import _get_reward_model
from openrlhf.utils.deepspeed import DeepspeedStrategy
from transformers import AutoConfig, AutoModel, PretrainedConfig

from openrlhf_sgpo.config import DTYPES, Inference
from openrlhf_sgpo.finite import check_complete, check_loaded
from openrlhf_sgpo.openrlhf.actor import load_in_shards
from openrlhf_sgpo.shared_files import local


def value_head(settings: PretrainedConfig) -> str:
    """The name of the value head, as OpenRLHF's reward trainer stores it in the model's config."""
    return getattr(settings, "value_head_prefix", "score")


def no_value_head(folder: str, head: str, flag: str) -> ValueError:
    return ValueError(
        f"--{flag} {folder} has no weights {head}.weight: it is not a reward model, or its value head has "
        "another name (value_head_prefix in its config.json)"
    )


def load_reward_model(folder: str, config: Inference, strategy: DeepspeedStrategy) -> Any:
    """A frozen model that maps (tokens, attention_mask) to a reward per row; not yet prepared by the strategy.

    The class is OpenRLHF's, with the head, mean and deviation in the folder's config. OpenRLHF's loader always sets
    ``trust_remote_code`` and does not support fp32. Collective. Raises ValueError if the folder has no value head, or weights
    that are not finite.
    """
    files = local(folder)
    settings = AutoConfig.from_pretrained(files, trust_remote_code=config.model.trust_remote_code)
    head = value_head(settings)
    settings.normalize_reward = hasattr(settings, "mean")
    settings._attn_implementation = config.ds.attn_implementation
    base = AutoModel._model_mapping[type(settings)]
    kind = _get_reward_model(base.__base__, base, head, packing_samples=False)
    shards = load_in_shards(config, strategy, trainable=False)  # kept until from_pretrained has run
    model, report = kind.from_pretrained(
        files, config=settings, dtype=DTYPES[config.ds.param_dtype], output_loading_info=True
    )
    del shards
    if f"{head}.weight" in report["missing_keys"]:
        raise no_value_head(
            folder, head, "reward.heads" if folder in config.reward.heads else "reward.model_name_or_path"
        )
    check_complete(folder, report)
    check_loaded(model, folder, config.ds.param_dtype)
    if settings.normalize_reward:
        # transformers 5 creates models on the meta device, so buffers that are in no file, like these, are undefined.
        model.mean.fill_(settings.mean)
        model.std.fill_(settings.std)
    model.requires_grad_(False)
    return model
