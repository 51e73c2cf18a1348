"""Results as EvalScope's reports."""

from __future__ import annotations

import pytest

from openrlhf_sgpo.benchmarks.evalscope import evalscope_report, write_evalscope
from openrlhf_sgpo.benchmarks.task import Result
from openrlhf_sgpo.run_folder import read_json

RESULT = Result("alpaca_eval", "mine", 8, 10, {"win_rate": 25.0, "length_controlled_winrate": None}, notes=["a note"])


def test_percentages_become_shares_and_scores_stay():
    report = evalscope_report(RESULT)
    assert (report["dataset_name"], report["model_name"], report["score"]) == ("alpaca_eval", "mine", 0.25)
    (metric,) = report["metrics"]
    assert (metric["name"], metric["num"], metric["score"]) == ("win_rate", 8, 0.25)
    assert metric["categories"][0]["subsets"] == [{"name": "default", "score": 0.25, "num": 8}]
    assert evalscope_report(Result("mt_bench", "mine", 8, 8, {"average": 6.5}))["score"] == 6.5


def test_a_judge_is_a_run_and_a_row_without_figures_is_no_report(tmp_path):
    empty = Result("alpaca_eval", "mute", 0, 10, {"win_rate": None})
    write_evalscope(tmp_path, [("judge-a", RESULT), ("judge-b", RESULT), ("judge-a", empty)])
    reports = [f"evalscope/{judge}/reports/mine/alpaca_eval.json" for judge in ("judge-a", "judge-b")]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")) == reports
    assert read_json(tmp_path / reports[0]) == evalscope_report(RESULT)


def test_evalscope_reads_it():
    report = pytest.importorskip("evalscope.report", reason="EvalScope is not installed").Report
    read = report.from_dict(evalscope_report(RESULT))
    assert (read.model_name, read.dataset_name, read.score, read.num) == ("mine", "alpaca_eval", 0.25, 8)
