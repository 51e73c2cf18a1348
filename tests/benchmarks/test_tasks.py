"""The registry of benchmarks."""

import pytest

from openrlhf_sgpo.benchmarks import tasks
from openrlhf_sgpo.benchmarks.settings import load
from openrlhf_sgpo.flags import SettingsError

MODULE = """
from dataclasses import dataclass
from openrlhf_sgpo.benchmarks.task import Task

@dataclass
class LengthSettings:
    limit: int = 0

class Length(Task):
    name, judged, answer_fields, Settings = "length", False, {}, LengthSettings
"""


def test_every_name_leads_to_the_benchmark_of_that_name():
    assert tasks.names() == ["alpaca_eval", "mt_bench", "ifeval", "ifbench", "arena_hard"]
    assert [tasks.get(name).name for name in tasks.names()] == tasks.names()


def test_another_package_adds_a_benchmark_with_flags_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "their_benchmark.py").write_text(MODULE)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{tasks.ENTRY_POINT_GROUP}]\nlength = their_benchmark:Length\n")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load(["--models", "a/b", "--out", "o", "--tasks", "length", "--length.limit", "3"])
    assert loaded.options["length"].limit == 3


def test_a_name_that_is_not_registered_is_refused():
    with pytest.raises(SettingsError, match="--tasks: gsm8k is unknown, choose from alpaca_eval, mt_bench"):
        load(["--models", "a/b", "--out", "o", "--tasks", "gsm8k"])
