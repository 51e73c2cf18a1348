"""Starting and ending a group of ranks, and what they exchange besides gradients: decisions, results and barriers.

All of this uses a gloo group with a long timeout. With NCCL, ranks that wait for rank 0's engines would busy-wait on the GPUs
on which these engines generate, and time out after an hour.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from ipaddress import ip_address
from typing import Any, TypeVar

import torch
from torch import distributed

Value = TypeVar("Value")

PARTING = timedelta(seconds=15)  # how long a rank waits for the others at the end


def listen_where_named() -> None:
    """Makes torch's rendezvous in this process listen only at MASTER_ADDR. If that is a loopback address, gloo and NCCL use
    only the loopback interface too.

    Raises ValueError if ranks on several machines get a loopback address.
    """
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if ip_address(socket.gethostbyname(address)).is_loopback:
        if int(os.environ.get("WORLD_SIZE", "1")) > int(
            os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1"))
        ):
            raise ValueError(
                f"--master_addr {address} is local to this machine: give an address that the other machines can reach"
            )
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    # Not from torch.distributed, where this name is a function.
    sys.modules["torch.distributed.rendezvous"].TCPStore = _store  # type: ignore[attr-defined]


def _store(host_name: str, port: int, **settings: Any) -> distributed.TCPStore:
    """A store that listens only at its address; torch's default listens on all interfaces. Raises ValueError if it cannot."""
    if settings.get("is_master"):
        try:
            listener = socket.create_server((host_name, port))
        except OSError as error:
            raise ValueError(
                f"rank 0 cannot listen for the others: {error.strerror}; if another run has this port, give the launcher "
                "another --master_port"
            ) from error
        port = listener.getsockname()[1]
        settings["master_listen_fd"] = listener.detach()
    return distributed.TCPStore(host_name, port, **settings)


def part_ways(failed: bool) -> bool | None:
    """Ends the process group of every rank; returns whether rank 0 took part and has ``failed``, or None without a group.

    No rank leaves before the others have received all that it sent: connections, and the store of rank 0, end with their
    process, and a rank that still uses them would abort. If a rank has died or hangs, the others leave after ``PARTING``,
    and the launcher ends it.
    """
    if not distributed.is_initialized():
        return None
    of_rank_0 = torch.tensor(failed)
    if distributed.get_world_size() > 1:
        parting = _groups()[1]
        try:
            distributed.broadcast(of_rank_0, src=0, group=parting)
            distributed.monitored_barrier(group=parting, timeout=PARTING)
        except RuntimeError:
            return False
        _groups.cache_clear()
        distributed.destroy_process_group()
    return bool(of_rank_0)


@cache
def _groups() -> tuple[distributed.ProcessGroup, distributed.ProcessGroup]:
    """The gloo group, and one for parting: in a monitored barrier all ranks but rank 0 wait as long as their group allows.
    Created on first use, which is collective like every use."""
    return tuple(distributed.new_group(backend="gloo", timeout=limit) for limit in (timedelta(days=7), PARTING))


def _control() -> distributed.ProcessGroup:
    return _groups()[0]


def from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank: only one rank decides what is on disk, or ranks could diverge. Collective."""
    if distributed.get_world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0, group=_control())
    return box[0]


def on_rank_0(work: Callable[[], Value]) -> Value:
    """Runs ``work`` on rank 0 and returns its result, or raises its exception, on every rank, so none waits for the others.
    Collective; without a process group this process is the only rank."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return work()
    result, problem = None, None
    if distributed.get_rank() == 0:
        try:
            result = work()
        except Exception as error:
            problem = error
    result, shared_problem = from_rank_0((result, problem and _portable(problem)))
    try:
        if shared_problem is not None:
            raise problem or shared_problem
        return result
    finally:
        # An exception referenced by its own frame would keep alive everything that ``work`` held, including locks.
        del problem, shared_problem


def _portable(error: Exception) -> Exception:
    """The exception itself if it survives pickling, else one with its text, which stays an error of the user's."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        text = f"{type(error).__name__}: {error}"
        return ValueError(text) if isinstance(error, ValueError) else RuntimeError(text)


def gather(value: Value) -> list[Value]:
    """Every rank's value, by rank, on every rank. Collective."""
    values: list[Value] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=_control())
    return values


def raise_together(problem: Exception | None) -> None:
    """If any rank has a problem, raises the first one on every rank, so none waits for the others. Collective; without a
    process group this process is the only rank."""
    for first in filter(None, gather(problem) if distributed.is_initialized() else [problem]):
        # A new exception: one that frames of its traceback refer to would keep them alive.
        raise type(first)(*first.args)


def broadcast(content: torch.Tensor) -> None:
    """Fill a tensor on the CPU with that of rank 0. Collective."""
    distributed.broadcast(content, src=0, group=_control())


def send(content: torch.Tensor, rank: int) -> None:
    """Send a tensor on the CPU to a rank, which ``receive``s it."""
    distributed.send(content, rank, group=_control())


def receive(size: int, rank: int) -> torch.Tensor:
    """So many bytes that a rank sends."""
    content = torch.empty(size, dtype=torch.uint8)
    distributed.recv(content, rank, group=_control())
    return content


def barrier() -> None:
    distributed.barrier(group=_control())
