"""OpenRLHF's vLLM rollout actor with three more calls: sample, load a policy, and compute log-probabilities.

An engine loads its weights from the policy folder that training has just written. Each worker reads it once, whatever the
tensor parallelism, whether or not trainer and engine share a GPU, with or without NCCL.
"""

from __future__ import annotations

import asyncio
import os
from glob import glob
from typing import Any

import ray
import torch
from openrlhf.trainer.ray.utils import ray_noset_visible_devices
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap


class PolicyLoader(WorkerWrap):
    """Mixed into vLLM's worker: OpenRLHF's weight updates, and loading a policy folder."""

    def load_policy(self, folder: str) -> int:
        """Replace the weights by those of a Hugging Face folder; returns how many tensors were then compared bit by bit.

        Compared are those that the engine holds under the file's name and shape: with one GPU per engine all that are not
        fused. Raises FileNotFoundError if the folder has no weights, RuntimeError if a parameter of the engine is missing
        from them or differs afterwards.
        """
        from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

        files = sorted(glob(os.path.join(folder, "*.safetensors")))
        if not files:
            raise FileNotFoundError(f"{folder} has no *.safetensors files")
        model = self.model_runner.model
        loaded = model.load_weights(safetensors_weights_iterator(files, use_tqdm_on_load=False))
        parameters = dict(model.named_parameters())
        wrong = sorted(parameters.keys() - set(loaded)) if loaded else []
        compared = 0
        for name, weight in safetensors_weights_iterator(files, use_tqdm_on_load=False):
            parameter = parameters.get(name)
            # vLLM pads the vocabulary, so an embedding may have more rows than in the file.
            if parameter is not None and parameter.shape[1:] == weight.shape[1:] and len(parameter) >= len(weight):
                compared += 1
                if not torch.equal(parameter[: len(weight)], weight.to(parameter)):
                    wrong.append(name)
        if wrong:
            raise RuntimeError(f"after loading {folder} the engine still holds other weights: {wrong[:5]}")
        return compared


class _RolloutEngine(RolloutRayActor.__ray_metadata__.modified_class):
    """OpenRLHF's actor as a plain class, to be extended before Ray wraps it again."""

    def _configure_device_env(self, backend: str, bundle_indices: list[int] | None, num_gpus: float) -> None:
        super()._configure_device_env(backend, bundle_indices, num_gpus)
        if backend != "ray" and ray_noset_visible_devices():
            # OpenRLHF makes only the first one visible.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, ray.get_gpu_ids()))

    async def load_policy(self, folder: str) -> int:
        compared = await self.llm.collective_rpc("load_policy", args=(folder,))
        # The cached keys and values are those of the old weights.
        await self.llm.reset_prefix_cache()
        return min(compared)

    async def sample(self, prompt_token_ids: list[int], sampling: dict[str, Any]) -> list[list[int]]:
        """Tokens of n samples for one prompt in a single request, so the prompt is computed once."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # Without FINAL_ONLY the stream yields the n samples one by one, and only the last would be returned.
        params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        output = await self.generate(prompt_token_ids, params)
        return [list(sample.token_ids) for sample in sorted(output.outputs, key=lambda sample: sample.index)]

    async def log_probs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Per sequence the log-probability of each token after the first, given those before it."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = await asyncio.gather(*(self.generate(sequence, params) for sequence in sequences))
        return [
            [logprobs[token].logprob for token, logprobs in zip(sequence[1:], output.prompt_logprobs[1:], strict=True)]
            for sequence, output in zip(sequences, outputs, strict=True)
        ]


RolloutEngine = ray.remote(_RolloutEngine)
