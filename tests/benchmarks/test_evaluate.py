"""``openrlhf-sgpo evaluate`` from a tiny model to the leaderboard, with a real judge server that goes by a rule."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean

import pytest
import toy_benchmarks
from judge_server import JudgeServer, sigmoid
from running import forked, inherited
from tiny import write_jsonl

from openrlhf_sgpo import flags
from openrlhf_sgpo.benchmarks.leaderboard import leaderboard_table
from openrlhf_sgpo.benchmarks.settings import load
from openrlhf_sgpo.benchmarks.task import Result
from openrlhf_sgpo.content_cache import ContentCache
from openrlhf_sgpo.run_folder import read_json, read_jsonl


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    return toy_benchmarks.alpaca_eval(folder), toy_benchmarks.mt_bench(folder)


def arguments(files, models, url, out, *more):
    alpaca, mt_bench = files
    return [
        *("--models", *models, "--out", str(out), "--alpaca_eval.file", str(alpaca), "--alpaca_eval.unverified"),
        *("--mt_bench.folder", str(mt_bench), "--mt_bench.unverified", "--rollout.engine", "hf"),
        *("--rollout.max_new_tokens", "12", "--data.max_len", "256", "--ds.param_dtype", "fp32"),
        *("--judge.base_url", url, "--judge.model", "rule", "--judge.concurrency", "2", *more),
    ]


def finished(argv):
    process = forked(None, "evaluate", *argv)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def killed_after(count: int, server: JudgeServer, argv) -> None:
    """``evaluate``, and SIGKILL once the judge was asked so many questions."""
    process = subprocess.Popen(
        [sys.executable, "-m", "openrlhf_sgpo.cli.main", "evaluate", *argv],
        env=inherited() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while len(server.asked) < count and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.stdout.read()[-3000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def by_hand(out: Path, name: str) -> tuple[float, dict[str, float]]:
    """Win rate and scores of a model from its answers and the judge's rule."""
    preferences = []
    for row, instruction in zip(
        read_jsonl(out / name / "answers/alpaca_eval.jsonl"), toy_benchmarks.INSTRUCTIONS, strict=True
    ):
        baseline = "base " * (1 + toy_benchmarks.INSTRUCTIONS.index(instruction))
        answer = row["turns"][0]
        (switched,) = Random("is_switched_outputs" + instruction + "0").choices([False, True])
        first, second = (answer, baseline) if switched else (baseline, answer)
        p = sigmoid((second.count("e") - first.count("e")) / 4 + 0.3)
        preferences.append(p if switched else 1 - p)
    turns = [row["turns"] for row in read_jsonl(out / name / "answers/mt_bench.jsonl")]
    scores = [[1 + len(text) % 10 for text in pair] for pair in turns]
    first, second = (fmean(pair[turn] for pair in scores) for turn in (0, 1))
    return 100 * fmean(preferences), {"turn_1": first, "turn_2": second, "average": fmean([first, second])}


