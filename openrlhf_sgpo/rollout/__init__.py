"""Rollout engines: OpenRLHF's vLLM actors on Ray, and transformers."""

from __future__ import annotations

from openrlhf_sgpo import extras, ray_session
from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.data.tokens import ChatFormat
from openrlhf_sgpo.rollout.base import Rollout, Sampling, engine_count, sampling_of, sleeping

__all__ = ["Rollout", "Sampling", "check_rollout", "engine_count", "sampling_of", "start_rollout"]


def check_rollout(config: Inference, reference: str = "") -> None:
    """Raises ValueError if an engine's packages are missing, if the engines need more GPUs than are visible, for which Ray
    would wait forever, if they cannot mix the policy with this reference, or if they are to sample and to sleep at the same
    time."""
    if config.rollout.engine == "vllm" and (problem := extras.missing("ray", "vllm")):
        raise ValueError(f"--rollout.engine vllm: {problem}, or use --rollout.engine hf")
    if config.rollout.engine == "vllm" and reference:
        from openrlhf_sgpo.openrlhf.mixture import check_mixed

        for model in (config.model.model_name_or_path, reference):
            check_mixed(model, config.model.trust_remote_code)
    if config.rollout.steps_behind and sleeping(config):
        raise ValueError(
            "--rollout.steps_behind 1: the engines share GPUs with the trainer, and sleep while it trains; give them GPUs of "
            "their own (--launcher ray --ray.colocate false --vllm.num_engines N), or --vllm.enable_sleep false where both fit"
        )
    import torch

    if ray_session.placement:
        return  # who made it has seen to it
    visible, count = torch.cuda.device_count(), engine_count(config, torch.cuda.device_count())
    needed = count * config.vllm.tensor_parallel_size
    if config.rollout.engine == "vllm" and 0 < visible < needed:
        raise ValueError(
            f"--vllm.num_engines {count} times --vllm.tensor_parallel_size {config.vllm.tensor_parallel_size} "
            f"needs {needed} GPUs, but {visible} are visible: lower them, or start with --num_gpus {needed}"
        )


def start_rollout(config: Inference, chat: ChatFormat, folder: str, reference: str = "") -> Rollout:
    """The engine that ``--rollout.engine`` names, with the policy in ``folder``. reference: the model that is mixed with it, if
    one is (see ``Sampling.share``). Collective."""
    if config.rollout.engine == "hf":
        from openrlhf_sgpo.rollout.hf import HuggingFaceRollout

        return HuggingFaceRollout(config, chat, folder, reference)
    from openrlhf_sgpo.rollout.vllm import VllmRollout

    return VllmRollout(config, chat, folder, reference)
