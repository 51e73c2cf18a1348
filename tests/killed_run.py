"""``openrlhf-sgpo`` that ends itself with SIGKILL at a durable write: python killed_run.py WHICH FOLDER RECORD [command line].

A write is durable if it is in FOLDER. What counts is the few doors through which bytes, names and deletions get there, whoever
opens them: file objects, renamings, links, deletions, ``torch.save`` and safetensors. The last write is made by half: half the
bytes of a file, half the files of a folder that is deleted; a renaming has not happened. WHICH is K, the k-th write, or
"K ENDING", the k-th of a path that ends so (0 never comes), and RECORD gets a line per write; or it is "new": the first whose
line is not in RECORD, which gets it.

SIGKILL cannot be caught, so what is on disk is what any sudden death at that moment leaves.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from openrlhf_sgpo.cli.main import main

NOT_COUNTED = ("log.txt", "lock")  # what other packages say, and the holder's name
TIMES = re.compile(r'\d+\.\d+(e-?\d+)?|(?<=: ")[0-9a-f]{32,}(?=")')  # and digests of what has times
number, _, ending = sys.argv[1].partition(" ")
left, folder, record = 0 if number == "new" else int(number), os.path.abspath(sys.argv[2]), Path(sys.argv[3])
VIEWS = ("report.html", "report.html.partial")  # drawn as often as there is time, with the time
known = set(record.read_text().splitlines()) if number == "new" and record.exists() else set()
dying = False


def durable(door: str, path: Any, half: Callable[[], Any] = lambda: None, text: Any = "") -> None:
    """A write of ``path`` is about to be made; half: makes half of it; text: by which it is told from others of the path."""
    global left, dying
    path = os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""
    if dying or not path.startswith(folder + os.sep) or os.path.basename(path) in NOT_COUNTED:
        return
    same = "" if os.path.basename(path) in VIEWS else TIMES.sub("", str(text).replace(folder, ""))
    line = f"{door} {os.path.relpath(path, folder)} {zlib.crc32(same.encode()):08x}"
    left -= path.endswith(ending)
    if line not in known:
        with plain_open(record, "a") as file:
            file.write(f"{line}\n")
    if line not in known if number == "new" else left == 0:
        dying = True
        half()
        os.kill(os.getpid(), signal.SIGKILL)


def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    file = plain_open(path, mode, *args, **kwargs)
    if set(mode) & set("wax+"):
        write = file.write

        def counted(data: Any) -> int:
            if "a" not in mode:  # the first piece stands for the file
                del file.write
            durable("write", path, lambda: (write(data[: len(data) // 2]), file.flush()), data)
            return write(data)

        file.write = counted
    return file


def count_function(module: Any, name: str) -> None:
    """Count the calls of a function whose second argument is the file it writes."""
    write = getattr(module, name)

    def counted(value: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        def half() -> None:
            write(value, path, *args, **kwargs)
            os.truncate(path, os.path.getsize(path) // 2)

        durable(name, path, half)
        return write(value, path, *args, **kwargs)

    setattr(module, name, counted)


def audited(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("os.rename", "os.link"):
        source, target = arguments[:2]
        durable(event, target, text=Path(source).read_bytes() if os.path.isfile(source) else "")
    elif event == "os.remove":
        durable(event, arguments[0])
    elif event == "shutil.rmtree" and os.path.isdir(arguments[0]):
        files = sorted(path for path in Path(arguments[0]).rglob("*") if path.is_file())
        durable(event, arguments[0], lambda: [os.unlink(path) for path in files[: (len(files) + 1) // 2]])


plain_open = open
builtins.open = io.open = opened
count_function(torch, "save")
count_function(safetensors.torch, "serialize_file")
sys.addaudithook(audited)
sys.exit(main(sys.argv[4:]))
