"""OpenRLHF's vLLM rollout actor with further calls: sample, take over weights, say which it holds, and log-probabilities.

Weights come from a policy folder, or out of the trainer's memory: on GPUs by vLLM's own transfers (CUDA IPC, NCCL), elsewhere
through Ray's object store, which is shared memory.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from glob import glob
from math import prod
from multiprocessing.connection import wait
from typing import Any

from openrlhf_sgpo.memory import lean_imports

with lean_imports():  # this is what an engine's process imports first
    import numpy
    import ray
    import torch
    import vllm.v1.engine.utils
    from openrlhf.trainer.ray.utils import ray_noset_visible_devices
    from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
    from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.engine.core import EngineCoreProc  # noqa: F401 - for vLLM's process, which is a copy of this one
    from vllm.v1.engine.exceptions import EngineDeadError

    from openrlhf_sgpo.openrlhf.checksums import Shape, Slice, Sums, as_integers, checksum, held_slices, second_names
    from openrlhf_sgpo.openrlhf.engine_log import own_log, reason_of
    from openrlhf_sgpo.openrlhf.mixture import ARCHITECTURE, PolicyAndReferenceForCausalLM

IN_ENGINE = "OPENRLHF_SGPO_IN_ENGINE"  # is set for the processes that an engine's actor starts


def _end_with_the_actor() -> None:
    """Ray ends actors by force, and on a cluster that stays, vLLM's process of the engine would remain."""

    def end_after(actor: Any) -> None:
        wait([actor.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    if actor := multiprocessing.parent_process():
        threading.Thread(target=end_after, args=(actor,), daemon=True).start()


class _Fork(multiprocessing.context.ForkContext):
    """How vLLM's process of an engine begins on a CPU: as a copy of the actor, which has imported all that it needs. vLLM would
    have a new interpreter import it again, which takes longer than all else at its start."""

    class Process(multiprocessing.context.ForkProcess):
        def run(self) -> None:
            ray._raylet.setproctitle("VLLM::EngineCore")  # vLLM's own way finds no place for a title any more
            _end_with_the_actor()
            super().run()


# Every process of an engine imports this module before it makes a model, unless it is a copy of one that has.
ModelRegistry.register_model(ARCHITECTURE, PolicyAndReferenceForCausalLM)
if IN_ENGINE in os.environ:  # not in the process of a trainer, which makes actors
    _end_with_the_actor()


class PolicyLoader(WorkerWrap):
    """Mixed into vLLM's worker. Weights are loaded as OpenRLHF loads them, by the model's ``load_weights``: vLLM's reloading
    layer by layer leaves tied embeddings as they were."""

    def load_folder(self, folder: str) -> tuple[list[Shape], dict[str, Sums], list[Slice]]:
        """Take over the weights of a Hugging Face folder. Returns what the folder holds, its checksums, and ``held``.

        Raises FileNotFoundError if the folder has no weights.
        """
        from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

        files = sorted(glob(os.path.join(folder, "*.safetensors")))
        if not files:
            raise FileNotFoundError(f"{folder} has no *.safetensors files")
        model = self.mixed_policy()
        shapes, sums, copies = [], {}, second_names(model)

        def read() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in safetensors_weights_iterator(files, use_tqdm_on_load=False):
                # As the engine holds it, whose precision may be lower than the file's.
                weight = weight.to(self.model_runner.model_config.dtype)
                if name not in copies:
                    shapes.append(Shape(name, weight.dtype, tuple(weight.shape)))
                    sums[name] = checksum(weight)
                yield name, weight

        self.replace_weights(read())
        return shapes, as_integers(sums), self.held(shapes)

    def replace_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace weights of the policy, and forget what was made of the old ones (``rollout/vllm_on_cpu.py``)."""
        model = self.mixed_policy()
        model.load_weights(weights)
        for module in model.modules():
            if hasattr(module, "forget_packed"):
                module.forget_packed()

    def held(self, shapes: list[Shape]) -> list[Slice]:
        """What this worker holds of tensors that were sent, see ``held_slices``."""
        return held_slices(self.mixed_policy(), shapes)

    def mixed_policy(self) -> Any:
        """The policy, which is a part of the model if the engine has a reference."""
        model = self.model_runner.get_model()
        return model.policy if isinstance(model, PolicyAndReferenceForCausalLM) else model

    def mix(self, share: float) -> None:
        self.model_runner.get_model().share = share

    def take_packed(self, shapes: list[Shape], packed: bytes) -> None:
        """Take over tensors whose bytes lie one after the other."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")
            data = torch.frombuffer(packed, dtype=torch.uint8)
        sizes = [prod(shape) * dtype.itemsize for _, dtype, shape in shapes]
        parts = zip(shapes, data.split(sizes), strict=True)
        self.replace_weights((name, part.view(dtype).view(shape)) for (name, dtype, shape), part in parts)

    def gpu(self) -> str:
        """The identity of the worker's GPU, whatever its number is called in this process."""
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def open_transfer(self, backend: str, settings: dict[str, Any]) -> None:
        """Make vLLM's receiver of weights; see ``vllm.distributed.weight_transfer``."""
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        self.transfer = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=backend), self.vllm_config, self.device, self.mixed_policy()
        )
        self.transfer.init_transfer_engine(self.transfer.parse_init_info(settings))

    def take_transferred(self, update: dict[str, Any]) -> None:
        self.transfer.update_weights(update)

    def let_go(self) -> None:
        """Forget memory of the trainer that was shared."""
        self.transfer.shutdown()


