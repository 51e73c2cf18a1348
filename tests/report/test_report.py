"""What stands on the pages is what stands in the files; nothing that a model wrote becomes markup."""

import math
import random
import re
import subprocess
import sys
from statistics import fmean

import numpy as np
import pytest
import report_folders
import torch
from markupsafe import Markup
from report_folders import CATEGORIES, EVIL, Page

from openrlhf_sgpo.cli.main import report
from openrlhf_sgpo.dro import solve_worst_case
from openrlhf_sgpo.integrity import signed
from openrlhf_sgpo.report import REPORT, write_report
from openrlhf_sgpo.report import live as report_live
from openrlhf_sgpo.report import moments as report_moments
from openrlhf_sgpo.report.follower import solve_again
from openrlhf_sgpo.report.judged import judgements
from openrlhf_sgpo.report.leaderboard_page import _groups
from openrlhf_sgpo.report.live import LivePage
from openrlhf_sgpo.report.markup import MISSING, join, tag
from openrlhf_sgpo.report.moments import moments_so_far, read_moments
from openrlhf_sgpo.report.robustness import robustness
from openrlhf_sgpo.report.run_curves import MOST_POINTS, step_plots, thinned
from openrlhf_sgpo.run_folder import read_json, read_jsonl, write_json, write_jsonl
from openrlhf_sgpo.table import FIGURES, results_table

MAKERS = {
    "run": lambda folder: report_folders.make_run(folder, radius=0.1),
    "plays": report_folders.make_play_run,
    "comparison": report_folders.make_comparison,
    "leaderboard": report_folders.make_leaderboard,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: make(tmp_path_factory.mktemp("report") / name) for name, make in MAKERS.items()}
    for folder in made.values():
        write_report(folder)
    return made


@pytest.fixture(scope="module")
def pages(folders):
    return {name: Page(folder / REPORT) for name, folder in folders.items()}


def page_of(folder):
    return Page(write_report(folder))


def trace(figure, name):
    (match,) = [curve for curve in figure["data"] if curve["name"] == name]
    return match


def test_a_folder_that_is_nothing_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has none of resolved_config.yaml, comparison.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "resolved_config.yaml").write_text(signed("model: before\n"))  # of a leaderboard that has not ended
    with pytest.raises(ValueError, match=f"{tmp_path} is not a training run"):
        write_report(tmp_path)
    assert not (tmp_path / REPORT).exists()


@pytest.mark.slow
def test_the_command_writes_every_folder(folders, capsys):
    paths = [str(folders[name] / REPORT) for name in ("comparison", "leaderboard")]
    assert report([str(folders[name]) for name in ("comparison", "leaderboard")]) == 0
    assert capsys.readouterr().out.split() == paths
    assert report([]) == 2 and report(["--help"]) == 0
    assert "usage: openrlhf-sgpo report" in capsys.readouterr().out


@pytest.mark.parametrize("name", MAKERS)
def test_a_page_needs_nothing_from_elsewhere(name, pages, folders):
    page, text = pages[name], (folders[name] / REPORT).read_text(encoding="utf-8")
    assert page.scripts == 2 and text.count("plotly.js v") == 1
    # Links lead to places of the page, or to files beside it.
    assert page.addresses and all(
        address.startswith("#") or (folders[name] / address).is_file() for address in page.addresses
    )
    assert not page.tags & {"link", "iframe", "object", "base", "form"}
    assert [path.name for path in folders[name].iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("name", MAKERS)
def test_what_models_wrote_is_text(name, pages):
    page = pages[name]
    assert [text for text in page.paragraphs if EVIL in text]
    assert not page.tags & {"img", "b"}


def test_only_markup_is_not_escaped():
    assert tag("p", "<i>", Markup("<i>"), title='"<') == '<p title="&#34;&lt;">&lt;i&gt;<i></p>'
    assert join("<i>", Markup("<i>") + "<b>", 1) == "&lt;i&gt;<i>&lt;b&gt;1"


def test_the_command_stays_light():
    heavy = "plotly torch numpy"
    code = f"import sys, openrlhf_sgpo.report; assert not set('{heavy}'.split()) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("title", "key", "error"),
    [
        ("Response length", "response_length", None),
        ("Divergence from the reference", "kl", "kl_error"),
    ],
)
def test_curves_per_round_are_the_evaluations(title, key, error, tmp_path):
    # Without metrics of steps, which have titles of the same name.
    folder = report_folders.make_run(tmp_path / "run", steps=0, radius=0.1)
    (curve,) = page_of(folder).figures[title]["data"]
    places = ["initial", "round_0", "round_1", "round_2"]
    rows = [read_json(folder / place / "evaluation.json") for place in places]
    assert curve["x"] == ["start", "round 0", "round 1", "round 2"]
    assert curve["y"] == [row[key] for row in rows]
    if error:
        half = pytest.approx([1.96 * row[error] for row in rows])
        assert curve["error_y"]["array"] == half and curve["error_y"]["arrayminus"] == half


