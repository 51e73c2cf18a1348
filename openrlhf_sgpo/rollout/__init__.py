"""Rollout engines: OpenRLHF's vLLM actors on Ray, and transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openrlhf_sgpo.rollout.base import Rollout, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from openrlhf_sgpo.config import Config

__all__ = ["Rollout", "Sample", "start_rollout"]


def start_rollout(config: Config, tokenizer: PreTrainedTokenizerBase, folder: str) -> Rollout:
    """The engine that ``--rollout.engine`` names, with the policy in ``folder``. Collective."""
    if config.rollout.engine == "hf":
        from openrlhf_sgpo.rollout.hf import HuggingFaceRollout

        return HuggingFaceRollout(config, tokenizer, folder)
    from openrlhf_sgpo.rollout.vllm import VllmRollout

    return VllmRollout(config, folder)
