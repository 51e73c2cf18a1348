"""SGPO / SSAPO for OpenRLHF: preference alignment against a worst case, with little human data.

Names are loaded on first use: importing the package needs neither torch nor OpenRLHF.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# OpenMP reads this when torch is loaded, here and in all child processes. Threads that spin while they wait take the cores from
# whatever else runs, which then keeps the threads that they wait for from finishing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_MODULES = {
    "SGPOLoss": "openrlhf_sgpo.drop_in.loss",
    "SGPOTrainer": "openrlhf_sgpo.drop_in.trainer",
    "solve_worst_case": "openrlhf_sgpo.dro",
}
__all__ = ["SGPOLoss", "SGPOTrainer", "solve_worst_case"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