def test_accuracies_have_intervals_and_axes_do_not_exaggerate(tmp_path):
    """Agresti and Coull: as if two more pairs had been right and two wrong; the start equals the reference by construction."""
    folder = report_folders.make_run(tmp_path / "run", steps=0, radius=0.1)
    figures = page_of(folder).figures
    (curve,) = figures["Accuracy"]["data"]
    rows = [read_jsonl(folder / f"round_{number}/held_out.jsonl") for number in range(3)]
    right = [sum(row["margin"] > 0 for row in round_rows) for round_rows in rows]
    assert curve["y"] == [0.5, *(count / 20 for count in right)]
    z, halves = 1.96, [None]
    for count in right:
        share = (count + z**2 / 2) / (20 + z**2)
        halves.append(pytest.approx(z * math.sqrt(share * (1 - share) / (20 + z**2))))
    assert curve["error_y"]["array"] == halves
    assert figures["Accuracy"]["layout"]["yaxis"]["range"] == [0, 1]
    for title in ("Response length", "Margin", "Divergence from the reference"):
        assert figures[title]["layout"]["yaxis"]["rangemode"] == "tozero"
    steps = page_of(report_folders.make_play_run(tmp_path / "plays")).figures["Loss"]["layout"]["xaxis"]
    assert (steps["dtick"], steps["tickformat"]) == (1, "d")  # eight steps, none of which is a half


def test_the_table_of_rounds_is_that_of_the_run(folders, pages):
    folder, (header, *lines) = folders["run"], pages["run"].tables[0]
    rows = []
    for place in ("initial", "round_0", "round_1", "round_2"):
        row = read_json(folder / place / "evaluation.json")
        worst, manifest = folder / place / "worst_case.json", folder / place / "manifest.json"
        labels = read_json(manifest)["stages"].get("pairs", {}).get("label_accuracy") if manifest.exists() else None
        value = read_json(worst)["value"] if worst.exists() else None
        rows.append(row | {"value": value, "label_accuracy": labels})
    assert header == ["", *(title for title, _, _ in FIGURES if title != "wins")]
    expected = results_table(rows, {}).splitlines()[2:6]
    for line, text in zip(lines, expected, strict=True):
        cells = re.split(" {2,}", text.replace(line[0], "").strip())
        del cells[4]  # wins, which nobody measured
        assert [cell.replace("\N{EN DASH}", "-") for cell in line[1:]] == cells
    assert any("Not measured: wins." in text for text in pages["run"].paragraphs)


def test_curves_per_step_count_over_all_rounds(folders, pages):
    rows = read_jsonl(folders["run"] / "metrics.jsonl")
    (loss,) = pages["run"].figures["Loss"]["data"]
    assert loss["x"] == list(range(1, 19))  # three stages of six steps that count from 1
    assert loss["y"] == [row["train/loss"] for row in rows]
    assert [shape["x0"] for shape in pages["run"].figures["Loss"]["layout"]["shapes"]] == [6.5, 12.5]
    # Rounds of plays count on; every role has a curve.
    divergence = pages["plays"].figures["Divergence from the reference"]
    assert trace(divergence, "follower/kl")["x"] == list(range(1, 9))
    assert (
        trace(divergence, "follower/kl")["y"]
        == [2 * y for y in trace(divergence, "policy/kl")["y"]]
        == list(range(1, 9))
    )
    assert [shape["x0"] for shape in divergence["layout"]["shapes"]] == [4.5]


