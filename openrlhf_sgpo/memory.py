"""Python's garbage collector: kept from walking over large packages, and called when a model goes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Other packages import these for features that no command uses, if they are installed.
NOT_NEEDED = ("datasets", "scipy", "sklearn")
FROZEN_AT_START = gc.get_freeze_count()  # Python 3.12 leaves some hundred objects out by itself


@contextmanager
def lean_imports() -> Iterator[None]:
    """A command imports the large packages within this block. Their million objects are left out of all later collections, and
    meanwhile the packages of ``NOT_NEEDED`` look as if they were not installed. Does nothing in a process that has done so."""
    if gc.get_freeze_count() > FROZEN_AT_START:
        yield
        return
    modules: dict[str, Any] = sys.modules
    absent = dict.fromkeys(name for name in NOT_NEEDED if name not in modules)
    modules |= absent  # None is how Python notes that there is no such module
    gc.disable()
    try:
        yield
    finally:
        for name in absent:
            del modules[name]
        gc.freeze()
        gc.enable()


def release_memory() -> None:
    """Frees the memory of a model that is no longer used, after its engine's ``destroy``: engines hold reference cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
