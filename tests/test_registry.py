"""The registry of algorithms: built-ins, entry points, module:Class, and what is wrong with each."""

import importlib
import importlib.metadata
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from openrlhf_sgpo import algorithms
from openrlhf_sgpo.cli.main import main

MODULE = """
from dataclasses import dataclass, field
from openrlhf_sgpo.algorithms.base import PairAlgorithm

@dataclass
class Required:
    size: int

class Good(PairAlgorithm):
    name = "good"

class Other(PairAlgorithm):
    name = "dpo"

class Nameless(PairAlgorithm):
    pass

class Dashed(PairAlgorithm):
    name = "no-flag"

class Bare(PairAlgorithm):
    name = "bare"
    settings = int

class Undefaulted(PairAlgorithm):
    name = "undefaulted"
    settings = Required

class Stranger:
    name = "stranger"

@dataclass
class Inner:
    rate: float = 1e-5
    text: str = ""

@dataclass
class Many:
    switch: bool = True
    sizes: list[int] = field(default_factory=lambda: list(range(20)))
    inner: Inner = field(default_factory=Inner)

class Configured(PairAlgorithm):
    name, paper, summary = "configured", "a paper", "a summary " + 12 * "that goes on "
    settings = Many
    defaults = {"rounds.count": 1, "oracle": "reward_model"}

class Mute(PairAlgorithm):
    name = "mute"
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


def test_packages_are_read_once_until_one_is_installed(folder, monkeypatch):
    scans = []
    read = importlib.metadata.entry_points
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda: scans.append(1) or read())
    install(folder, "zoo", "good = third_party:Good")
    algorithms.get("good")  # its module leaves its compiled form in the folder
    scans.clear()
    for _ in range(3):
        assert algorithms.get("good").name == "good" and "other" not in algorithms.names()
    assert len(scans) <= 1
    install(folder, "circus", "other = third_party:Other")
    scans.clear()
    assert "other" in algorithms.names() and len(scans) == 1


def test_built_ins_are_lazy_and_first(folder, monkeypatch):
    install(folder, "zoo", "zeta = third_party:Good", "alpha = third_party:Good", "dpo = third_party:Other")
    assert algorithms.names() == [*algorithms.BUILT_INS, "alpha", "zeta"]
    assert "third_party" not in sys.modules
    monkeypatch.setitem(algorithms.BUILT_INS, "good", "third_party:Good")
    assert algorithms.get("good") is importlib.import_module("third_party").Good


@pytest.mark.parametrize("name", algorithms.BUILT_INS)
def test_built_ins_load_and_accept_their_defaults(name):
    algorithm = algorithms.get(name)
    assert algorithm.name == name and algorithm.paper and algorithm.summary
    assert algorithm.option_problems(algorithm.settings()) == []
    assert algorithms.origin(name) == "built in"


def test_origin(folder):
    install(folder, "zoo", "good = third_party:Good", "dpo = third_party:Other")
    assert algorithms.origin("good") == "entry point of zoo"
    assert algorithms.origin("dpo") == "built in and entry point of zoo"
    install(folder, "circus", "good = third_party:Good", "other = third_party:Other")
    assert algorithms.origin("good") in ("entry point of zoo", "entry point of circus")
    assert algorithms.origin("other") == "entry point of circus"
    assert algorithms.origin("nobody") == "not registered"


def test_entry_point_and_direct_class(folder):
    install(folder, "zoo", "good = third_party:Good")
    assert algorithms.get("good") is algorithms.get("third_party:Good")


def test_unknown_name(folder):
    with pytest.raises(ValueError, match=r"unknown algorithm 'sgp0'; did you mean sgpo\? known: dpo, ipo, cdpo, "):
        algorithms.get("sgp0")
    with pytest.raises(ValueError, match="unknown algorithm 'zzz'; known: dpo, ipo, cdpo, "):
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


def listed(capsys) -> dict[str, list[str]]:
    """What ``openrlhf-sgpo algorithms`` prints, by algorithm."""
    assert main(["algorithms"]) == 0
    blocks: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        assert line.isascii() and len(line) <= 100
        if not line.startswith(" "):
            name, _, line = line.partition(" ")
            blocks[name] = []
        blocks[name].append(line.strip())
    return blocks


def test_the_list_names_paper_origin_and_defaults(capsys):
    blocks = listed(capsys)
    assert list(blocks) == algorithms.names()
    assert blocks["dpo"] == [algorithms.get("dpo").summary, "arXiv 2305.18290, built in"]
    assert blocks["cdpo"][1:] == ["ericmitchell.ai/cdpo.pdf, built in", "--cdpo.label_smoothing 0.1"]
    spa = " ".join(blocks["spa"])
    assert "--spa.extrapolation 0.5 0.25 0.125 --spa.warmup_share 0.2" in spa
    assert blocks["spa"][-1] == "shared: --rounds.loss_reference previous"
    for name in algorithms.BUILT_INS:
        flags_of_name = [word for word in " ".join(blocks[name]).split() if word.startswith(f"--{name}.")]
        assert flags_of_name == [f"--{name}.{item.name}" for item in fields(algorithms.get(name).settings)]


def test_the_list_shows_other_packages_and_survives_the_broken_ones(folder, capsys):
    install(folder, "zoo", "configured = third_party:Configured", "mute = third_party:Mute")
    install(folder, "circus", "broken = broken_party:Thing", "dpo = third_party:Other", "gone = no_such_module:Thing")
    blocks = listed(capsys)
    assert list(blocks) == [*algorithms.BUILT_INS, "broken", "configured", "gone", "mute"]
    text = {name: " ".join(lines) for name, lines in blocks.items()}
    assert "broken_party" in text["broken"] and "(RuntimeError: no luck) entry point of circus" in text["broken"]
    assert "cannot import module 'no_such_module'" in text["gone"] and "circus" in text["gone"]
    assert "no attribute 'summary'" in text["mute"] and "entry point of zoo" in text["mute"]
    assert text["dpo"].startswith("error: algorithm 'dpo' is claimed by") and "uninstall one" in text["dpo"]
    assert "a paper, entry point of zoo" in blocks["configured"]
    # No flag is torn from its values.
    sizes = " ".join(map(str, range(20)))
    assert any(f"--configured.sizes {sizes}" in line for line in blocks["configured"])
    assert "--configured.switch true" in text["configured"]
    assert "--configured.inner.rate 1e-05 --configured.inner.text ''" in text["configured"]
    assert blocks["configured"][-1] == "shared: --rounds.count 1 --oracle reward_model"