@pytest.mark.parametrize("count", [1, MOST_POINTS, MOST_POINTS + 1, 7 * MOST_POINTS + 3])
def test_long_curves_are_thinned_by_means(count):
    draw = random.Random(count)
    values = [draw.random() for _ in range(count)]
    block = math.ceil(count / MOST_POINTS)
    means = thinned(values)
    assert len(means) == math.ceil(count / block) <= MOST_POINTS
    sizes = [block] * (len(means) - 1) + [count - block * (len(means) - 1)]
    assert sum(size * mean for size, mean in zip(sizes, means, strict=True)) == pytest.approx(sum(values))
    assert min(values) <= min(means) and max(means) <= max(values)
    (shown,) = step_plots([{"stage": "round 0", "step": step + 1, "train/loss": y} for step, y in enumerate(values)])
    assert (f"mean of {block} steps" in shown) == (block > 1)


def softplus(x):
    return np.logaddexp(0.0, -x)


def tangents(p, pieces=6):
    """Maximum of the tangents of -log p at k / K (arXiv 2502.18099, appendix G)."""
    knots = np.arange(1, pieces + 1)[:, None] / pieces
    return (-np.log(knots) - (p - knots) / knots).max(0)


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"radius": 0.1}, softplus),
        ({"radius": 0.1, "window_pad": 0.25}, softplus),
        ({"radius": 0.05, "space": "probability"}, tangents),
        ({"algo": "sgpo_best", "radius": 0.2}, softplus),
        ({"algo": "sgpo_best", "radius": 0.1, "space": "probability"}, lambda p: -np.log(p)),
    ],
)
def test_what_the_follower_moved_gives_its_certificate(options, loss, tmp_path):
    """Cost and mean loss of the law after the move are computed from the move alone."""
    folder = report_folders.make_run(tmp_path / "run", **options)
    figures = page_of(folder).figures
    is_probability = options.get("space") == "probability"
    for number in (1, 2):
        certificate = read_json(folder / f"round_{number}" / "worst_case.json")
        moved = solve_again(certificate)
        margins = np.array(certificate["margins"])
        places = 1 / (1 + np.exp(-margins)) if is_probability else margins
        share, target = moved.share, np.array([moved.target])
        assert (share * np.abs(places - target)).mean() == pytest.approx(options["radius"], rel=1e-6)
        after = ((1 - share) * loss(places) + share * loss(target)).mean()
        assert after == pytest.approx(certificate["value"], rel=1e-6)
        assert loss(places).mean() == pytest.approx(certificate["empirical"], rel=1e-6)
        # The picture shows just that.
        figure = figures[f"Margins at the start of round {number}, and what the follower moves"]
        stays, leaves, arrives = (np.array(trace(figure, name)["y"]) for name in ("stays", "leaves", "arrives"))
        centres, width = np.array(trace(figure, "stays")["x"]), trace(figure, "stays")["width"]
        assert stays.sum() + leaves.sum() == pytest.approx(len(margins))
        for bin_at, height in zip(centres, stays + leaves, strict=True):
            inside = np.abs(places - bin_at) <= width / 2 * (1 + 1e-9)
            assert height == pytest.approx(inside.sum(), abs=1e-9)
        assert arrives.sum() == pytest.approx(leaves.sum()) == pytest.approx(share.sum())
        assert abs(centres[arrives > 0] - target) <= width / 2 * (1 + 1e-9)
        threshold = certificate["threshold"]
        line = 1 / (1 + math.exp(-threshold)) if is_probability else threshold
        assert trace(figure, "threshold")["x"] == [pytest.approx(line, rel=1e-5)] * 2


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"radius": 0.0}, "at radius 0 nothing moves"),
        ({"algo": "sgpo_transport", "radius": 0.1, "group_size": 20}, "cannot be computed"),
    ],
)
def test_margins_are_shown_where_the_move_is_not_known(options, note, tmp_path):
    folder = report_folders.make_run(tmp_path / "run", **options)
    page = page_of(folder)
    (pairs,) = page.figures["Margins at the start of round 1"]["data"]
    assert sum(pairs["y"]) == 40
    margins = read_json(folder / "round_1" / "worst_case.json")["margins"]
    assert np.dot(pairs["x"], pairs["y"]) / 40 == pytest.approx(fmean(margins), abs=pairs["width"] / 2)
    assert any(note in text for text in page.paragraphs)


