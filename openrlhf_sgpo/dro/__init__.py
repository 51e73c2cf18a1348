"""The worst case over a Wasserstein ball of margins: the exact solution, the paper's program, and the leader's losses.

``solve_worst_case`` and its counterpart ``solve_best_case`` need only torch. ``program`` (cvxpy) and ``slsqp`` (SciPy) are
loaded on first use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from openrlhf_sgpo.dro.best import BestCase, solve_best_case
from openrlhf_sgpo.dro.curve import influences, saving, support_of, worst_case_curve
from openrlhf_sgpo.dro.solve import WorstCase, solve_worst_case

if TYPE_CHECKING:
    from openrlhf_sgpo.dro.program import ProgramSolution, program
    from openrlhf_sgpo.dro.slsqp import SlsqpSolution, slsqp

_LAZY = {"program": "program", "ProgramSolution": "program", "slsqp": "slsqp", "SlsqpSolution": "slsqp"}


class _Package(ModuleType):
    """This package. Two functions are named like their modules, and importing a module would replace the function by it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in _LAZY and isinstance(value, ModuleType) else value)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


sys.modules[__name__].__class__ = _Package

__all__ = [
    "BestCase",
    "ProgramSolution",
    "SlsqpSolution",
    "WorstCase",
    "influences",
    "program",
    "saving",
    "slsqp",
    "solve_best_case",
    "solve_worst_case",
    "support_of",
    "worst_case_curve",
]
