"""OpenRLHF's vLLM engines on Ray, started and driven by rank 0."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from openrlhf_sgpo import ranks, ray_session
from openrlhf_sgpo.config import DTYPES, Inference
from openrlhf_sgpo.data.records import Answer
from openrlhf_sgpo.data.tokens import ChatFormat
from openrlhf_sgpo.output import Progress, say
from openrlhf_sgpo.rollout.base import Sampling, Stop, engine_count, prompt_seed
from openrlhf_sgpo.rollout.vllm_on_cpu import CPU_ENGINE_ARGUMENTS, CPU_ENVIRONMENT, threads_of


class VllmRollout:
    """``--vllm.num_engines`` engines that get the prompts in turn; the n samples of a prompt are one request.

    On a CPU they start in the background, and the first call waits for them. On a GPU they are up, and asleep if they can be,
    when this object exists: an engine measures how much memory is free while it starts.
    """

    def __init__(self, config: Inference, chat: ChatFormat, folder: str):
        self.config = config
        self.stop = Stop(chat)
        self.stop.add_ends_of(folder, config.model.trust_remote_code)
        self.folder = folder
        self.engines: list[Any] = []
        self.compared = 0  # tensors compared bit by bit with the files of the last policy
        self.sleeps = config.vllm.enable_sleep and torch.cuda.is_available()
        ranks.barrier()  # every rank has freed the memory of its GPU, on which an engine may start
        ranks.on_rank_0(self._start)

    def _start(self) -> None:
        import ray

        on_gpu = torch.cuda.is_available()
        settings, placement = self.config.vllm, ray_session.placement
        count = len(placement.bundles) if placement else engine_count(self.config, torch.cuda.device_count())
        self.environment = {"VLLM_LOGGING_LEVEL": "WARNING"}
        if not on_gpu:
            self.environment |= {**CPU_ENVIRONMENT, "OMP_NUM_THREADS": threads_of(count)}
        if placement is None:
            self.environment |= ray_session.LOOPBACK
            ray_session.start_ray(self.environment)
        elif ray.util.get_node_ip_address().startswith("127."):
            self.environment |= ray_session.LOOPBACK
        several = "ray" if placement else "mp"  # only Ray's workers can be on several machines
        self.arguments: dict[str, Any] = {
            # A folder, because engines get no access token for the hub.
            "model": local_folder(self.folder),
            "worker_extension_cls": "openrlhf_sgpo.openrlhf.engine.PolicyLoader",
            "dtype": DTYPES[self.config.ds.param_dtype],
            "max_model_len": self.config.data.max_len,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "distributed_executor_backend": "uni" if settings.tensor_parallel_size == 1 else several,
            "enable_prefix_caching": settings.enable_prefix_caching,
            "enforce_eager": settings.enforce_eager,
            "trust_remote_code": self.config.model.trust_remote_code,
            "num_gpus": placement.share if placement else settings.tensor_parallel_size if on_gpu else 0,
        }
        if on_gpu:
            self.arguments |= {
                "gpu_memory_utilization": settings.gpu_memory_utilization,
                "enable_sleep_mode": self.sleeps,
            }
        else:
            self.arguments |= CPU_ENGINE_ARGUMENTS
        self.started_with = self.folder
        self.engines = [self._engine(number) for number in range(count)]
        self.starting = list(range(count))
        if on_gpu:
            self._wait_for_start()
        if self.sleeps:
            self._all("sleep")

    def _engine(self, number: int) -> Any:
        from openrlhf_sgpo.openrlhf.engine import RolloutEngine

        placement, arguments = ray_session.placement, self.arguments
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": arguments["num_gpus"]}
        if placement:
            options = placement.options(number) | {"runtime_env": {"env_vars": self.environment}}
            if len(placement.bundles[number]) > 1:
                arguments = arguments | {"bundle_indices": placement.bundles[number]}
        return RolloutEngine.options(**options).remote(**arguments, seed=self.config.train.seed + number)

    def _wait_for(self, numbers: Iterable[int]) -> None:
        """Returns when these engines are up. Raises RuntimeError if one does not start."""
        import ray

        for number in numbers:
            try:
                ray.get(self.engines[number].get_num_unfinished_requests.remote())
            except ray.exceptions.RayError as error:
                raise RuntimeError(f"vLLM engine {number} did not start: {_last_line(error)}") from error

    def _wait_for_start(self) -> None:
        self._wait_for(self.starting)
        self.starting = []

    def _restart(self, number: int) -> None:
        """Replace an engine that died by a new one with the current policy."""
        import ray

        ray.kill(self.engines[number])
        self.engines[number] = self._engine(number)
        self._wait_for([number])
        if self.folder != self.started_with:
            ray.get(self.engines[number].load_policy.remote(self.folder))

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._ask([(number, method, arguments) for number in range(len(self.engines))])

    def _ask(self, calls: list[tuple[int, str, tuple[Any, ...]]], label: str = "") -> list[Any]:
        """The results of calls (engine number, method, arguments). An engine that dies is restarted, and its unanswered calls
        are repeated once; each prompt has its own seed, so its samples are the same.

        Raises RuntimeError if a call fails, or if an engine dies again during the same calls.
        """
        import ray
        from vllm.v1.engine.exceptions import EngineDeadError

        self._wait_for_start()
        results: dict[int, Any] = {}
        died: dict[int, Exception] = {}
        for _ in range(2):
            for number in died:
                say(f"vLLM engine {number} died; restarting it")
                self._restart(number)
            died = {}
            open_calls = [
                (index, number, getattr(self.engines[number], method).remote(*arguments))
                for index, (number, method, arguments) in enumerate(calls)
                if index not in results
            ]
            for index, number, request in Progress(open_calls, desc=label, unit="prompt", disable=not label):
                try:
                    results[index] = ray.get(request)
                except (ray.exceptions.RayActorError, EngineDeadError) as error:
                    died[number] = error
                except ray.exceptions.RayError as error:
                    raise RuntimeError(f"vLLM engine {number} failed: {_last_line(error)}") from error
            if not died:
                return [results[index] for index in range(len(calls))]
        number, death = next(iter(died.items()))
        raise RuntimeError(
            f"vLLM engine {number} died twice on the same prompts ({_last_line(death)}); if the system ran out of memory, "
            "lower --data.max_len, --vllm.num_engines or --vllm.gpu_memory_utilization"
        ) from death

    @contextmanager
    def _awake(self) -> Iterator[None]:
        if self.sleeps:
            self._all("wake_up")
        yield
        if self.sleeps:
            self._all("sleep")

    def load(self, folder: str) -> None:
        if folder == self.folder:
            return
        self.folder = folder
        ranks.on_rank_0(self._load)

    def _load(self) -> None:
        with self._awake():
            self.compared = min(self._all("load_policy", self.folder))

    def generate(self, prompts: list[tuple[int, ...]], sampling: Sampling, label: str) -> list[list[Answer]]:
        parameters = {
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": sorted(self.stop.tokens),
            # Text is decoded only to detect an end of turn of several tokens, which may include special tokens.
            "stop": [self.stop.text] if self.stop.text else None,
            "detokenize": bool(self.stop.text),
            "skip_special_tokens": False,
        }

        def work() -> list[list[Answer]]:
            calls = [
                (
                    number % len(self.engines),
                    "sample",
                    (list(prompt), {**parameters, "seed": prompt_seed(sampling.seed, prompt)}),
                )
                for number, prompt in enumerate(prompts)
            ]
            with self._awake():
                return [[self.stop.sample(ids) for ids in answer] for answer in self._ask(calls, label)]

        return ranks.on_rank_0(work)

    def log_probs(self, sequences: list[tuple[int, ...]]) -> list[list[float]]:
        """Those of the first engine; raises RuntimeError if another one differs by more than 0.1 nats per token."""
        return ranks.on_rank_0(lambda: self._log_probs(sequences))

    def _log_probs(self, sequences: list[tuple[int, ...]]) -> list[list[float]]:
        with self._awake():
            by_engine: list[list[list[float]]] = self._all("log_probs", list(map(list, sequences)))
        for number, engine_log_probs in enumerate(by_engine[1:], start=1):
            gaps = [abs(sum(a) - sum(b)) / len(a) for a, b in zip(by_engine[0], engine_log_probs, strict=True)]
            if max(gaps) > 0.1:
                raise RuntimeError(f"engines 0 and {number} hold different weights: {max(gaps):.3g} nats per token")
        return by_engine[0]

    def close(self) -> None:
        if self.engines:
            import ray

            for engine in self.engines:
                ray.kill(engine)
            self.engines = []
            ray_session.end_ray()


def local_folder(model: str, revision: str | None = None) -> str:
    """The folder of a model; a model of the hub is downloaded unless it is cached. revision: a commit; None: the newest."""
    if os.path.isdir(model):
        return model
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
    return snapshot_download(model, revision=revision, allow_patterns=patterns)


def _last_line(error: BaseException) -> str:
    """The cause of the error: Ray's messages begin with a traceback."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