PLACES = ("initial", "round_0", "round_1", "round_2")


def held_out_margins(folder, place):
    return torch.tensor([row["margin"] for row in read_jsonl(folder / place / "held_out.jsonl")], dtype=torch.float64)


@pytest.mark.parametrize("options", [{"radius": 0.1}, {"radius": 0.05, "space": "probability"}])
def test_v_over_the_radius_is_what_a_follower_would_reach(options, tmp_path):
    folder = report_folders.make_run(tmp_path / "run", **options)
    page, radius = page_of(folder), options["radius"]
    margins = [held_out_margins(folder, place) for place in PLACES]
    in_margins = "space" not in options
    window = (float(torch.cat(margins).min()) - 1, float(torch.cat(margins).max()) + 1) if in_margins else (0.0, 1.0)

    def value(margins, radius, window=window):
        return solve_worst_case(margins, radius, space=options.get("space", "margin"), window=window).value

    curves = page.figures["Worst-case loss of the held-out pairs"]["data"]
    saved = page.figures["Saved against round 0"]["data"]
    assert [curve["name"] for curve in curves] == ["start", "round 0", "round 1", "round 2"]
    for curve, difference, held_out in zip(curves, saved, margins, strict=True):
        assert (curve["x"][0], curve["x"][-1]) == (0.0, pytest.approx(10 * radius))
        expected = [value(held_out, place) for place in curve["x"]]
        assert curve["y"] == pytest.approx(expected, rel=1e-12)
        less = [value(margins[1], place) - v for place, v in zip(curve["x"], expected, strict=True)]
        assert difference["y"] == pytest.approx(less, abs=1e-12)
    if in_margins:  # without a follower V is DPO's loss
        assert curves[3]["y"][0] == pytest.approx(float(torch.nn.functional.softplus(-margins[3]).mean()))
    (table,) = [table for table in page.tables if "saved against round 0" in table[0]]
    for row, held_out in zip(table[1:], margins, strict=True):
        assert (row[1], row[3]) == (f"{value(held_out, 0.0):.4f}", f"{value(held_out, radius):.4f}")
    assert table[2][2] == table[2][4] == MISSING
    saved_in_round_2, half = map(float, table[4][4].split(" \N{PLUS-MINUS SIGN} "))
    assert saved_in_round_2 == pytest.approx(value(margins[1], radius) - value(margins[3], radius), abs=1e-4)
    assert 0.01 < half < 1

    certificate = read_json(folder / "round_1/worst_case.json")
    before, after = page.figures["Worst-case loss in round 1"]["data"]
    pairs = torch.tensor(certificate["margins"], dtype=torch.float64)[certificate["after"]["pairs"]]
    for curve, trained in ((before, pairs), (after, torch.tensor(certificate["after"]["margins"]).double())):
        expected = [value(trained, place, tuple(certificate["window"])) for place in curve["x"]]
        assert curve["y"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("options", [{"algo": "sgpo_best", "radius": 0.2}, {"algo": "sgpo", "radius": 0.0}])
def test_v_over_the_radius_is_that_of_the_worst_case(options, tmp_path):
    """A best case has none; radius 0 is a follower that could have been."""
    drawn = robustness(read_moments(report_folders.make_run(tmp_path / "run", **options)))
    assert bool(drawn) == (options["algo"] == "sgpo")


def test_what_robustness_costs_and_buys_in_a_comparison(folders, pages):
    page, stored = pages["comparison"], read_json(folders["comparison"] / "comparison.json")["worst_case"]
    curves = page.figures["Worst-case loss of the held-out pairs"]["data"]
    assert {curve["name"]: curve["y"] for curve in curves} == stored["curves"]
    compared = page.figures["Worst-case loss, compared with sgpo"]["data"]
    for curve in compared:
        values, base = stored["curves"][curve["name"]], stored["curves"]["sgpo"]
        assert curve["y"] == pytest.approx([value - other for value, other in zip(values, base, strict=True)])
    (table,) = [table for table in page.tables if "at this radius" in table[0]]
    assert table[2] == [
        "dpo, compared with sgpo",
        "-0.0200 \N{PLUS-MINUS SIGN} 0.0100",
        "0.05",
        "0.0250 \N{PLUS-MINUS SIGN} 0.0100",
    ]


def test_a_reference_has_no_held_out_margins_to_show(pages):
    data = pages["run"].figures["Margins of held-out pairs"]["data"]
    assert [curve["name"] for curve in data] == ["round 0", "round 1", "round 2"]
    assert [sum(curve["y"]) for curve in data] == [20, 20, 20]


def test_answers_stand_side_by_side(pages):
    paragraphs = pages["run"].paragraphs
    at = paragraphs.index("At the start.")
    assert paragraphs[at : at + 4] == ["At the start.", *(f"{EVIL} in round {number}" for number in range(3))]
    assert paragraphs[at - 1] == f"Why? {EVIL}"


def test_costs_by_stage(pages):
    seconds = pages["run"].figures["Seconds by stage"]["data"]
    assert trace({"data": seconds}, "train")["x"] == [0.0, 10.0, 11.0, 12.0]
    assert trace({"data": seconds}, "evaluate")["x"] == [1.5, 0.0, 0.0, 0.0]
    parts = pages["plays"].figures["Seconds by stage"]["data"]
    assert [(curve["name"], curve["x"]) for curve in parts] == [("generate", [3.0, 3.0]), ("train", [6.0, 6.0])]
    (ledger,) = [table for table in pages["run"].tables if table[-1][0] == "total"]
    assert dict(zip(ledger[0], ledger[-1], strict=True))["tokens trained"] == "3,702"


def test_the_last_plays(pages):
    paragraphs = pages["plays"].paragraphs
    at = paragraphs.index("Prompt p8")
    assert paragraphs[at + 1 : at + 3] == [f"policy: {EVIL}", f"follower: {EVIL}"]
    assert "Prompt p7" not in paragraphs


def test_a_run_that_has_only_begun(tmp_path):
    report_folders.write_settings(tmp_path, "dpo", report_folders.algorithms.get("dpo").settings(), rounds=0)
    page = page_of(tmp_path)
    assert page.figures == {} and page.headings == ["Settings"]
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "round 0", "step": 1, "train/loss": 0.5}\n{"stage": "round 0", "st'
    )
    page = page_of(tmp_path)
    assert list(page.figures) == ["Loss"] and page.figures["Loss"]["data"][0]["y"] == [0.5]