@pytest.mark.slow
def test_two_models_a_kill_and_a_leaderboard(files, tiny_model, other_tiny_model, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    models = [f"one={tiny_model}", f"two={other_tiny_model}"]
    with JudgeServer(judge=toy_benchmarks.rule) as server:
        finished(arguments(files, models, server.url, whole))
        undisturbed = Counter(server.asked)
    assert max(undisturbed.values()) == 1
    # A failure of each kind for some questions, and a kill while the judge is being asked.
    modes = iter(["500", "429", "half", "cut", "nonsense", "bare"])
    failing: dict[str, str] = {}

    def plan(text, times):
        if times == 0 and len(failing) < 6 and "model_identifier" in text and "two and two" not in text:
            failing[text] = next(modes)
        return failing.get(text) if times == 0 else None

    with JudgeServer(plan, judge=toy_benchmarks.rule, pause=0.05) as server:
        argv = arguments(files, models, server.url, out)
        killed_after(12, server, argv)
        kept = len(ContentCache(out / "judgements/rule.jsonl"))
        text = finished(argv)
        asked = Counter(server.asked)
        assert 0 < kept < len(undisturbed) and len(failing) == 6
        # Every answer once more than it failed; but for those that the killed process was waiting for, two at most.
        assert 0 <= asked.total() - len(asked) - len(failing) <= 2
        assert asked.keys() == undisturbed.keys()
        before = len(server.asked)
        finished(argv)
        assert len(server.asked) == before  # everything is there
    assert len(ContentCache(out / "judgements/rule.jsonl")) == len(undisturbed)
    for name in ("one", "two"):
        rate, scores = by_hand(out, name)
        assert read_json(out / name / "alpaca_eval/rule/result.json")["figures"]["win_rate"] == pytest.approx(rate)
        assert read_json(out / name / "mt_bench/rule/result.json")["figures"] == pytest.approx(scores)
        for task in ("alpaca_eval", "mt_bench"):
            kept_row, whole_row = (read_json(folder / name / task / "rule/result.json") for folder in (out, whole))
            assert kept_row == whole_row
    rows = read_json(out / "leaderboard.json")["rows"]
    assert [(row["task"], row["n"], row["expected"]) for row in rows] == [("alpaca_eval", 6, 6)] * 2 + [
        ("mt_bench", 6, 6)
    ] * 2
    assert rows[0]["figures"]["win_rate"] >= rows[1]["figures"]["win_rate"]  # the best first
    assert all(row["judge"]["model"] == "rule" and row["decoding"]["max_new_tokens"] == 12 for row in rows)
    with open(out / "leaderboard.csv", newline="") as file:
        table = {(row["task"], row["model"], row["figure"]): row["value"] for row in csv.DictReader(file)}
    assert float(table["alpaca_eval", "one", "win_rate"]) == pytest.approx(by_hand(out, "one")[0])
    assert "alpaca_eval, judge rule" in text and (out / "report.html").stat().st_size > 10_000


def row(model, judge, expected=8, **figures):
    identity = {"model": judge, "logprobs": True} if judge else None
    return Result("alpaca_eval", model, expected, expected, figures, categories={"math": 2.5}, judge=identity)


def test_scores_that_do_not_compare_share_no_table():
    letters = replace(row("d", "j", win_rate=9.0), judge={"model": "j", "logprobs": False})
    few = row("e", "j", expected=4, win_rate=8.0)
    rows = [row("a", "j", win_rate=1.0), row("b", "j", win_rate=2.0), row("c", "k", win_rate=3.0), letters, few]
    blocks = leaderboard_table(rows).split("alpaca_eval, judge ")[1:]
    shown = [[name for name in "abcde" if re.search(rf"^{name}  ", block, re.MULTILINE)] for block in blocks]
    assert shown == [["a", "b"], ["c"], ["d"], ["e"]]
    assert blocks[2].startswith("j letters") and "4/4" in blocks[3] and "math" in blocks[0]


@pytest.mark.slow
def test_one_unreadable_judgement_keeps_only_its_own_row_out(files, tmp_path):
    answers = {}
    for name in ("good", "mute"):
        answers[name] = tmp_path / f"{name}.jsonl"
        rows = [{"question_id": 81 + number, "turns": [name, "again"]} for number in range(3)]
        write_jsonl(answers[name], rows)

    def judge(text):
        return [("I cannot say.", -0.1)] if "[A] mute [End]" in text else toy_benchmarks.rule(text)

    out = tmp_path / "out"
    with JudgeServer(judge=judge) as server:
        argv = ["--tasks", "mt_bench", "--mt_bench.folder", str(files[1]), "--mt_bench.unverified", "--out", str(out)]
        argv += ["--judge.base_url", server.url, "--judge.model", "rule", "--models", *map(str, answers.values())]
        process = forked(None, "evaluate", *argv)
        assert process.returncode == 2 and "mute mt_bench 3 of 6" in process.stderr
        # Nor is there a row of answers that the model had before.
        (good,) = out.rglob("result.json")
        before = Path(str(good).replace("good", "mute"))
        before.write_text(json.dumps(read_json(good) | {"model": "mute"}))
        assert forked(None, "evaluate", *argv).returncode == 2 and not before.exists()
        assert [row["model"] for row in read_json(out / "leaderboard.json")["rows"]] == ["good"]
        asked = len(server.asked)
        finished([*argv, "--partial"])
        assert len(server.asked) == asked  # what cannot be read is an answer, too
    rows = {row["model"]: row for row in read_json(out / "leaderboard.json")["rows"]}
    assert (rows["mute"]["n"], rows["mute"]["expected"], rows["mute"]["parse_failures"]) == (3, 6, 3)
    assert rows["mute"]["figures"]["turn_1"] is None


@pytest.mark.slow
def test_a_model_is_added_to_a_leaderboard_from_a_file_of_answers(files, tmp_path):
    outputs = tmp_path / "theirs.json"
    outputs.write_text(
        json.dumps([{"instruction": text, "output": "an apple"} for text in toy_benchmarks.INSTRUCTIONS])
    )
    other_outputs = tmp_path / "others.json"
    other_outputs.write_text(
        json.dumps([{"instruction": text, "output": "eee"} for text in toy_benchmarks.INSTRUCTIONS])
    )
    out = tmp_path / "out"
    with JudgeServer(judge=toy_benchmarks.rule) as server:

        def add(model):
            """Neither engines nor another task read a file of answers."""
            alpaca = ["--tasks", "alpaca_eval", "--alpaca_eval.file", str(files[0]), "--alpaca_eval.unverified"]
            judge = ["--judge.base_url", server.url, "--judge.model", "rule"]
            finished(["--models", model, "--out", str(out), *alpaca, *judge])

        add(str(outputs))
        first = len(server.asked)
        add(f"other={other_outputs}")
        assert len(server.asked) == first + 6
    rows = {row["model"]: row["decoding"] for row in read_json(out / "leaderboard.json")["rows"]}
    assert rows == {"theirs": {"answers": str(outputs)}, "other": {"answers": str(other_outputs)}}


def settings_of(*argv):
    return load([*argv, "--judge.base_url", "http://127.0.0.1:9/v1", "--judge.model", "rule"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "x"], "--models: missing"),
        (["--models", "x"], "--out: missing"),
        (["--models", "x", "--out", "y", "--tasks", "glue"], "--tasks: glue is unknown, choose from alpaca_eval"),
        (["--models", "x", "--out", "y", "--tasks", "mt_bench", "mt_bench"], "--tasks: a benchmark is listed twice"),
        (["--models", "x", "--out", "y", "--ifeval.limit", "3"], "--ifeval.limit: belongs to ifeval"),
        (["--models", "x", "--out", "y", "--tasks", "ifeval"], "--judge.model: --tasks ifeval needs no judge"),
        (["--models", "x", "--out", "y", "--rollout.temperature", "-1"], "--rollout.temperature: -1.0 is out of range"),
        (
            ["--models", "x", "--out", "y", "--rollout.max_new_tokens", "0"],
            "--rollout.max_new_tokens: 0 is out of range",
        ),
    ],
)
def test_wrong_settings_are_named(argv, message):
    with pytest.raises(flags.SettingsError) as error:
        settings_of(*argv)
    assert message in str(error.value)


