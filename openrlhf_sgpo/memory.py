"""Memory of models that are out of use."""

from __future__ import annotations

import gc

import torch


def release_memory() -> None:
    """Return the memory of a model that is out of use, after its engine's ``destroy``: engines hold reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
