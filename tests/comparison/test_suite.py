"""Suites: settings of every run are known and checked before the first one starts; what is finished is not run again."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path
from statistics import mean

import pytest
import yaml
from comparing import arguments
from judge_server import MODEL, JudgeServer
from running import ROOT, forked, launch, read_jsonl, train

from openrlhf_sgpo.cli.main import compare
from openrlhf_sgpo.comparison import suite as module
from openrlhf_sgpo.comparison.settings import read_settings
from openrlhf_sgpo.comparison.suite import merged, nested, prepare_runs, read_suite, train_suite
from openrlhf_sgpo.flags import SettingsError
from openrlhf_sgpo.integrity import signed
from openrlhf_sgpo.judge.client import JudgeError
from openrlhf_sgpo.run_settings import load

EXAMPLES = ROOT / "examples" / "head_to_head"
PATH = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}


def common(model: Path, data: dict[str, Path]) -> dict:
    """The settings of a small run, with human pairs, as a file has them."""
    words = iter(arguments(model, data, Path("unused"), 0))
    settings = {flag.removeprefix("--"): value for flag, value in zip(words, words, strict=True)}
    del settings["ckpt.output_dir"], settings["train.seed"]
    return settings | {"data.dataset": str(data["pairs"])}


def write(folder: Path, suite: dict) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path


def small(folder: Path, model="model", data=None) -> dict:
    data = data or {"held_out": "h.jsonl", "prompts": "p.jsonl", "pairs": "pairs.jsonl"}
    return {
        "out": str(folder / "out"),
        "seeds": [1],
        "common": common(model, data),
        "algorithms": [
            {"name": "self", "settings": {"algo": "sgpo", "sgpo.radius": 0}},
            {"name": "sgpo", "fork_from": "self", "trials": 2, "settings": {"algo": "sgpo", "sgpo": {"radius": 0.1}}},
        ],
        "compare": {"oracle": "toy_oracles:Letters"},
    }


def test_dotted_keys_are_groups():
    assert nested({"a.b.c": 1, "a": {"b.d": 2}, "e": None}) == {"a": {"b": {"c": 1, "d": 2}}, "e": None}


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "../up",
        "/tmp/up",
        "a/b",
        "",
        ".hidden",
        "start",
        "comparison",
        "Compare.yaml",
        "a\n",
        "é",
        "a" * 101,
        7,
    ],
)
def test_names_stay_in_the_folder_of_the_suite(name, tmp_path):
    suite = small(tmp_path / "inner")
    suite["algorithms"][0]["name"] = name
    (tmp_path / "inner").mkdir()
    with pytest.raises(SettingsError, match="algorithm 1: give a unique name"):
        train_suite(["--suite", str(write(tmp_path / "inner", suite))])
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "suite.yaml"]


def test_names_that_one_folder_would_serve_are_one(tmp_path):
    suite = small(tmp_path)
    suite["algorithms"][1]["name"] = "SELF"
    with pytest.raises(SettingsError, match="algorithm 2: give a unique name"):
        read_suite(write(tmp_path, suite))


def test_settings_of_an_algorithm_win_and_null_takes_away():
    base = {"a": {"b": 1, "c": 2}, "d": 3, "e": {"f": 4}}
    assert merged(base, {"a": {"b": None, "g": 5}, "d": {"h": 6}, "e": None, "i": {"j": None}}) == {
        **{"a": {"c": 2, "g": 5}, "d": {"h": 6}, "i": {}}
    }
    assert base == {"a": {"b": 1, "c": 2}, "d": 3, "e": {"f": 4}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_examples_resolve_at_equal_budgets(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(ROOT)
    suite = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()) | {"out": str(tmp_path)}
    path = write(tmp_path, suite)
    read = read_suite(path)
    runs = prepare_runs(read)
    assert len(runs) == len(suite["algorithms"]) * len(suite["seeds"]) == len({run.folder for run in runs})
    judge = ["--judge.base_url", "http://localhost:1/v1", "--judge.model", "m"] if name == "gpu" else []
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(suite["compare"] | {"runs": ["a", "b"], "out": "o"}))
    assert read_settings(["--config", str(file), *judge], runs[0].resolved).oracle == suite["compare"]["oracle"]
    samples, steps = set(), set()
    for run in runs:
        config, _ = load(run.words)
        size, rounds = config.train.batch_size, config.rounds
        if config.algo in ("nash_md", "slhf"):
            samples.add(rounds.count * rounds.steps * size * 2)
            steps.add(rounds.count * rounds.steps)
        elif rounds.count:
            samples.add(sum(rounds.prompts) * 2)
            steps.add(config.seed.size // size + sum(count // size for count in rounds.prompts))
    tolerance = 1.0 if name == "cpu" else 1.3
    assert max(samples) <= min(1.05, tolerance) * min(samples)
    assert max(steps) <= tolerance * min(steps)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seeds": []}, "seeds: give a list of different integers"),
        ({"seeds": [1, 1]}, "seeds: give a list"),
        ({"seed": [1]}, "seed is unknown, use out, seeds"),
        ({"out": None}, "out: missing"),
        ({"common": [1]}, "common: expected settings"),
        ({"algorithms": [{"name": "a/b"}]}, "algorithm 1: give a unique name"),
        ({"algorithms": [{"name": "a"}, {"name": "a"}]}, "algorithm 2: give a unique name"),
        ({"algorithms": [{"name": "start"}]}, "algorithm 1: give a unique name"),
        ({"algorithms": [{"name": "a", "setting": {}}]}, "a: setting is unknown"),
        (
            {"algorithms": [{"name": "a", "fork_from": "b"}, {"name": "b"}]},
            "a: fork_from b is not an algorithm before it",
        ),
        ({"algorithms": [{"name": "a", "trials": 0}]}, "a: trials 0 is not an integer of at least 1"),
        ({"algorithms": "sgpo"}, "algorithms is a list"),
    ],
)
def test_what_is_wrong_with_a_suite_is_said(tmp_path, change, expected):
    path = write(tmp_path, small(tmp_path) | change)
    with pytest.raises(SettingsError) as caught:
        read_suite(path)
    assert expected in str(caught.value) and f"--suite {path}: " in str(caught.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        read_suite(tmp_path / "missing.yaml")


def test_all_settings_are_checked_before_a_run_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))

    def refused(suite: dict, *more: str) -> str:
        with pytest.raises(SettingsError) as caught:
            train_suite(["--suite", str(write(tmp_path, suite)), *more])
        return str(caught.value)

    suite = small(tmp_path)
    suite["algorithms"][1]["settings"]["adam.lr"] = -1
    suite["algorithms"][0]["settings"]["sgpo.radios"] = 1
    message = refused(suite)
    assert "sgpo: --adam.lr: -1.0 is out of range" in message
    assert "self: --sgpo.radios is unknown" in message
    assert "--oracle: " in refused(small(tmp_path), "--oracle", "nobody")
    assert "--max_prompts: -1 is out of range" in refused(small(tmp_path), "--max_prompts", "-1")
    assert "--runs: --suite says which runs" in refused(small(tmp_path), "--runs", "a", "b")
    suite = small(tmp_path)
    suite["algorithms"][1]["settings"] |= {"eval.dataset": "other.jsonl"}
    assert "--prompts: missing, the algorithms do not share an --eval.dataset" in refused(suite)


def test_the_judge_is_asked_before_a_run_starts(tmp_path, monkeypatch):
    trained: list[Path] = []
    monkeypatch.setattr(module, "train_run", lambda run, place: trained.append(run.folder))
    path = write(tmp_path, small(tmp_path) | {"compare": {"oracle": "judge", "judge": {"model": MODEL}}})
    with JudgeServer() as server:
        words = ["--suite", str(path), "--judge.base_url", server.url, "--judge.max_retries", "0"]
        train_suite(words)
        assert len(server.asked) == 1 and len(trained) == 2
    with pytest.raises(JudgeError, match="a first question"):
        train_suite(words)
    assert len(trained) == 2


def test_a_suite_beside_or_within_a_config_is_refused(tmp_path):
    path, config = write(tmp_path, small(tmp_path)), tmp_path / "config.yaml"
    config.write_text(f"suite: {path}\n")
    for words in (["--config", str(config)], ["--suite", str(path), f"--config={config}"]):
        with pytest.raises(
            SettingsError, match="--config: leave it out; put settings of the comparison under `compare`"
        ):
            compare(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_judge_of_the_example_leaves_the_gpu_room_for_engines(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (EXAMPLES / "gpu.yaml").read_text()
    server = float(re.search(r"--gpu-memory-utilization ([\d.]+)", text)[1])
    suite = yaml.safe_load(text) | {"out": str(tmp_path)}
    runs = prepare_runs(read_suite(write(tmp_path, suite)))
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(suite["compare"] | {"runs": ["a", "b"], "out": "o"}))
    words = ["--config", str(file), "--judge.base_url", "http://localhost:1/v1", "--judge.model", "m"]
    sampling = [load(run.words)[0] for run in runs]
    engines = [config.vllm for config in sampling if config.rounds.count] + [
        read_settings(words, runs[0].resolved).vllm
    ]
    # Training has the rest, a third at least.
    assert all(server + (engine.num_engines or 1) * engine.gpu_memory_utilization <= 2 / 3 for engine in engines)


def test_a_finished_run_with_other_settings_is_not_taken(tmp_path):
    suite = small(tmp_path)
    first = prepare_runs(read_suite(write(tmp_path, suite)))[0]
    first.folder.mkdir(parents=True)
    (first.folder / "resolved_config.yaml").write_text(signed(yaml.safe_dump(first.resolved)))
    prepare_runs(read_suite(write(tmp_path, suite)))
    suite["common"]["adam.lr"] = "0.5"
    with pytest.raises(SettingsError, match=r"self: .*seed_1 holds a run with --adam.lr 0.01, now 0.5"):
        prepare_runs(read_suite(write(tmp_path, suite)))


@pytest.mark.slow
def test_a_suite_trains_what_is_missing_and_compares(tiny_model, tiny_data, tmp_path):
    path = write(tmp_path, small(tmp_path, tiny_model, tiny_data))
    first, last = prepare_runs(read_suite(path))
    process = train(*first.words, **PATH)
    assert process.returncode == 0, process.stderr[-3000:]
    words = ("compare", "--suite", str(path), "--max_prompts", "4")
    process = forked(None, *words, **PATH)
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"1 of 2: {first.folder} is finished" in process.stdout
    assert "2 of 2: finished in" in process.stdout and "train_loss" not in process.stdout and last.log.exists()
    # The second one took over the seed stage of the first.
    for name in ("pairs.jsonl", "policy/model.safetensors"):
        assert (first.folder / "round_0" / name).read_bytes() == (last.folder / "round_0" / name).read_bytes()
    comparison = json.loads((tmp_path / "out/comparison/comparison.json").read_text())
    assert [(group["name"], group["ledger"]["trials"]) for group in comparison["groups"]] == [("self", 1), ("sgpo", 2)]
    assert "the budgets of trials differ: self 1, sgpo 2" in comparison["warnings"]
    assert not any("samples" in warning or "steps" in warning for warning in comparison["warnings"])
    # Without a follower V is the mean of DPO's loss on the held-out pairs.
    margins = [read_jsonl(Path(run.folder) / "round_1/held_out.jsonl") for run in (first, last)]
    losses = [[math.log1p(math.exp(-row["margin"])) for row in rows] for rows in margins]
    cost, bought = comparison["worst_case"]["differences"]
    assert (cost["first"], cost["second"], cost["radius"], bought["radius"]) == ("self", "sgpo", 0.0, 0.1)
    assert cost["difference"] == pytest.approx(mean(losses[0]) - mean(losses[1]), abs=1e-12)
    assert cost["low"] < cost["difference"] < cost["high"] and bought["low"] < bought["difference"] < bought["high"]
    assert "Robustness" in (tmp_path / "out/comparison/report.html").read_text()

    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("stages/*.jsonl")}
    again = forked(None, *words, **PATH)
    assert again.returncode == 0 and again.stdout.count("is finished") == 2
    assert {file: file.stat().st_mtime_ns for file in written} == written


@pytest.mark.slow
def test_a_run_that_fails_stops_the_suite(tiny_data, tmp_path):
    path = write(tmp_path, small(tmp_path, tmp_path / "nothing_here", tiny_data))
    process = forked(None, "compare", "--suite", str(path), **PATH)
    assert process.returncode == 2
    log = tmp_path / "out/self/seed_1.log"
    assert f"failed (2), see {log}; the same command continues it" in process.stderr
    assert "nothing_here cannot be loaded" in log.read_text()
    assert not (tmp_path / "out/sgpo/seed_1").exists() and not (tmp_path / "out/comparison").exists()


def test_the_script_hands_on_its_flags(tmp_path):
    """bash examples/head_to_head.sh --suite FILE is the command; without --suite it is the one for CPUs."""
    recorder = tmp_path / "python"
    recorder.write_text('#!/bin/sh\necho "$@"\n')
    recorder.chmod(0o755)
    script = str(ROOT / "examples/head_to_head.sh")
    said = launch(["bash", script, "--max_prompts", "3"], PYTHON=str(recorder)).stdout
    assert said.endswith(f"-m openrlhf_sgpo.cli.main compare --suite {EXAMPLES / 'cpu.yaml'} --max_prompts 3\n")
    said = launch(["bash", script, "--suite", "mine.yaml"], PYTHON=str(recorder)).stdout
    assert said.endswith("compare --suite mine.yaml\n")