def test_temperature_0_is_allowed(tiny_model):
    loaded = settings_of("--models", str(tiny_model), "--out", "y", "--rollout.temperature", "0")
    assert loaded.settings.rollout.temperature == 0


@pytest.mark.slow
def test_models_have_names(tiny_model, tmp_path):
    outputs = tmp_path / "theirs.json"
    outputs.write_text("[]")

    def named(*models, tasks=("alpaca_eval",)):
        loaded = settings_of("--models", *models, "--out", "y", "--tasks", *tasks)
        return [(contestant.name, contestant.folder, contestant.file) for contestant in loaded.contestants]

    assert named(str(tiny_model)) == [("tiny", str(tiny_model), "")]
    assert named(f"a={tiny_model}", "owner/model") == [("a", str(tiny_model), ""), ("model", "owner/model", "")]
    assert named(str(outputs)) == [("theirs", "", str(outputs))]
    for models, message in [
        ([str(tiny_model), str(tiny_model)], "duplicate names: tiny"),
        ([f"a b={tiny_model}"], "'a b' cannot be a name"),
        ([str(tmp_path)], "is neither a run folder"),
        ([str(tmp_path / "missing.json")], "no such file"),
    ]:
        with pytest.raises(ValueError, match=message):
            named(*models)
    with pytest.raises(ValueError, match="a file of answers to one benchmark"):
        named(str(outputs), tasks=("alpaca_eval", "mt_bench"))


def test_no_torch_before_there_is_something_to_do():
    code = "import sys, openrlhf_sgpo.benchmarks.settings; assert not {'torch', 'alpaca_eval'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
