"""V of the policy and of DPO, in the evaluation of every round."""

from __future__ import annotations

import numpy as np
import pytest
import report_folders
from scipy.optimize import minimize_scalar

from openrlhf_sgpo import algorithms
from openrlhf_sgpo.evaluator import worst_case
from openrlhf_sgpo.intervals import NORMAL_95
from openrlhf_sgpo.report import write_report
from openrlhf_sgpo.run_folder import RunFolder, read_json, read_jsonl, write_jsonl

PLACES = ("initial", "round_0", "round_1", "round_2")


def held_out(folder, place):
    return np.array([row["margin"] for row in read_jsonl(folder / place / "held_out.jsonl")])


def dual(margins, radius, edge):
    """min over lam of lam * radius + mean max(l(xi), l(edge) - lam (xi - edge)), with DPO's loss l: the worst case in margin
    space, if no margin lies left of the edge."""

    def bound(slope):
        chords = np.logaddexp(0.0, -edge) - slope * (margins - edge)
        return slope * radius + np.maximum(np.logaddexp(0.0, -margins), chords).mean()

    return minimize_scalar(bound, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-12}).fun


def test_every_round_has_v_of_its_policy_and_of_dpo_on_the_same_pairs(tmp_path):
    folder = report_folders.make_run(tmp_path / "run", radius=0.1)
    for number in (1, 2):
        figures = worst_case(RunFolder(str(folder)), algorithms.get("sgpo"), number)["worst_case"]
        margins = {place: held_out(folder, place) for place in PLACES[: number + 2]}
        edge, end = figures["window"]
        assert edge == min(map(np.min, margins.values())) - 1 and end == max(map(np.max, margins.values())) + 1
        assert (figures["pairs"], figures["radius"]) == (20, 0.1)
        policy, dpo = margins[f"round_{number}"], margins["round_0"]
        for name, radius in (("loss", 0.0), ("value", 0.1)):
            expected = dual(policy, radius, edge), dual(dpo, radius, edge)
            assert (figures[name], figures[f"dpo_{name}"]) == pytest.approx(expected, abs=1e-9)
            assert figures[f"{name}_saved"] == pytest.approx(expected[1] - expected[0], abs=1e-9)
        assert figures["loss"] == pytest.approx(np.logaddexp(0.0, -policy).mean(), abs=1e-12), "DPO's loss"
        saved = np.logaddexp(0.0, -dpo) - np.logaddexp(0.0, -policy)
        assert figures["loss_saved_error"] == pytest.approx(saved.std(ddof=1) / 20**0.5)


@pytest.mark.parametrize("options", [{"radius": 0.1}, {"radius": 0.05, "space": "probability"}])
def test_the_page_shows_the_same_as_the_last_round(options, tmp_path):
    folder = report_folders.make_run(tmp_path / "run", **options)
    figures = worst_case(RunFolder(str(folder)), algorithms.get("sgpo"), 2)["worst_case"]
    page = report_folders.Page(write_report(folder))
    (table,) = [table for table in page.tables if "saved against round 0" in table[0]]
    cells = {row[0]: row for row in table}
    for column, name in ((1, "loss"), (3, "value")):
        assert cells["round 2"][column] == f"{figures[name]:.4f}"
        assert cells["round 0"][column] == f"{figures[f'dpo_{name}']:.4f}"
        saved, half = map(float, cells["round 2"][column + 1].split(" \N{PLUS-MINUS SIGN} "))
        assert saved == pytest.approx(figures[f"{name}_saved"], abs=1e-4)
        assert half == pytest.approx(NORMAL_95 * figures[f"{name}_saved_error"], abs=1e-4)


def test_there_is_none_where_nothing_can_be_compared(tmp_path):
    folder = report_folders.make_run(tmp_path / "run", radius=0.1)
    run, sgpo = RunFolder(str(folder)), algorithms.get("sgpo")
    assert worst_case(run, sgpo, None) == worst_case(run, sgpo, 0) == {}, "no follower"
    assert worst_case(run, algorithms.get("dpo"), 1) == {}, "another seed stage than DPO's"
    best = report_folders.make_run(tmp_path / "best", algo="sgpo_best", radius=0.2)
    assert worst_case(RunFolder(str(best)), algorithms.get("sgpo_best"), 1) == {}
    # A resumed run may have more held-out pairs than before: those that all policies know count.
    rows = read_jsonl(folder / "round_0/held_out.jsonl")
    write_jsonl(folder / "round_0/held_out.jsonl", rows[:12])
    assert worst_case(run, sgpo, 1)["worst_case"]["pairs"] == 12
    write_jsonl(folder / "round_0/held_out.jsonl", [])
    assert worst_case(run, sgpo, 1) == {}
    (folder / "round_0/held_out.jsonl").unlink()
    assert worst_case(run, sgpo, 1) == {}, "a run without --eval.dataset"


def test_at_radius_0_it_is_the_loss_of_dpo(tmp_path):
    folder = report_folders.make_run(tmp_path / "run", radius=0.0)
    figures = worst_case(RunFolder(str(folder)), algorithms.get("sgpo"), 1)["worst_case"]
    assert figures["value"] == figures["loss"] and figures["dpo_value"] == figures["dpo_loss"]
    assert read_json(folder / "round_1/worst_case.json")["ball"] == "worst"
