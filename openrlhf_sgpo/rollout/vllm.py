"""OpenRLHF's vLLM engines on Ray, started and driven by rank 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from openrlhf_sgpo import ranks
from openrlhf_sgpo.config import DTYPES, Config
from openrlhf_sgpo.data.tokens import ChatFormat
from openrlhf_sgpo.output import Progress
from openrlhf_sgpo.rollout.base import Sample, Stop, prompt_seed
from openrlhf_sgpo.rollout.vllm_on_cpu import CPU_ENGINE_ARGUMENTS, CPU_ENVIRONMENT


class VllmRollout:
    """``--vllm.num_engines`` engines; prompts are dealt to them in turn, n samples of a prompt are one request."""

    def __init__(self, config: Config, chat: ChatFormat, folder: str):
        self.config = config
        self.stop = Stop(chat)
        self.stop.add_ends_of(folder, config.model.trust_remote_code)
        self.folder = folder
        self.engines: list[Any] = []
        self.compared = 0  # tensors that the engines compared with the files of the last policy, bit by bit
        self.sleeps = config.vllm.enable_sleep and torch.cuda.is_available()
        if distributed.get_rank() == 0:
            self._start()
        ranks.barrier()

    def _start(self) -> None:
        import ray

        from openrlhf_sgpo.openrlhf.engine import RolloutEngine

        on_gpu = torch.cuda.is_available()
        environment = {"VLLM_LOGGING_LEVEL": "WARNING"} | ({} if on_gpu else CPU_ENVIRONMENT)
        if not ray.is_initialized():
            # Engines say much; what goes wrong in them arrives as an exception with its traceback.
            ray.init(
                address="local", include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment}
            )
        settings = self.config.vllm
        gpus = settings.tensor_parallel_size if on_gpu else 0
        arguments: dict[str, Any] = {
            "model": self.folder,
            "worker_extension_cls": "openrlhf_sgpo.openrlhf.engine.PolicyLoader",
            "dtype": DTYPES[self.config.ds.param_dtype],
            "max_model_len": self.config.data.max_len,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "distributed_executor_backend": "uni" if settings.tensor_parallel_size == 1 else "mp",
            "enable_prefix_caching": settings.enable_prefix_caching,
            "enforce_eager": settings.enforce_eager,
            "trust_remote_code": self.config.model.trust_remote_code,
            "num_gpus": gpus,
        }
        if on_gpu:
            arguments |= {
                "gpu_memory_utilization": settings.gpu_memory_utilization,
                "enable_sleep_mode": self.sleeps,
            }
        else:
            arguments |= CPU_ENGINE_ARGUMENTS
        self.engines = [
            RolloutEngine.options(num_cpus=0, num_gpus=gpus).remote(**arguments, seed=self.config.train.seed + number)
            for number in range(settings.num_engines)
        ]
        self._all("get_num_unfinished_requests")  # returns once the engines are up
        self._sleep()

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        import ray

        return ray.get([getattr(engine, method).remote(*arguments) for engine in self.engines])

    def _wake(self) -> None:
        if self.sleeps:
            self._all("wake_up")

    def _sleep(self) -> None:
        if self.sleeps:
            self._all("sleep")

    def load(self, folder: str) -> None:
        if folder == self.folder:
            return
        self.folder = folder
        if self.engines:
            self._wake()
            self.compared = min(self._all("load_policy", folder))
            self._sleep()
        ranks.barrier()

    def generate(self, prompts: list[tuple[int, ...]], n: int, seed: int, label: str) -> list[list[Sample]]:
        return ranks.from_rank_0(self._generate(prompts, n, seed, label) if self.engines else None)

    def _generate(self, prompts: list[tuple[int, ...]], n: int, seed: int, label: str) -> list[list[Sample]]:
        import ray

        rollout = self.config.rollout
        sampling = {
            "n": n,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "max_tokens": rollout.max_new_tokens,
            "stop_token_ids": sorted(self.stop.tokens),
            # The engine needs texts only to find an end of turn of several tokens, special ones among them.
            "stop": [self.stop.text] if self.stop.text else None,
            "detokenize": bool(self.stop.text),
            "skip_special_tokens": False,
        }
        self._wake()
        requests = [
            self.engines[number % len(self.engines)].sample.remote(
                list(prompt), {**sampling, "seed": prompt_seed(seed, prompt)}
            )
            for number, prompt in enumerate(prompts)
        ]
        results = [
            [self.stop.sample(ids) for ids in ray.get(request)]
            for request in Progress(requests, desc=label, unit="prompt", disable=not label)
        ]
        self._sleep()
        return results

    def log_probs(self, sequences: list[tuple[int, ...]]) -> list[list[float]]:
        """Every engine is asked; raises RuntimeError if two engines disagree by more than 0.1 nats per token."""
        answer = None
        if self.engines:
            import ray

            self._wake()
            answers = [
                ray.get([engine.log_probs.remote(list(sequence)) for sequence in sequences]) for engine in self.engines
            ]
            self._sleep()
            answer = answers[0]
            for number, other in enumerate(answers[1:], start=1):
                gaps = [abs(sum(a) - sum(b)) / len(a) for a, b in zip(answer, other, strict=True)]
                if max(gaps) > 0.1:
                    raise RuntimeError(f"engines 0 and {number} hold different weights: {max(gaps):.3g} nats per token")
        return ranks.from_rank_0(answer)

    def close(self) -> None:
        if self.engines:
            import ray

            for engine in self.engines:
                ray.kill(engine)
            self.engines = []
            ray.shutdown()
