"""The registry of algorithms: built-ins, entry points, module:Class, and what is wrong with each."""

import importlib
import sys
from pathlib import Path

import pytest

from openrlhf_sgpo import algorithms

MODULE = """
from dataclasses import dataclass
from openrlhf_sgpo.algorithms.base import Algorithm

@dataclass
class Required:
    size: int

class Good(Algorithm):
    name = "good"

class Other(Algorithm):
    name = "dpo"

class Nameless(Algorithm):
    pass

class Dashed(Algorithm):
    name = "no-flag"

class Bare(Algorithm):
    name = "bare"
    settings = int

class Undefaulted(Algorithm):
    name = "undefaulted"
    settings = Required

class Stranger:
    name = "stranger"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder on the import path with a module of algorithms and one that does not import."""
    (tmp_path / "third_party.py").write_text(MODULE)
    (tmp_path / "broken_party.py").write_text("raise RuntimeError('no luck')")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("third_party", None)


def install(folder: Path, distribution: str, *entries: str) -> None:
    """What pip would leave behind of a distribution with these entry points."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{algorithms.ENTRY_POINT_GROUP}]", *entries, ""]))
    importlib.invalidate_caches()


def test_built_ins_are_lazy_and_first(folder, monkeypatch):
    install(folder, "zoo", "zeta = third_party:Good", "alpha = third_party:Good", "dpo = third_party:Other")
    assert algorithms.names() == ["dpo", "sgpo", "alpha", "zeta"]
    assert "third_party" not in sys.modules
    monkeypatch.setitem(algorithms.BUILT_INS, "good", "third_party:Good")
    assert algorithms.get("good") is importlib.import_module("third_party").Good


def test_entry_point_and_direct_class(folder):
    install(folder, "zoo", "good = third_party:Good")
    assert algorithms.get("good") is algorithms.get("third_party:Good")


def test_unknown_name(folder):
    with pytest.raises(ValueError, match=r"unknown algorithm 'spgo'; did you mean sgpo\? known: dpo, sgpo"):
        algorithms.get("spgo")
    with pytest.raises(ValueError, match="unknown algorithm 'zzz'; known: dpo, sgpo"):
        algorithms.get("zzz")


def test_an_entry_point_does_not_shadow(folder):
    install(folder, "zoo", "dpo = third_party:Other", "good = third_party:Good")
    with pytest.raises(ValueError) as caught:
        algorithms.get("dpo")
    assert f"{algorithms.BUILT_INS['dpo']} (built in)" in str(caught.value)
    assert "third_party:Other (entry point of zoo)" in str(caught.value)
    assert algorithms.get("third_party:Other").name == "dpo"
    install(folder, "circus", "good = third_party:Nameless")
    with pytest.raises(ValueError, match="claimed by .*(zoo.*circus|circus.*zoo)"):
        algorithms.get("good")


def test_the_same_class_listed_twice_is_no_conflict(folder):
    install(folder, "zoo", "good = third_party:Good")
    install(folder, "circus", "good = third_party:Good")
    assert algorithms.get("good").name == "good"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:Thing", "cannot import module 'no_such_module'"),
        (":Thing", "cannot import module ''"),
        ("broken_party:Thing", r"cannot import module 'broken_party' \(RuntimeError: no luck\)"),
        ("third_party:Missing", "module 'third_party' has no class 'Missing'"),
        ("third_party:Stranger", "'Stranger' is not a subclass of openrlhf_sgpo.algorithms.base.Algorithm"),
        ("third_party:dataclass", "'dataclass' is not a subclass"),
        ("third_party:Nameless", "'name' must be an identifier, it is None"),
        ("third_party:Dashed", "'name' must be an identifier, it is 'no-flag'"),
        ("third_party:Bare", "'settings' must be a dataclass type"),
        ("third_party:Undefaulted", "its setting 'size' needs a default"),
    ],
)
def test_unusable_classes(folder, target, message):
    with pytest.raises(ValueError, match=message) as caught:
        algorithms.get(target)
    assert target in str(caught.value)


def test_name_of_the_class_must_agree(folder):
    install(folder, "zoo", "better = third_party:Good")
    with pytest.raises(ValueError, match="'better': third_party:Good calls itself 'good'"):
        algorithms.get("better")