def test_cross_play_is_antisymmetric_and_says_what_is_not_significant(folders, pages):
    (heat,) = pages["comparison"].figures["Win rate"]["data"]
    assert heat["x"] == heat["y"] == ["sgpo", "spa", "dpo"]
    values, cells = heat["z"], heat["text"]
    for row in read_json(folders["comparison"] / "comparison.json")["cross_play"]:
        at, over = heat["y"].index(row["first"]), heat["x"].index(row["second"])
        assert values[at][over] == row["win_rate"] and values[over][at] == pytest.approx(1 - row["win_rate"])
        marked = "({})" if row["p_holm"] >= 0.05 else "{}"
        assert cells[at][over] == marked.format(f"{row['win_rate']:.3f}")
        assert cells[over][at] == marked.format(f"{1 - row['win_rate']:.3f}")
        assert f"{row['low']:.3f} to {row['high']:.3f}" in heat["customdata"][at][over]
        assert f"{1 - row['high']:.3f} to {1 - row['low']:.3f}" in heat["customdata"][over][at]
    assert [values[place][place] for place in range(3)] == [None] * 3
    assert (heat["zmin"] + heat["zmax"]) / 2 == pytest.approx(0.5) and heat["zmax"] >= 0.7
    table = pages["comparison"].tables[0]
    assert ["dpo over sgpo", "0.300 \N{PLUS-MINUS SIGN} 0.100", "<0.0001", "<0.0001", "100"] in table


def test_win_rate_against_divergence_has_those_that_have_both(pages):
    (point,) = pages["comparison"].figures["Win rate over the start"]["data"]
    assert (point["name"], point["x"], point["y"]) == ("sgpo", [3.0], [0.7])
    assert point["error_y"]["arrayminus"] == [pytest.approx(0.1)] and point["error_y"]["array"] == [pytest.approx(0.05)]
    assert point["error_x"]["array"] == [pytest.approx(1.96 * 0.2)]
    assert ["spa", "0.650 \N{PLUS-MINUS SIGN} 0.050", "\N{EN DASH}"] in pages["comparison"].tables[1]


