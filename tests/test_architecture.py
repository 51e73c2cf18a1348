"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import symtable
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "openrlhf_sgpo"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of absolute imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_only_one_room_imports_openrlhf():
    rooms = {path.relative_to(PACKAGE).parts[0] for path in SOURCES if "openrlhf" in imported(path)}
    assert rooms == {"openrlhf"}


# Every room (a folder, or a file beside them) imports only from floors below its own.
HOUSE = """
                                           __main__
                                              cli
                                             loop
                                     evaluator  sources
           benchmarks  chat  comparison  doctor  estimate  push  refinement  run
                     inference  preflight  run_settings  staged_command
                                        oracle  resume
                              fork  judge  report  training
                      content_cache  games  metrics  rollout  run_check
                                     drop_in  ledger  trl
                                   algorithms  run_folder
                                       data  openrlhf
                                            packed
                                            config
                                  finite  flags  shared_files
             dro  extras  integrity  launch  memory  output  ranks  ray_session
                                   registry  table
                             intervals  keys  setting_types  trl_names  yaml_files
                                           __init__
"""
FLOORS = {room: -number for number, line in enumerate(HOUSE.splitlines()) for room in line.split()}


def arrows() -> dict[str, dict[str, str]]:
    """By file of the package, as a module's name, the modules that it imports, each with the place. Imports within functions
    and for annotations count."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES}
    modules = set(names.values())
    graph: dict[str, dict[str, str]] = {name: {} for name in modules}
    for path, name in names.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets: list[str] = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                members = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [member if member in modules else node.module for member in members]
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            graph[name] |= {target: place for target in targets if target in modules and target != name}
    return graph


def circle(graph: dict[str, dict[str, str]]) -> list[str]:
    """The places of the imports along one circle; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            around = [*path[path.index(name) :], name]
            return [f"{graph[module][target]} imports {target}" for module, target in pairwise(around)]
        if name in done:
            return []
        places = next(filter(None, (walk(target, [*path, name]) for target in graph[name])), [])
        done.add(name)
        return places

    return next(filter(None, (walk(name, []) for name in graph)), [])


def room_of(module: str) -> str:
    return (*module.split("."), "__init__")[1]


def test_no_files_import_each_other_in_a_circle():
    assert circle({"a": {"b": "a:1"}, "b": {"c": "b:2"}, "c": {"b": "c:3"}}) == ["b:2 imports c", "c:3 imports b"]
    assert circle(arrows()) == []


def test_arrows_point_down():
    graph = arrows()
    assert {room_of(module) for module in graph} == set(FLOORS), "HOUSE names every room, and nothing else"
    upwards = [
        f"{place} imports {target}, which is not on a floor below"
        for module, targets in graph.items()
        for target, place in targets.items()
        if room_of(module) != room_of(target) and FLOORS[room_of(module)] <= FLOORS[room_of(target)]
    ]
    assert upwards == []


NAMES_OF_NOTHING = {"one", "found", "own", "mine", "theirs", "ours"}


def test_names_say_what_they_hold():
    wrong = []
    others = [
        path for folder in ("tests", "measurements", "examples") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    for path in [*SOURCES, *others]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(node, name, None) for name in ("id", "arg", "attr", "name")} & NAMES_OF_NOTHING
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in names]
    assert not wrong


def comprehensions(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for child in table.get_children():
        if child.get_name().strip("<>") in ("listcomp", "setcomp", "dictcomp"):
            yield child
            yield from comprehensions(child)


def shared_by_comprehensions(table: symtable.SymbolTable) -> list[str]:
    """The functions in which a comprehension binds a name that another one takes from the module."""
    listed = [place for child in table.get_children() for place in shared_by_comprehensions(child)]
    if table.get_type() == "function":
        symbols = [symbol for inner in comprehensions(table) for symbol in inner.get_symbols()]
        bound = {symbol.get_name() for symbol in symbols if symbol.is_local()}
        shared = bound & {symbol.get_name() for symbol in symbols if symbol.is_global()}
        listed += [f"line {table.get_lineno()}: {name}" for name in shared]
    return listed


def test_no_name_is_another_thing_in_the_next_comprehension():
    """Python 3.12.0 to 3.12.3 raise UnboundLocalError there (CPython issue 118513). Ubuntu 24.04 has 3.12.3."""
    wrong = "def f(rows):\n    return {n: x for x, n in rows}, [x(n) for n in rows]"
    assert shared_by_comprehensions(symtable.symtable(wrong, "", "exec")) == ["line 1: x"]
    for path in SOURCES:
        listed = shared_by_comprehensions(symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec"))
        assert not listed, path


def test_a_name_stands_for_one_thing():
    """Classes and functions that others may import; a command has a ``main``, its settings are read by a ``load``."""
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    several = {name: listed for name, listed in places.items() if len(listed) > 1}
    assert several.keys() <= {"main", "load", "sections", "inference"}, several


def test_tests_import_nothing_from_a_file_that_shares_its_name():
    """pytest loads every conftest.py, and files of one name in several folders, under that name."""
    names = [path.stem for path in (ROOT / "tests").rglob("*.py")]
    shared = {name for name in names if names.count(name) > 1}
    importers = [path for path in (ROOT / "tests").rglob("*.py") if shared & imported(path)]
    assert "conftest" in shared and not importers


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 430


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("openrlhf_sgpo, openrlhf_sgpo.config, openrlhf_sgpo.algorithms.sgpo, openrlhf_sgpo.cli.main", "torch"),
        (
            "openrlhf_sgpo.dro, openrlhf_sgpo.dro.losses, openrlhf_sgpo.drop_in.loss",
            "cvxpy scipy transformers openrlhf deepspeed ray vllm trl",
        ),
        ("openrlhf_sgpo.data, openrlhf_sgpo.data.seed", "torch datasets"),
        ("openrlhf_sgpo.games", "torch scipy matplotlib"),
    ],
)
def test_light_modules_stay_light(module, absent):
    code = (
        f"import sys, {module}; loaded = [m for m in {absent.split()} if m in sys.modules]; assert not loaded, loaded"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr


def test_imports_are_lean_once_in_a_process():
    """Nothing is collected meanwhile, and later collections leave out what was loaded."""
    code = """
import gc, importlib.util, sys
start = gc.get_freeze_count()
from openrlhf_sgpo.memory import lean_imports
with lean_imports():
    assert importlib.util.find_spec("sklearn") is None and not gc.isenabled()
assert importlib.util.find_spec("sklearn") is not None and gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > start
with lean_imports():
    assert importlib.util.find_spec("sklearn") is not None and gc.isenabled()
assert gc.get_freeze_count() == frozen
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_flash_attention_stand_in_leaves_no_trace():
    """After OpenRLHF is imported without flash_attn, others still see that it is absent. A run loads nothing in vain."""
    code = """
import importlib.util, sys
from openrlhf_sgpo.memory import lean_imports
with lean_imports():
    import openrlhf_sgpo.loop
assert not {"cvxpy", "datasets", "matplotlib", "pandas", "plotly", "ray", "scipy", "sklearn", "vllm"} & sys.modules.keys()
if importlib.util.find_spec("flash_attn") is None:
    import openrlhf_sgpo.openrlhf
    assert "openrlhf.models.ring_attn_utils" in sys.modules
    assert not [name for name in sys.modules if name.startswith("flash_attn")]
    assert importlib.util.find_spec("flash_attn") is None
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
