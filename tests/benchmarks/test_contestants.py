"""Who is evaluated: names that are taken, files of another benchmark, models that are shorter than the default."""

from __future__ import annotations

import json

import pytest
import toy_benchmarks
from judge_server import JudgeServer
from tiny import write_jsonl

from openrlhf_sgpo.benchmarks.evaluate import Evaluation
from openrlhf_sgpo.benchmarks.settings import load
from openrlhf_sgpo.run_folder import read_json, read_jsonl

pytestmark = pytest.mark.slow

OUTPUTS = [{"instruction": text, "output": f"an apple for {text}"} for text in toy_benchmarks.INSTRUCTIONS]
TURNS = [{"question_id": 81 + number, "choices": [{"turns": ["one", "two"]}]} for number in range(3)]


@pytest.fixture
def evaluation(tmp_path):
    """Of some models in tmp_path/out on a toy AlpacaEval, judged by the server at ``url``."""
    toy_benchmarks.alpaca_eval(tmp_path), toy_benchmarks.mt_bench(tmp_path)

    def make(*models, url="http://127.0.0.1:9/v1", task="alpaca_eval", more=()):
        place = {"alpaca_eval": "file", "mt_bench": "folder"}[task]
        path = tmp_path / ("mt_bench" if task == "mt_bench" else "alpaca_eval.json")
        benchmark = ["--tasks", task, f"--{task}.{place}", str(path), f"--{task}.unverified"]
        judge = ["--judge.base_url", url, "--judge.model", "rule"]
        return Evaluation(
            load(["--models", *map(str, models), "--out", str(tmp_path / "out"), *benchmark, *judge, *more])
        )

    return make


def outputs(path, rows=OUTPUTS):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def test_another_file_under_the_same_name_does_not_replace_the_row(evaluation, tmp_path):
    path = outputs(tmp_path / "theirs.json")
    with JudgeServer(judge=toy_benchmarks.rule) as server:
        evaluation(path, url=server.url).execute()
        before = (tmp_path / "out" / "leaderboard.json").read_bytes()
        other = outputs(tmp_path / "elsewhere" / "theirs.json", [{**row, "output": "eee"} for row in OUTPUTS])
        with pytest.raises(
            ValueError, match="theirs is the name of another model in --out .*another name, as in NAME="
        ):
            evaluation(other, url=server.url)
        assert (tmp_path / "out" / "leaderboard.json").read_bytes() == before
        # The same answers are the same model, wherever the file lies; and another name is another row.
        evaluation(outputs(tmp_path / "moved" / "theirs.json"), url=server.url).execute()
        evaluation(f"second={other}", url=server.url).execute()
    rows = read_json(tmp_path / "out" / "leaderboard.json")["rows"]
    assert sorted(row["model"] for row in rows) == ["second", "theirs"]


def test_a_policy_does_not_take_the_name_of_a_file_nor_of_another_policy(
    evaluation, tiny_model, other_tiny_model, tmp_path
):
    engine = (
        "--rollout.engine",
        "hf",
        "--rollout.max_new_tokens",
        "8",
        "--data.max_len",
        "128",
        "--ds.param_dtype",
        "fp32",
    )
    with JudgeServer(judge=toy_benchmarks.rule) as server:
        evaluation(outputs(tmp_path / "a.json"), url=server.url).execute()
        with pytest.raises(ValueError, match="a is the name of another model .* from another file"):
            evaluation(f"a={tiny_model}", more=engine)
        evaluation(f"b={tiny_model}", url=server.url, more=engine).execute()
        # Also where it answers another benchmark.
        for task in ("alpaca_eval", "mt_bench"):
            with pytest.raises(
                ValueError, match=f"b is the name of another model .* alpaca_eval came from {tiny_model}"
            ):
                evaluation(f"b={other_tiny_model}", task=task, more=engine)
        evaluation(f"b={tiny_model}", task="mt_bench", more=engine)


def test_the_answers_of_a_file_are_kept_for_the_page(evaluation, tmp_path):
    path = outputs(tmp_path / "theirs.json")
    with JudgeServer(judge=toy_benchmarks.rule) as server:
        evaluation(path, url=server.url).execute()
    rows = read_jsonl(tmp_path / "out" / "theirs" / "answers" / "alpaca_eval.jsonl")
    assert [row["turns"] for row in rows] == [[row["output"]] for row in OUTPUTS]
    assert "an apple for Name 1 things" in (tmp_path / "out" / "report.html").read_text()


def test_a_file_in_the_format_of_another_benchmark_is_recognised(evaluation, tmp_path):
    path = write_jsonl(tmp_path / "answers.jsonl", TURNS)
    with pytest.raises(ValueError, match="has the format of mt_bench, not of alpaca_eval, .*: give --tasks mt_bench"):
        evaluation(path)
    assert evaluation(path, task="mt_bench").file_answers["answers"]["81"].turns == ("one", "two")
    with pytest.raises(ValueError, match="has the format of alpaca_eval, not of mt_bench"):
        evaluation(outputs(tmp_path / "outputs.json"), task="mt_bench")
    path = write_jsonl(tmp_path / "nothing.jsonl", [{"text": "one"}])
    with pytest.raises(ValueError, match="no field instruction and no field output"):
        evaluation(path)


def test_the_default_length_is_no_longer_than_the_models(evaluation, tiny_model):
    """2,048 positions: the default is 4,096. What is asked for and cannot be had is an error with the number."""
    more = ("--rollout.engine", "hf", "--rollout.max_new_tokens", "8")
    assert evaluation(tiny_model, more=more).config.data.max_len == 2048
    with pytest.raises(ValueError, match="--data.max_len 4096 exceeds the 2048 positions of --models"):
        evaluation(tiny_model, more=(*more, "--data.max_len", "4096"))
    assert evaluation(tiny_model, more=(*more, "--data.max_len", "1024")).config.data.max_len == 1024
