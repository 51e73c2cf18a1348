"""How ranks meet and part, and what they tell each other apart from gradients: decisions, results, and that they are there.

All of it goes over a gloo group with a long limit. Over NCCL, ranks that wait for rank 0's engines would spin on the very
GPUs on which those engines generate, and give up after an hour.
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

from torch import distributed

Value = TypeVar("Value")

PARTING = timedelta(seconds=15)  # how long a rank waits for the others at the end


def listen_where_named() -> None:
    """Let torch's rendezvous, in this process from now on, listen at the address by which others look for it (MASTER_ADDR),
    and at no other; on this machine alone, gloo and NCCL too keep to the loopback interface.

    Raises ValueError if ranks on several machines are given an address of this machine alone.
    """
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if ip_address(socket.gethostbyname(address)).is_loopback:
        if int(os.environ.get("WORLD_SIZE", "1")) > int(
            os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1"))
        ):
            raise ValueError(
                f"--master_addr {address} is this machine alone: give an address that the other machines reach"
            )
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    # Not by `from torch.distributed`, where the name is a function's.
    sys.modules["torch.distributed.rendezvous"].TCPStore = _store  # type: ignore[attr-defined]


def _store(host_name: str, port: int, **settings: Any) -> distributed.TCPStore:
    """torch's own store listens on all interfaces, whatever its address."""
    if settings.get("is_master"):
        listener = socket.create_server((host_name, port))
        port = listener.getsockname()[1]
        settings["master_listen_fd"] = listener.detach()
    return distributed.TCPStore(host_name, port, **settings)


def part_ways() -> bool | None:
    """The end of every rank that has a process group; returns whether all ranks came to it, None without a group.

    No rank leaves before the others have all that it sent: connections, and the store of rank 0, end with their process, and
    a rank that is still at work with them would abort. If a rank does not come, because it died or hangs, the others leave
    after ``PARTING``; the launcher ends it.
    """
    if not distributed.is_initialized():
        return None
    if distributed.get_world_size() == 1:
        return True
    try:
        distributed.monitored_barrier(group=_control(), timeout=PARTING)
    except RuntimeError:
        return False
    _control.cache_clear()
    distributed.destroy_process_group()
    return True


@cache
def _control() -> distributed.ProcessGroup:
    """Created at the first use, which is collective like every use."""
    return distributed.new_group(backend="gloo", timeout=timedelta(days=7))


def from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank: what is on disk is for one rank to say, or ranks could part ways. Collective."""
    box = [value]
    distributed.broadcast_object_list(box, src=0, group=_control())
    return box[0]


def on_rank_0(work: Callable[[], Value]) -> Value:
    """Run ``work`` on rank 0 and return its result on every rank; an exception that it raises is raised on every rank, so
    that none waits for the others. Collective; without a process group this process is the only one."""
    if not distributed.is_initialized():
        return work()
    result, problem = None, None
    if distributed.get_rank() == 0:
        try:
            result = work()
        except Exception as error:
            problem = error
    result, told = from_rank_0((result, problem and _portable(problem)))
    try:
        if told is not None:
            raise problem or told
        return result
    finally:
        del (
            problem,
            told,
        )  # an exception that its own frame refers to would keep alive all that ``work`` held, locks included


def _portable(error: Exception) -> Exception:
    """The same exception where it survives pickling, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def gather(value: Value) -> list[Value]:
    """Every rank's value, by rank, on every rank. Collective."""
    values: list[Value] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=_control())
    return values


def raise_together(problem: Exception | None) -> None:
    """Raise the first rank's problem on every rank if any rank has one, so that none waits for the others. Collective; without
    a process group this process is the only one."""
    for first in filter(None, gather(problem) if distributed.is_initialized() else [problem]):
        raise type(first)(
            *first.args
        )  # a new one: an exception that frames of its traceback refer to would keep them alive


def barrier() -> None:
    distributed.barrier(group=_control())
