"""The benchmarks by name; looking one up imports its file only."""

from __future__ import annotations

from importlib import import_module

from openrlhf_sgpo.benchmarks.task import Task

_FILES = {
    "alpaca_eval": ("alpaca_eval", "AlpacaEval"),
    "mt_bench": ("mt_bench", "MTBench"),
    "ifeval": ("ifeval", "IFEval"),
    "arena_hard": ("arena_hard", "ArenaHard"),
}
NAMES = tuple(_FILES)


def get(name: str) -> type[Task]:
    module, attribute = _FILES[name]
    return getattr(import_module(f"openrlhf_sgpo.benchmarks.tasks.{module}"), attribute)
