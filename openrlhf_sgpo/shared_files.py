"""Files of rank 0 on machines that do not share its file system: a folder is sent there when it is read, and what other ranks
write is sent to rank 0. Where all ranks see the files of rank 0, nothing is copied."""

from __future__ import annotations

import os
import socket
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import torch
from torch import distributed

from openrlhf_sgpo import ranks

PART = 2**26  # bytes that are sent at a time
KEPT = 3  # copies that a machine keeps: a policy, the one before, and their reference

Stamps = dict[str, tuple[int, int]]  # size in bytes and time in ns of the files of a folder, by their names in it

_copies: OrderedDict[str, tuple[Stamps, str, tempfile.TemporaryDirectory[str] | None]] = OrderedDict()


def seen(path: str | Path) -> list[bool]:
    """By rank, whether it sees this file or folder of rank 0 as rank 0 does. Collective."""
    return ranks.gather(stamps_of(path) == ranks.from_rank_0(stamps_of(path) if distributed.get_rank() == 0 else None))


def local(folder: str) -> str:
    """A folder of rank 0 on this machine: itself where its files are seen, otherwise a copy, which is kept until others are
    needed. What is no folder, like a name of the hub, stays as it is. Collective; alone without a process group."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return folder
    expected = ranks.from_rank_0(stamps_of(folder) if distributed.get_rank() == 0 else None)
    if expected is None or all(sees := ranks.gather(stamps_of(folder) == expected)):
        return folder
    kept = _copies.get(folder)
    has_it = sees[distributed.get_rank()] or (kept is not None and kept[0] == expected)
    # The first rank of each machine without the files writes them for all of it.
    machines = ranks.gather("" if has_it else socket.gethostname())
    place: str | None = None
    if any(machines):
        _copies.pop(folder, None)
        while len(_copies) >= KEPT:
            _copies.popitem(last=False)
        machine = machines[distributed.get_rank()]
        holder = None
        if machine and machines.index(machine) == distributed.get_rank():
            holder = tempfile.TemporaryDirectory(prefix="sgpo-copy-")
            place = os.path.join(holder.name, os.path.basename(folder.rstrip("/")))
        _send(folder, expected, place)
        places = ranks.gather(place)
        if machine:
            _copies[folder] = expected, str(places[machines.index(machine)]), holder
    if sees[distributed.get_rank()]:
        return folder
    _copies.move_to_end(folder)
    return _copies[folder][1]


def bring(written: Path, destination: Path, by: list[int]) -> None:
    """Send the files that some ranks have ``written`` in a folder of their own to ``destination`` at rank 0. Collective."""
    this = distributed.get_rank()
    for source in by:
        for name, (size, _) in ranks.gather(stamps_of(written) or {} if this == source else {})[source].items():
            if this == source:
                with open(written / name, "rb") as file:
                    for part in parts_of(size):
                        ranks.send(read_part(file, part), 0)
            elif this == 0:
                (destination / name).parent.mkdir(parents=True, exist_ok=True)
                with open(destination / name, "wb") as file:
                    for part in parts_of(size):
                        file.write(ranks.receive(part, source).numpy().tobytes())


def stamps_of(path: str | Path) -> Stamps | None:
    """None if there is no such file or folder, or it cannot be read."""
    path = Path(path)
    try:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        stamps = {str(file.relative_to(path)): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    except OSError:
        return None
    return stamps or None


def _send(folder: str, files: Stamps, place: str | None) -> None:
    """From rank 0 to those that give a place."""
    for name, (size, _) in files.items():
        source = open(os.path.join(folder, name), "rb") if distributed.get_rank() == 0 else None  # noqa: SIM115
        target = None
        if place is not None:
            os.makedirs(os.path.dirname(os.path.join(place, name)), exist_ok=True)
            target = open(os.path.join(place, name), "wb")  # noqa: SIM115
        for part in parts_of(size):
            content = read_part(source, part) if source else torch.empty(part, dtype=torch.uint8)
            ranks.broadcast(content)
            if target:
                target.write(content.numpy().tobytes())
        for file in filter(None, (source, target)):
            file.close()


def parts_of(size: int) -> list[int]:
    """Sizes of the parts in which a file is sent."""
    return [min(PART, size - start) for start in range(0, size, PART)]


def read_part(file: BinaryIO, size: int) -> torch.Tensor:
    """The next bytes of a file. Raises RuntimeError if it has fewer."""
    content = file.read(size)
    if len(content) < size:
        raise RuntimeError(f"{file.name} became shorter while it was sent")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
