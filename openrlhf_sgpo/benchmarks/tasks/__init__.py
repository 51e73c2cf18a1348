"""The benchmarks by name: built-ins, and entry points of the group ``openrlhf_sgpo.benchmarks``."""

from __future__ import annotations

from openrlhf_sgpo.benchmarks.task import Task
from openrlhf_sgpo.registry import Registry

ENTRY_POINT_GROUP = "openrlhf_sgpo.benchmarks"

BUILT_INS = {
    "alpaca_eval": "openrlhf_sgpo.benchmarks.tasks.alpaca_eval:AlpacaEval",
    "mt_bench": "openrlhf_sgpo.benchmarks.tasks.mt_bench:MTBench",
    "ifeval": "openrlhf_sgpo.benchmarks.tasks.ifeval:IFEval",
    "ifbench": "openrlhf_sgpo.benchmarks.tasks.ifbench:IFBench",
    "arena_hard": "openrlhf_sgpo.benchmarks.tasks.arena_hard:ArenaHard",
}

_registry = Registry("benchmark", ENTRY_POINT_GROUP, BUILT_INS, Task)
names, get = _registry.names, _registry.get
