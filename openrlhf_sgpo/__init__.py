"""SGPO / SSAPO for OpenRLHF: preference alignment against a worst case, with little human data.

Names are loaded on first use: importing the package needs neither torch nor OpenRLHF.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "SGPOLoss": "openrlhf_sgpo.training.drop_in",
    "SGPOTrainer": "openrlhf_sgpo.training.drop_in",
    "solve_worst_case": "openrlhf_sgpo.dro",
}
__all__ = ["SGPOLoss", "SGPOTrainer", "solve_worst_case"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
