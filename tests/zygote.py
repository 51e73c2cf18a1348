"""A process that has imported everything, and forks a child for each rank of a run that a test asks for: imports take longer
than most of these runs. Reads a request per line (JSON) and answers with the run's exit code, minus the signal if one ended it.
The first that is not 0 ends the other ranks."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import weakref
from typing import Any

# Packages say things when they are imported; the answers have a way of their own.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

import openrlhf_sgpo  # noqa: E402

for module in pkgutil.walk_packages(openrlhf_sgpo.__path__, "openrlhf_sgpo."):  # for the children
    if "vllm" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from openrlhf_sgpo.cli.main import main  # noqa: E402


def become(request: dict[str, Any]) -> int:
    """What the child does; its environment, folder and output are those of the request."""
    # A temporary folder that W&B made when it was imported is for all children: none deletes it.
    weakref.finalize._registry.clear()
    if media := sys.modules.get("wandb.sdk.data_types._private"):
        atexit.unregister(media.MEDIA_TMP.cleanup)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    # A line is one write, also with PYTHONUNBUFFERED: ranks write to the same file.
    sys.stdout.reconfigure(line_buffering=True, write_through=False)
    if request["script"] is None:
        return main(request["arguments"])
    sys.argv = [request["script"], *request["arguments"]]
    runpy.run_path(request["script"], run_name="__main__")
    return 0


def serve() -> int:
    gc.freeze()  # the children's collections then pass over the million objects of the imports
    for line in sys.stdin:
        request, ranks, code = json.loads(line), set[int](), 0
        for variables in request["ranks"]:
            child = os.fork()
            if child == 0:
                request["environment"] |= variables
                return become(request)  # ends as any process does, with what is registered for its exit
            ranks.add(child)
        while ranks:
            ended, status = os.wait()
            ranks.remove(ended)
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                for rank in ranks:
                    os.kill(rank, signal.SIGKILL)
        print(code, file=ANSWERS, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve())
