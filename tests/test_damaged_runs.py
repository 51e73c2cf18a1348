"""Run folders with files that are gone, cut, changed or of another shape: the right content, or an error that names the file.

The fuzzer damages one finished run, made of the package's own writers, and reads it in every way in which a run is read again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from report_folders import write_moment
from test_fork import DATA, make_source
from test_fork import settings as settings_of

from openrlhf_sgpo import flags
from openrlhf_sgpo.comparison.compared_runs import read_groups
from openrlhf_sgpo.data.files import DataError
from openrlhf_sgpo.data.records import Pair, load_run_pairs
from openrlhf_sgpo.fork import check_source, take_over
from openrlhf_sgpo.inference import policy_of
from openrlhf_sgpo.integrity import file_digest
from openrlhf_sgpo.ledger import read_ledger, write_ledger
from openrlhf_sgpo.report.moments import read_moments
from openrlhf_sgpo.run_check import check_rounds, forget_metrics, metrics_digest
from openrlhf_sgpo.run_folder import RunFolder, read_growing, write_jsonl


def make(path: Path) -> Path:
    """A run of seed stage and two rounds whose files all have content."""
    run = make_source(path)
    for number in range(3):
        prompt = [{"role": "user", "content": f"Why {number}? \u2028"}]
        pairs = [Pair(f"{number}/{i}", prompt, f"yes {i}", "no", round=number).to_row() for i in range(6)]
        write_jsonl(run.round(number) / "pairs.jsonl", pairs)
        run.finish(number, "pairs", {"pairs": len(pairs), "oracle": "implicit"}, ["pairs.jsonl"])
        facts = {"pairs": 6, "epochs": 1, "ranks": 1, "metrics": metrics_digest(run, number)}
        run.finish(number, "train", facts, ["policy"])
        write_moment(run.round(number), f"round {number}", number, {"q": "Well."})
    write_moment(run.path / "initial", "start", 0, {"q": "Well."})
    costs = {
        f"round_{number}/{name}": {"seconds": 1.5} for number in range(3) for name in ("pairs", "annotate", "train")
    }
    write_ledger(path / "ledger.json", costs | {f"round_{number}/generate": {"seconds": 2.5} for number in (1, 2)})
    return path


@cache
def configuration(algo: str) -> dict[str, Any]:
    return settings_of(Path("run"), algo=algo)  # the path is free


def resumed(path: Path) -> dict[str, Any]:
    """What a resumed run reads before it trains anything."""
    path = shutil.copytree(path, path.with_name("resumed"))  # it writes
    try:
        return what_is_resumed(RunFolder(str(path)))
    except ValueError as error:
        raise type(error)(str(error).replace("resumed", "run")) from error
    finally:
        shutil.rmtree(path)


def what_is_resumed(run: RunFolder) -> dict[str, Any]:
    path = run.path
    run.prepare(flags.dump(configuration("sgpo")), True, DATA)
    check_rounds(run)
    lost = forget_metrics(run)
    results: dict[str, Any] = {}
    for number in run.rounds():
        stages = run.manifest(number)["stages"]
        results[f"stages {number}"] = sorted(stages) or None
        rows = list(load_run_pairs(str(run.round(number) / "pairs.jsonl"))) if "pairs" in stages else None
        results[f"pairs {number}"] = rows
    rows = read_growing(path / "metrics.jsonl")
    results["metrics"] = None if lost else [row for row in rows if row["stage"] in ("round 0", "round 1", "round 2")]
    return results | {"ledger": read_ledger(path / "ledger.json")["stages"] or None}


def forked(path: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        source, into = RunFolder(str(path)), RunFolder(folder)
        check_source(source, into, flags.to_dict(configuration("dpo")), DATA)
        take_over(source, into)
        check_rounds(into)
        files = (path for path in sorted(into.path.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def compared(path: Path, other: Path) -> dict[str, Any]:
    run = read_groups([f"a={path}", f"b={other}"], [])[0].runs[0]
    return {
        "settings": {key: value for key, value in run.settings.items() if key not in ("ckpt", "logger")},
        "policy": (run.policy.round, Path(run.policy.folder, "config.json").read_text()),
        "rest": (run.digests(), run.evaluation(), run.ledger()),
    }


def reported(path: Path) -> dict[str, Any]:
    return {moment.name: {**vars(moment), "name": None} for moment in read_moments(path)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("damaged") / "run")


@pytest.fixture(scope="module")
def readers(whole) -> dict[str, Callable[[Path], dict[str, Any]]]:
    return {"resume": resumed, "fork": forked, "compare": lambda path: compared(path, whole), "report": reported}


@pytest.fixture(scope="module")
def expected(whole, readers, tmp_path_factory) -> dict[str, dict[str, Any]]:
    copy = shutil.copytree(whole, tmp_path_factory.mktemp("copied") / "run")
    return {name: read(copy) for name, read in readers.items()}


def check(results: dict[str, Any], right: dict[str, Any], what: str) -> None:
    """What was read is right; what is not there any more is made again, or its loss is told (None)."""
    assert {key: value for key, value in results.items() if value is not None and value != right.get(key)} == {}, what


def read_damaged(path: Path, damaged: str, readers: Any, expected: Any) -> list[str]:
    """Reads a damaged run in every way; returns the messages of those that refused it."""
    messages = []
    for name, read in readers.items():
        problem = None
        try:
            check(read(path), expected[name], f"{name}, {damaged}")
        except ValueError as error:
            problem = error
        if problem:
            said = str(problem)
            assert type(problem) in (ValueError, DataError, flags.SettingsError), f"{name}, {damaged}: {problem!r}"
            assert str(path) in said, f"{name}, {damaged}: {said}"
            assert any(remedy in said for remedy in REMEDIES), f"{name}, {damaged}: {said}"
            messages.append(f"{name}: {said}")
    return messages


REMEDIES = (
    "from a copy",
    "choose another",
    "finish it with",
    "is not a run folder",
    "is not a run with a finished seed stage",
)
SHAPES = [
    "",
    "null",
    "[]",
    "{}",
    "[1, 2]",
    "3",
    '"x"',
    '{"stages": []}',
    '{"round": 1, "stages": {}}',
    "[" * 5000,
    "NaN",
    "\x00",
]


def damage(path: Path, draw: Any) -> str:
    """Damages one file; returns how."""
    files = sorted(
        str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and "/policy/" not in str(file)
    )
    name = draw(st.sampled_from(files))
    file, kind = path / name, draw(st.sampled_from(["remove", "cut", "line", "flip", "shape", "foreign", "double"]))
    content, place = file.read_bytes(), draw(st.integers(0, max(0, file.stat().st_size - 1)))
    lines = content.splitlines(keepends=True)
    if kind == "remove":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[:place])
    elif kind == "line" and lines:
        del lines[place % len(lines)]
        file.write_bytes(b"".join(lines))
    elif kind == "flip" and content:
        file.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
    elif kind == "shape":
        file.write_text(draw(st.sampled_from(SHAPES)))
    elif kind == "foreign":
        file.write_bytes((path / draw(st.sampled_from(files))).read_bytes())
    elif kind == "double":
        file.write_bytes(content + b"".join(lines[-1:]))
    return f"{kind} {name} at {place}"


@pytest.fixture(scope="module", autouse=True)
def _without_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda number: None)
        yield


@pytest.mark.slow
@settings(max_examples=40, phases=[Phase.generate])
@given(data=st.data())
def test_a_damaged_run_is_refused_or_read_right(whole, readers, expected, data):
    with tempfile.TemporaryDirectory() as folder:
        path = shutil.copytree(whole, Path(folder, "run"))
        read_damaged(path, damage(path, data.draw), readers, expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("round_1/pairs.jsonl", "6 rows were written, 5 are there"),
        ("round_1/prompts.jsonl", "1 rows were written, 0 are there"),
        ("round_1/responses.jsonl", "1 rows were written, 0 are there"),
        ("round_0/held_out.jsonl", "20 rows were written, 19 are there"),
        ("metrics.jsonl", "2 rows were written, 1 are there"),
    ],
)
def test_a_file_that_lost_whole_lines_stops_a_resumed_run(whole, tmp_path, name, said):
    path = shutil.copytree(whole, tmp_path / "run")
    _, *rest = (path / name).read_bytes().splitlines(keepends=True)
    (path / name).write_bytes(b"".join(rest))
    with pytest.raises(ValueError, match=said) as caught:
        resumed(path)
    assert str(path / name) in str(caught.value) and "restore it from a copy, or delete" in str(caught.value)


@pytest.mark.parametrize("name", ["round_1/policy", "round_2/policy", "round_0", "round_1", "round_2", "initial"])
def test_a_deleted_folder_is_named_or_made_again(whole, readers, expected, tmp_path, name):
    path = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(path / name)
    refused = {message.partition(":")[0] for message in read_damaged(path, name, readers, expected)}
    assert (
        refused
        == {
            "round_1/policy": set(),  # no longer needed: the run has come to the policy of round 2
            "round_2/policy": {"resume", "compare"},
            "round_0": {"resume", "fork", "compare", "report"},
            "round_1": {"resume", "fork", "compare", "report"},
            "round_2": {"fork", "compare", "report"},  # a resumed run makes the last round again
            "initial": {"fork", "compare", "report"},
        }[name]
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_policy_that_lost_a_file_is_named(whole, readers, expected, tmp_path, name):
    path = shutil.copytree(whole, tmp_path / "run")
    (path / "round_2/policy" / name).unlink()
    messages = read_damaged(path, name, readers, expected)
    assert {message.partition(":")[0] for message in messages} == {"resume", "compare", "report"}
    assert all(f"round_2/policy/{name} is missing; restore it from a copy" in message for message in messages)
    with pytest.raises(ValueError, match="is missing; restore"):
        policy_of(str(path), None, "model")


def test_large_weights_are_known_by_size_and_ends(tmp_path, monkeypatch):
    """The header of a safetensors file, which names its tensors, is at its beginning."""
    monkeypatch.setattr("openrlhf_sgpo.integrity.LARGE", 100)
    monkeypatch.setattr("openrlhf_sgpo.integrity.PART", 10)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(200))
    whole = file_digest(path)
    for content, noticed in ((bytes(199), True), (b"x" + bytes(199), True), (bytes(199) + b"x", True)):
        path.write_bytes(content)
        assert (file_digest(path) != whole) == noticed
    path.write_bytes(bytes(100) + b"x" + bytes(99))
    assert file_digest(path) == whole
    rows = tmp_path / "rows.jsonl"  # of which every byte counts, however long it is
    rows.write_bytes(b"\n" * 200)
    before = file_digest(rows)
    rows.write_bytes(b"\n" * 100 + b" " + b"\n" * 99)
    assert file_digest(rows)["rows"] == 199 and before["rows"] == 200
