"""OpenRLHF's vLLM engines on Ray, started and driven by rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from openrlhf_sgpo import ranks, ray_session
from openrlhf_sgpo.config import DTYPES, Inference
from openrlhf_sgpo.data.records import Answer
from openrlhf_sgpo.data.tokens import ChatFormat
from openrlhf_sgpo.openrlhf.checksums import compared_share
from openrlhf_sgpo.openrlhf.engine_log import last_line
from openrlhf_sgpo.openrlhf.weights import PolicyWeights
from openrlhf_sgpo.output import Progress, say
from openrlhf_sgpo.rollout.base import Ask, Sampling, Stop, Value, engine_count, prompt_seed, sleeping
from openrlhf_sgpo.rollout.folders import EngineFolders, local_folder
from openrlhf_sgpo.rollout.transfer import Passing, Transfer, open_transfer
from openrlhf_sgpo.rollout.vllm_on_cpu import CPU_ENGINE_ARGUMENTS, CPU_ENVIRONMENT, threads_of

COMPARED = 0.95  # share of the weights whose proof is expected


class EngineDied(RuntimeError):
    """Engines died with a call. numbers: which ones. reason: of the first."""

    def __init__(self, numbers: list[int], reason: str):
        super().__init__(numbers, reason)
        self.numbers = numbers
        self.reason = reason


class VllmRollout:
    """``--vllm.num_engines`` engines that get the prompts in turn; the n samples of a prompt are one request.

    On a CPU they start in the background, and the first call waits for them. On a GPU they are up, and asleep if they can be,
    when this object exists: an engine measures how much memory is free while it starts.

    Where they share GPUs with the trainer they sleep outside ``awake``. New weights are taken over in this order: the engines'
    memory for weights wakes, weights arrive, engines prove which they hold, forget cached keys and values, and the memory for
    those wakes last. compared: share of the weights that was proved. sent: bytes that left the trainer's memory. reference: the
    folder of a model that the engines hold beside the policy (see ``openrlhf/mixture.py``); empty if there is none.
    """

    def __init__(self, config: Inference, chat: ChatFormat, folder: str, reference: str = ""):
        self.config = config
        self.stop = Stop(chat)
        for model in filter(None, (folder, reference)):
            self.stop.add_ends_of(model, config.model.trust_remote_code)
        self.reference = reference
        self.weights: str | PolicyWeights = folder
        self.engines: list[Any] = []
        self.compared = 0.0
        self.sent = 0
        self._said = False
        self._transfer: Transfer | None = None
        self._share: float | None = None  # of the reference in what the engines sample from, if all have been told
        self._uses = 0  # blocks in which the engines stay awake
        self._thread = ThreadPoolExecutor(1)
        self._begun = False  # the thread is at work
        self._holds = True  # the engines have ``weights`` in memory, or will when they wake
        self.sleeps = sleeping(config)
        self._awake: list[str] = [] if self.sleeps else ["weights", "kv_cache"]  # parts of the engines' memory
        self.started_with = folder
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
        self.folders = EngineFolders(placement)
        several = "ray" if placement else "mp"  # only Ray's workers can be on several machines
        self.arguments: dict[str, Any] = {
            # A folder, because engines get no access token for the hub.
            "model": local_folder(self.started_with),
            "worker_extension_cls": "openrlhf_sgpo.openrlhf.engine.PolicyLoader",
            "dtype": DTYPES[self.config.ds.param_dtype],
            "max_model_len": self.config.data.max_len,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "distributed_executor_backend": "uni" if settings.tensor_parallel_size == 1 else several,
            "enable_prefix_caching": settings.enable_prefix_caching,
            "enforce_eager": settings.enforce_eager,
            "trust_remote_code": self.config.model.trust_remote_code,
            # Of the distribution that is sampled, at its temperature, or of the policy itself.
            "logprobs_mode": "raw_logprobs" if self.config.rollout.reuse_log_probs else "processed_logprobs",
            "num_gpus": placement.share if placement else settings.tensor_parallel_size if on_gpu else 0,
        }
        if self.reference:
            from openrlhf_sgpo.openrlhf.mixture import ARCHITECTURE

            mixed = {"architectures": [ARCHITECTURE], "reference": local_folder(self.reference)}
            self.arguments["hf_overrides"] = mixed
        if on_gpu:
            self.arguments |= {
                "gpu_memory_utilization": settings.gpu_memory_utilization,
                "enable_sleep_mode": self.sleeps,
            }
        else:
            self.arguments |= CPU_ENGINE_ARGUMENTS
        self.engines = [self._engine(number) for number in range(count)]
        self.starting = list(range(count))
        if on_gpu:
            self._wait_for_start()
        if self.sleeps:
            self._all("sleep")

    def _engine(self, number: int) -> Any:
        from openrlhf_sgpo.openrlhf.engine import RolloutEngine

        placement = ray_session.placement
        arguments = self.arguments | {"model": self.folders.place(self.arguments["model"], number)}
        if self.reference:
            mixed = arguments["hf_overrides"]
            arguments["hf_overrides"] = mixed | {"reference": self.folders.place(mixed["reference"], number)}
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
                cause = last_line(error).removeprefix("RuntimeError: ")
                raise RuntimeError(
                    f"vLLM engine {number} did not start, see --vllm.*, --data.max_len: {cause}"
                ) from error

    def _wait_for_start(self) -> None:
        self._wait_for(self.starting)
        self.starting = []

    def _restart(self, numbers: Iterable[int]) -> None:
        """Replace engines that died by new ones with the current weights. Collective."""

        def replace() -> None:
            import ray

            for number in numbers:
                say(f"vLLM engine {number} died; restarting it")
                ray.kill(self.engines[number])
                self.engines[number] = self._engine(number)
            self._wait_for(numbers)
            if self.sleeps:  # as the others are
                calls = [("sleep", 1 if self.reference else 2), *(("wake_up", [tag]) for tag in self._awake)]
                for method, argument in calls:
                    ray.get([getattr(self.engines[number], method).remote(argument) for number in numbers])

        ranks.on_rank_0(replace)
        self._transfer = None  # the groups of NCCL have lost a member
        self._share = None
        if self.weights != self.started_with or self.sleeps:
            self._fill()

    def _surviving(self, work: Callable[[], Value]) -> Value:
        """The result of collective work. If engines die in it they are restarted, and the work is done once more; each prompt
        has its own seed, so its samples are the same. Raises RuntimeError if an engine dies again."""
        try:
            return work()
        except EngineDied as death:
            self._restart(death.numbers)
        try:
            return work()
        except EngineDied as death:
            number, *_ = death.numbers
            raise RuntimeError(
                f"vLLM engine {number} died twice on the same prompts ({death.reason}); if the system ran out of memory, "
                "lower --data.max_len, --vllm.num_engines or --vllm.gpu_memory_utilization"
            ) from death

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._ask([(number, method, arguments) for number in range(len(self.engines))])

    def _ask_workers(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
        """See ``transfer.AskWorkers``. What is large is given as a reference into Ray's object store."""
        return self._ask([(number, "ask_workers", (method, *given)) for number, given in enumerate(arguments)])

    def _ask(
        self, calls: list[tuple[int, str, tuple[Any, ...]]], label: str = "", results: dict[int, Any] | None = None
    ) -> list[Any]:
        """The results of calls (engine number, method, arguments). results: of calls that need no answer any more, by their
        place; those that are answered are added.

        Raises EngineDied after all others are answered, RuntimeError if a call fails.
        """
        import ray
        from vllm.v1.engine.exceptions import EngineDeadError

        self._wait_for_start()
        results = {} if results is None else results
        died: dict[int, str] = {}
        open_calls = [
            (index, number, getattr(self.engines[number], method).remote(*arguments))
            for index, (number, method, arguments) in enumerate(calls)
            if index not in results
        ]
        for index, number, request in Progress(open_calls, desc=label, unit="prompt", disable=not label):
            try:
                results[index] = ray.get(request)
            except (ray.exceptions.RayActorError, EngineDeadError) as error:
                if number not in died:
                    died[number] = self._reason(number, error)
            except ray.exceptions.RayError as error:
                raise RuntimeError(f"vLLM engine {number} failed: {last_line(error)}") from error
        if died:
            raise EngineDied(sorted(died), next(iter(died.values())))
        return [results[index] for index in range(len(calls))]

    def _reason(self, number: int, error: BaseException) -> str:
        """Why an engine has died, of which ``error`` has told."""
        import ray

        with suppress(ray.exceptions.RayError):  # its actor has ended too
            return str(ray.get(self.engines[number].reason.remote(), timeout=10))
        return last_line(error)

    @contextmanager
    def awake(self) -> Iterator[None]:
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
        if self.sleeps and not self._uses:
            # Weights of the trainer's memory are other ones when the engines wake, so nobody keeps them without a reference.
            level = 1 if isinstance(self.weights, str) or self.reference else 2
            ranks.on_rank_0(lambda: self._all("sleep", level))
            self._awake, self._holds = [], level == 1

    def _wake(self, tag: str) -> None:
        if self.sleeps and tag not in self._awake:
            ranks.on_rank_0(lambda: self._all("wake_up", [tag]))
            self._awake.append(tag)

    def load(self, weights: str | PolicyWeights) -> None:
        if weights == self.weights:
            return
        assert not self._begun, "the engines still answer with the weights that they have"
        self.weights = weights
        with self.awake():
            self._surviving(self._fill)

    def _fill(self) -> None:
        """Put ``weights`` into the engines' memory, and have them prove that they hold them."""
        self._wake("weights")
        source = self.weights
        if isinstance(source, str):
            self.compared = ranks.on_rank_0(lambda: self._fill_from(source))
        else:
            if self._transfer is None:
                engines, workers = ranks.from_rank_0(len(self.engines)), self.config.vllm.tensor_parallel_size
                self._transfer = open_transfer(self._ask_workers, engines, workers)
            passing = Passing(source)
            self._transfer.send(passing)
            self.compared = ranks.on_rank_0(lambda: self._compare(passing))
            self.sent = passing.sent
        self._holds = True
        if self.compared < COMPARED and not self._said:
            self._said = True
            ranks.on_rank_0(
                lambda: say(f"engines can prove only {self.compared:.0%} of this model's weights after they were sent")
            )
        # The cached keys and values are those of the old weights.
        ranks.on_rank_0(lambda: self._all("reset_prefix_cache"))

    def _fill_from(self, folder: str) -> float:
        shares = []
        places = [(self.folders.place(folder, number),) for number in range(len(self.engines))]
        for workers in self._ask_workers("load_folder", places):
            (shapes, sums, _), *_ = workers
            shares.append(compared_share(shapes, sums, [held for _, _, held in workers]))
        return min(shares)

    def _compare(self, passing: Passing) -> float:
        held = self._ask_workers("held", [(passing.shapes,)] * len(self.engines))
        return min(compared_share(passing.shapes, passing.sums, workers) for workers in held)

    def _ready(self) -> None:
        if not self._holds:
            self._fill()
        self._wake("kv_cache")

    def _mix(self, share: float) -> None:
        """On rank 0: the engines sample from the mixture with this share of the reference from now on."""
        assert self.reference or not share, "the engines have no reference to mix with the policy"
        if self.reference and share != self._share:
            self._all("mix", share)
            self._share = share

    def generate(self, prompts: list[tuple[int, ...]], sampling: Sampling, label: str) -> list[list[Answer]]:
        results: dict[int, Any] = {}

        def work() -> list[list[Answer]]:
            self._ready()
            return ranks.on_rank_0(lambda: self._sample(prompts, sampling, label, results))

        with self.awake():
            return self._surviving(work)

    def begin(self, work: Callable[[Ask], Value]) -> Callable[[], Value]:
        """Start ``work`` in a thread of rank 0, where it asks the engines, which keep their weights meanwhile. Returns a
        function that waits for the result. Both are collective, ``work`` is not. For engines that do not sleep.

        The function raises RuntimeError if an engine dies, because the weights that it had may be gone.
        """
        self._ready()
        self._begun = True
        future = self._thread.submit(work, self._sample) if self.engines else None

        def wait() -> Value:
            try:
                return ranks.on_rank_0(lambda: future.result())  # type: ignore[union-attr]
            except EngineDied as death:
                number, *_ = death.numbers
                raise RuntimeError(
                    f"vLLM engine {number} died while the policy trained ({death.reason}), and with it the weights that it "
                    "had; --resume goes on from the last checkpoint"
                ) from death
            finally:
                self._begun = False

        return wait

    def _sample(
        self,
        prompts: list[tuple[int, ...]],
        sampling: Sampling,
        label: str = "",
        results: dict[int, Any] | None = None,
    ) -> list[list[Answer]]:
        """On rank 0, which has the engines. results: see ``_ask``."""
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
            "logprobs": 0 if sampling.log_probs else None,
        }
        self._mix(sampling.share)
        calls = []
        for number, prompt in enumerate(prompts):
            arguments = list(prompt), {**parameters, "seed": prompt_seed(sampling.seed, prompt)}
            calls.append((number % len(self.engines), "sample", arguments))
        return [[self.stop.sample(*drawn) for drawn in answer] for answer in self._ask(calls, label, results)]

    def log_probs(self, sequences: list[tuple[int, ...]]) -> list[list[float]]:
        """Those of the first engine; raises RuntimeError if another one differs by more than 0.1 nats per token."""

        def ask() -> list[list[list[float]]]:
            self._mix(0.0)
            return self._all("log_probs", list(map(list, sequences)))

        def work() -> list[list[list[float]]]:
            self._ready()
            return ranks.on_rank_0(ask)

        with self.awake():
            by_engine = self._surviving(work)
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
            self._thread.shutdown()
            self.folders.close()
            self.engines = []
            ray_session.end_ray()
