"""The geometric mixture of policy and reference inside a vLLM engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

ARCHITECTURE = "PolicyAndReferenceForCausalLM"
_PREFIX = "reference."


def check_mixed(model: str, trust_remote_code: bool) -> None:
    """Raises ValueError if vLLM gives this model, a folder or a name on the hub, more than layers of attention to text, or
    settings by its architecture, which a part of a model does not get."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    settings = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    for architecture in settings.architectures or ["None"]:
        known = None if architecture in MODELS_CONFIG_MAP else ModelRegistry.models.get(architecture)
        traits = known and known.inspect_model_cls()
        if not traits or traits.supports_multimodal or traits.has_inner_state or traits.is_attention_free:
            raise ValueError(
                f"--rollout.engine vllm: {model} has the architecture {architecture}, which engines of vLLM cannot mix with "
                "another model; use --rollout.engine hf"
            )


class PolicyAndReferenceForCausalLM(nn.Module):
    """Policy and reference as one model of vLLM, whose next-token logits are, in float32,

        (1 - b) policy + b reference,    b = ``share``    (Munos et al., arXiv 2312.00886).

    To vLLM these are the layers of one model: both see the same batch, and their keys and values lie in the same blocks. So
    prefill in chunks, cached prefixes, preemption and tensor parallelism are vLLM's own, and so is all that follows the logits.

    share: b. With 0 the reference is not computed, and what is cached is no use to other shares. While an engine starts it is
    not 0, because CUDA graphs repeat what is computed then.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        from vllm.compilation.backends import set_model_tag
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
        from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
        from vllm.transformers_utils.config import get_config

        super().__init__()
        model = vllm_config.model_config
        folder = model.hf_config.reference

        def made(name: str, folder: str) -> Any:
            settings = get_config(folder, model.trust_remote_code)
            return init_vllm_registered_model(vllm_config, prefix=maybe_prefix(prefix, name), hf_config=settings)

        self.policy: Any = made("policy", model.model)
        with set_model_tag("reference"):  # compiled code is kept by tag
            self.reference: Any = made("reference", folder)
        self.secondary_weights = [DefaultModelLoader.Source(folder, revision=None, prefix=_PREFIX)]
        self.width = model.get_hidden_size()
        self.share = 0.5

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.policy.embed_input_ids(input_ids)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        """Hidden states of the policy, and beside them those of the reference."""
        states = self.policy(input_ids, positions)
        return torch.cat([states, self.reference(input_ids, positions)], dim=-1) if self.share else states

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits = self.policy.compute_logits(hidden_states[..., : self.width])
        if not self.share:
            return logits
        reference = self.reference.compute_logits(hidden_states[..., self.width :])
        if logits is None:  # on other workers than the first
            return None
        return (1 - self.share) * logits.float() + self.share * reference.float()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Those of the policy; and, when the engine starts, those of the reference after them."""

        def named(group: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            return ((name.removeprefix(_PREFIX), weight) for name, weight in group)

        loaded: set[str] = set()
        for of_reference, group in groupby(weights, key=lambda pair: pair[0].startswith(_PREFIX)):
            model, name = (self.reference, "reference") if of_reference else (self.policy, "policy")
            loaded |= {f"{name}.{parameter}" for parameter in model.load_weights(named(group)) or ()}
        return loaded