def test_seeds_stand_beside_their_mean(pages):
    figure = pages["comparison"].figures["Held-out accuracy"]
    mean = trace(figure, "mean, 95% interval")
    assert mean["x"] == [pytest.approx(0.62)] * 3
    # Student's law of two seeds: tan(0.95 * pi / 2) standard errors.
    assert mean["error_x"]["array"] == [pytest.approx(0.01 * math.tan(0.95 * math.pi / 2), rel=1e-3)] * 3
    assert trace(figure, "a seed")["x"] == [0.6, 0.64] * 3
    assert trace(figure, "a seed")["y"] == ["sgpo", "sgpo", "spa", "spa", "dpo", "dpo"]
    assert "Margin" not in pages["comparison"].figures  # nobody measured it
    assert ["samples", "100", "101", "102"] in [row for table in pages["comparison"].tables for row in table]


def test_warnings_come_first(folders):
    text = (folders["comparison"] / REPORT).read_text(encoding="utf-8")
    assert text.index("judge_calls differ") < text.index("<h2")


@pytest.mark.parametrize("content", ["{}", '{"groups": null, "cross_play": [], "warnings": null, "oracle": null}'])
def test_a_comparison_of_nothing_shows_nothing(content, tmp_path):
    (tmp_path / "comparison.json").write_text(content)
    page = page_of(tmp_path)
    assert page.figures == {} and page.headings == []


def test_scores_of_two_judges_have_two_tables(pages):
    page = pages["leaderboard"]
    assert page.headings[:4] == [
        "alpaca_eval, judged by judge-a",
        "mt_bench, judged by judge-a",
        "ifeval, without a judge",
        "mt_bench, judged by judge-b",
    ]
    table_a, table_b = (table for table in page.tables if table[0][1:2] == ["average"])
    assert [row[:3] for row in table_a[1:]] == [
        ["before", "4.00 \N{PLUS-MINUS SIGN} 0.38", "16 of 16"],
        ["after", "5.00 \N{PLUS-MINUS SIGN} 0.38", "16 of 16"],
    ]
    assert [row[:2] for row in table_b[1:]] == [["before", "6.00"]]


def test_rows_say_how_much_they_rest_on(folders, pages):
    table = pages["leaderboard"].tables[0]
    plus_minus, dash = "\N{PLUS-MINUS SIGN}", "\N{EN DASH}"
    assert table[1:] == [
        ["before", f"12.50 {plus_minus} 3.92", dash, "40 of 40", "0", "800"],
        ["after", f"13.50 {plus_minus} 3.92", dash, "39 of 40", "1", "800"],
    ]
    text = (folders["leaderboard"] / REPORT).read_text(encoding="utf-8")
    assert "alpaca_eval, after: rests on 39 of 40 judgements." in text
    assert "ifeval, before: rests on 3 of 4 items." in text
    assert "mt_bench was judged by 2 judges" in text and "<strong>all models</strong>: no length control" in text


def test_items_are_counted_where_they_lie_and_judgements_where_a_judge_was_asked(folders, pages):
    text = (folders["leaderboard"] / REPORT).read_text(encoding="utf-8")
    assert "<dt>Items of mt_bench</dt><dd>1</dd>" in text and "<dt>Items of ifeval</dt><dd>4</dd>" in text
    assert "Items of alpaca_eval" not in text  # its file is not there
    counted = {table[0][-3] for table in pages["leaderboard"].tables if table[0][-2:-1] == ["parse failures"]}
    assert counted == {"judgements", "items"}


