"""Freeing the memory of models."""

from __future__ import annotations

import gc

import torch


def release_memory() -> None:
    """Frees the memory of a model that is no longer used, after its engine's ``destroy``: engines hold reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
