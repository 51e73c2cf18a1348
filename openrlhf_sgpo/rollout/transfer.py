"""Weights out of the trainer's memory into that of the engines, in a few packed transfers.

All of it is collective, because with ZeRO 3 all ranks gather each layer. Rank 0 speaks with the engines.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from openrlhf_sgpo import ranks
from openrlhf_sgpo.openrlhf.checksums import Shape, Sums, as_integers, checksum
from openrlhf_sgpo.openrlhf.weights import PolicyWeights

NOTHING: Any = ()  # a source between transfers
PACKED = 256 * 2**20  # bytes per transfer through shared memory
# Calls a method of every worker: its name, and its arguments by engine. Returns the results by engine and worker.
AskWorkers = Callable[[str, Sequence[tuple[Any, ...]]], list[list[Any]]]


class Passing:
    """Weights on their way, of which rank 0 takes the checksums. sums, sent: of all that has passed, in bytes."""

    def __init__(self, weights: PolicyWeights):
        self.weights = weights
        self.shapes = weights.metadata()
        self._sums: dict[str, Tensor] = {}
        self.sent = 0

    def metadata(self) -> list[Shape]:
        return self.shapes

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.weights:
            if distributed.get_rank() == 0:
                self._sums[name] = checksum(weight)
                self.sent += weight.nbytes
            yield name, weight

    @property
    def sums(self) -> dict[str, Sums]:
        return as_integers(self._sums)


class Transfer(Protocol):
    """A way to the engines."""

    def send(self, passing: Passing) -> None: ...


def open_transfer(ask: AskWorkers, engines: int, workers: int) -> Transfer:
    """The way to so many engines of so many workers each: without GPUs shared memory, else CUDA IPC if each worker shares its
    GPU with a rank, and NCCL if not."""
    if not torch.cuda.is_available():
        return SharedMemory(ask, engines)
    of_ranks = set(ranks.gather(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)))
    of_workers = ranks.on_rank_0(lambda: [gpu for engine in ask("gpu", [()] * engines) for gpu in engine])
    return VllmTransfer("ipc" if of_ranks.issuperset(of_workers) else "nccl", ask, engines, workers)


class SharedMemory:
    """Through Ray's object store: one copy, which all engines of a machine read where it is."""

    def __init__(self, ask: AskWorkers, engines: int):
        self.ask = ask
        self.engines = engines

    def send(self, passing: Passing) -> None:
        problem: Exception | None = None
        for shapes, packed in _packed(passing, distributed.get_rank() == 0):
            try:
                if problem is None:
                    self._put(shapes, packed)
            except Exception as error:
                problem = error  # the others are still gathering
        ranks.on_rank_0(lambda: _raise(problem))

    def _put(self, shapes: list[Shape], packed: Tensor) -> None:
        import ray

        self.ask("take_packed", [(shapes, ray.put(packed.numpy()))] * self.engines)


def _packed(passing: Passing, keep: bool) -> Iterator[tuple[list[Shape], Tensor]]:
    """The tensors one after the other as bytes on the CPU, each time about ``PACKED``. Without ``keep`` nothing."""
    shapes: list[Shape] = []
    parts: list[Tensor] = []
    size = 0
    for shape, (_, weight) in zip(passing.metadata(), passing, strict=True):
        if keep:
            shapes.append(shape)
            parts.append(weight.contiguous().view(-1).view(torch.uint8))
            size += weight.nbytes
            if size >= PACKED:
                yield shapes, torch.cat(parts).cpu()
                shapes, parts, size = [], [], 0
    if parts:
        yield shapes, torch.cat(parts).cpu()


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem


class VllmTransfer:
    """vLLM's own transfers between GPUs (``vllm.distributed.weight_transfer``), packed. backend: ipc or nccl."""

    def __init__(self, backend: str, ask: AskWorkers, engines: int, workers: int):
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        rank = distributed.get_rank()
        settings: Any = IPCTrainerInitInfo(rank=rank, packed=True)
        if backend == "nccl":
            address, port = ranks.on_rank_0(_free_address)
            settings = NCCLTrainerInitInfo(
                rank=rank, master_address=address, master_port=port, world_size=1 + engines * workers
            )
        self.client = EngineClient(backend, ask, engines, workers)
        self.sender = WeightTransferTrainerFactory.trainer_init(settings, client=self.client, source=NOTHING)
        ranks.on_rank_0(lambda: _raise(self.client.problem))

    def send(self, passing: Passing) -> None:
        self.sender.source = passing
        self.sender.send_weights()
        self.sender.source = NOTHING
        ranks.on_rank_0(lambda: _raise(self.client.problem))


class EngineClient:
    """What vLLM's sender calls on rank 0. Engines load weights plainly, so an update needs no beginning.

    problem: why an engine failed. It is not raised here: the sender goes on with collective calls, in which the other ranks
    would wait forever."""

    def __init__(self, backend: str, ask: AskWorkers, engines: int, workers: int):
        self.backend = backend
        self.ask = ask
        self.engines = engines
        self.workers = workers
        self.problem: Exception | None = None

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        if self.problem is None:
            try:
                self.ask(method, arguments)
            except Exception as error:
                self.problem = error

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        # With NCCL the sender has rank 0, and the workers of each engine follow those of the engines before it.
        first = [
            {"rank_offset": 1 + number * self.workers} if self.backend == "nccl" else {}
            for number in range(self.engines)
        ]
        self._call("open_transfer", [(self.backend, init_info | offset) for offset in first])

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        self._call("take_transferred", [(update_info,)] * self.engines)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if self.backend == "ipc":  # otherwise the trainer could not reuse the memory that was shared
            self._call("let_go", [()] * self.engines)


def _free_address() -> tuple[str, int]:
    import ray

    address = ray.util.get_node_ip_address()
    with socket.create_server((address, 0)) as server:
        return address, server.getsockname()[1]