def test_anchors_show_how_far_a_judge_can_be_trusted(tmp_path):
    correlation = {"value": 0.75, "low": 0.25, "high": 0.9, "n": 5}
    judge = {"model": "judge-a"}
    rows = [
        {
            "task": "alpaca_eval",
            "model": f"m{number}",
            "n": 8,
            "expected": 8,
            "figures": {"win_rate": 10.0 * number},
            "errors": {"win_rate": 1.0},
            "published": {"win_rate": 5.0 * number} if number < 5 else {},
            "judge": judge,
        }
        for number in range(6)
    ]
    entry = {"task": "alpaca_eval", "judge": judge, "figure": "win_rate", "anchors": 5}
    entry |= {"spearman": correlation, "kendall": correlation}
    write_json(tmp_path / "leaderboard.json", {"rows": rows, "agreement": [entry]})
    page = page_of(tmp_path)
    text = (tmp_path / REPORT).read_text(encoding="utf-8")
    words = (
        "rank correlation of 5 anchors with the published leaderboard, by win rate: Spearman 0.75 [0.25, 0.90], Kendall"
    )
    assert f"<li>{words}" in text and f"judged by judge-a: {words}" in text
    assert "more than 5 of 5 anchors." in text
    assert page.tables[0][0][:3] == ["", "win rate", "published win rate"]
    assert [row[0] for row in page.tables[0][1:]] == [*(f"m{number} (anchor)" for number in range(5)), "m5"]
    assert [row[2] for row in page.tables[0][-2:]] == ["20.00", MISSING]
    (points,) = page.figures["Anchors"]["data"]
    assert (points["x"], points["y"]) == ([0, 5, 10, 15, 20], [0, 10, 20, 30, 40])
    assert points["text"] == [f"m{number}" for number in range(5)]


def test_radar_and_bars(pages):
    data = pages["leaderboard"].figures["By category"]["data"]
    assert [curve["type"] for curve in data] == ["scatterpolar"] * 2
    assert [curve["theta"] for curve in data] == [[*CATEGORIES, CATEGORIES[0]]] * 2
    assert trace({"data": data}, "after")["r"] == [1.0, 2.0, 3.0, 4.0, 1.0]
    # Of several plots of this name the last is that of judge-b, without an interval.
    (bar,) = pages["leaderboard"].figures["Figures"]["data"]
    assert (bar["y"], bar["x"]) == (["before"], [6.0]) and "array" not in bar.get("error_x", {})


def test_answers_of_models_stand_side_by_side(pages):
    paragraphs = pages["leaderboard"].paragraphs
    assert [f"before {EVIL}", "So.", f"after {EVIL}", "So."] == paragraphs[-4:]


def test_answers_come_with_what_the_judge_said_and_a_link_to_all_of_them(folders, pages):
    text = (folders["leaderboard"] / REPORT).read_text(encoding="utf-8")
    assert "turn 1 scored 3 of 10</span>" in text and "turn 1 scored 4 of 10</span>" in text  # nobody read turn 2
    assert "before/answers/mt_bench.jsonl" in pages["leaderboard"].addresses


ANNOTATIONS = [{"index": 3, "preference": 1.75}, {"index": 4, "preference": None}]
SCORES = [{"question_id": 81, "turn": turn, "score": 4 + turn} for turn in (1, 2)]
GAMES = [{"uid": "u", "games": [{"score": "A>B"}, {"score": "A=B"}]}, {"uid": "v", "games": [None, None]}]
FOLLOWED = [{"prompt": "Why?", "follow_instruction_list": [True, False]}]


@pytest.mark.parametrize(
    ("task", "place", "rows", "notes"),
    [
        ("alpaca_eval", "J/annotations.json", ANNOTATIONS, {"3": "preferred to the baseline's with probability 0.75"}),
        ("mt_bench", "J/judgments.jsonl", SCORES, {"81": "turn 1 scored 5 of 10; turn 2 scored 6 of 10"}),
        ("arena_hard", "J/model_judgment.jsonl", GAMES, {"u": "against the baseline, as B: A>B, as A: A=B"}),
        ("ifeval", "eval_results_strict.jsonl", FOLLOWED, {"Why?": "follows 1 of 2 instructions"}),
        ("mine", "x.jsonl", [{"id": "x"}], {}),
    ],
)
def test_what_judges_said_is_read_from_the_benchmarks_own_files(task, place, rows, notes, tmp_path):
    if place.endswith(".json"):
        write_json(tmp_path / place, rows)
    else:
        write_jsonl(tmp_path / place, rows)
    assert judgements(tmp_path, task) == notes