class _RolloutEngine(RolloutRayActor.__ray_metadata__.modified_class):
    """OpenRLHF's actor as a plain class, to be extended before Ray wraps it again."""

    async def __init__(self, *args: Any, **settings: Any):  # type: ignore[misc]
        try:
            await super().__init__(*args, **settings)
        except Exception as error:
            raise RuntimeError(reason_of(error, own_log())) from error

    async def reason(self) -> str:
        """Why vLLM's process has ended, after a call that has raised EngineDeadError."""
        return reason_of(EngineDeadError(), own_log())

    def _configure_device_env(self, backend: str, bundle_indices: list[int] | None, num_gpus: float) -> None:
        os.environ[IN_ENGINE] = "1"
        if backend == "uni" and current_platform.is_cpu():
            vllm.v1.engine.utils.get_mp_context = _Fork
        super()._configure_device_env(backend, bundle_indices, num_gpus)
        if backend != "ray" and ray_noset_visible_devices():
            # OpenRLHF makes only the first one visible.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, ray.get_gpu_ids()))

    async def ask_workers(self, method: str, *arguments: Any) -> list[Any]:
        """The results of a method of ``PolicyLoader``, by worker."""
        # Between its processes vLLM carries bytes as they are, but makes lists of arrays.
        carried = [given.data if isinstance(given, numpy.ndarray) else given for given in arguments]
        return await self.llm.collective_rpc(method, args=tuple(carried))

    async def mix(self, share: float) -> None:
        """Sample from the mixture with this share of the reference from now on, see ``mixture.py``. What is cached may lack
        keys and values of the reference."""
        await self.llm.collective_rpc("mix", args=(share,))
        await self.reset_prefix_cache()

    async def reset_prefix_cache(self) -> None:
        """vLLM refuses while the blocks of answers are taken, and some are freed a moment after their answers have ended."""
        for _ in range(1000):
            if await self.llm.reset_prefix_cache():
                return
            await asyncio.sleep(0.01)
        raise RuntimeError("vLLM does not forget cached keys and values: requests are running")

    async def sample(
        self, prompt_token_ids: list[int], sampling: dict[str, Any]
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens of n samples for one prompt in a single request, so the prompt is computed once; with their log-probabilities
        if ``sampling`` asks for any."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # Without FINAL_ONLY the stream yields the n samples one by one, and only the last would be returned.
        params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        output = await self.generate(prompt_token_ids, params)
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        return [
            (
                list(sample.token_ids),
                [row[token].logprob for token, row in zip(sample.token_ids, sample.logprobs or (), strict=False)],
            )
            for sample in samples
        ]

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