def test_figures_are_what_plotly_describes(pages):
    """Its Python objects know every property of plotly.js and refuse others."""
    from plotly.graph_objects import Figure

    for page in pages.values():
        for title, figure in page.figures.items():
            assert Figure(figure).to_plotly_json()["data"], title


@pytest.fixture
def live(folders, monkeypatch):
    """The page of a run that goes on, and a clock that the test moves."""
    clock = [1000.0]
    monkeypatch.setattr(report_live.time, "monotonic", lambda: clock[0])
    page = LivePage(folders["plays"], writes=True)

    def wait(seconds):
        clock[0] += seconds

    def drawn():
        path = folders["plays"] / REPORT
        return path.read_text(encoding="utf-8") if path.exists() else ""

    (folders["plays"] / REPORT).unlink(missing_ok=True)
    return page, wait, drawn


def test_the_page_of_a_run_says_what_it_is_doing(live):
    page, wait, drawn = live
    page.begin_stage("stage 2 of 5, round 1: play, about 3 min left", 1, 5)
    assert "<strong>Stage 2 of 5, round 1: play, about 3 min left.</strong>" in drawn()
    assert '<progress max="5" value="1"' in drawn() and "has not ended" not in drawn()
    page.begin_stage("stage 3 of 5, round 1: evaluate", 2, 5)
    assert "<strong>Stage 3 of 5, round 1: evaluate.</strong>" in drawn()  # drawing took no time on this clock
    written = (page.folder / REPORT).stat().st_mtime_ns
    page.step()
    assert (page.folder / REPORT).stat().st_mtime_ns == written  # a minute has not passed
    wait(61)
    page.step()
    assert (page.folder / REPORT).stat().st_mtime_ns > written
    page.close()
    assert "<progress" not in drawn() and "This run has not ended" in drawn()


def test_drawing_takes_a_small_part_of_the_time(live, monkeypatch):
    page, wait, drawn = live
    write_slowly = report_live.write_report
    monkeypatch.setattr(report_live, "write_report", lambda *what: (wait(2.0), write_slowly(*what))[1])
    for place in range(4):
        page.begin_stage(f"stage {place} of 9", place, 9)
        wait(45)
    assert "Stage 3 of 9" in drawn()  # 0, then 135 seconds later; 50 times two seconds have passed in between
    page.begin_stage("stage 5 of 9", 5, 9)
    page.step()
    assert "Stage 3 of 9" in drawn()
    page.end([])  # the last one is always drawn
    assert "Stage" not in drawn()


def test_a_page_that_cannot_be_drawn_stops_nothing(live, monkeypatch, capsys):
    page, wait, drawn = live
    monkeypatch.setattr(report_live, "write_report", lambda *_: 1 / 0)
    for place in range(2):
        page.begin_stage("stage", place, 2)
        wait(1000)
    assert page.end([]) is None and drawn() == ""
    said, logged = capsys.readouterr()
    assert said.count("report.html is not drawn; openrlhf-sgpo report") == 1 and logged.count("Traceback") == 3
    other = LivePage(page.folder, writes=False)
    other.begin_stage("stage", 0, 1)
    assert other.end([]) is None and "Traceback" not in capsys.readouterr().err


def test_moments_of_finished_rounds_are_read_once(folders, monkeypatch):
    finished = {}
    assert moments_so_far(folders["run"], finished) == read_moments(folders["run"])
    assert list(finished) == [None, 0, 1, 2]
    monkeypatch.setattr(report_moments, "check_round", lambda *_, **__: pytest.fail("a finished round is read again"))
    assert moments_so_far(folders["run"], finished) == list(finished.values())


def test_only_rows_of_the_same_items_share_a_table():
    """A trial on a few items is not compared with a whole run, and is no other judge."""

    def row(model, expected):
        return {"task": "alpaca_eval", "model": model, "expected": expected, "judge": {"model": "gpt"}}

    groups = _groups([row("a", 805), row("trial", 10), row("b", 805)])
    title = "alpaca_eval, judged by gpt"
    assert {name: [each["model"] for each in rows] for name, rows in groups.items()} == {
        f"{title}, 805 judgements": ["a", "b"],
        f"{title}, 10 judgements": ["trial"],
    }
    assert list(_groups([row("a", 805), row("b", 805)])) == [title]
