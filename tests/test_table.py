"""The results table: figures and seconds where they belong, dashes where there are none."""

import itertools
import re

import pytest

from openrlhf_sgpo.ledger import Ledger, read_ledger, write_ledger
from openrlhf_sgpo.table import results_table

FIGURE_NAMES = ["accuracy", "margin", "kl", "length", "wins", "labels", "value"]
SHOWN = ["generate", "train", "evaluate"]  # stages that took any time
START = {"name": "start", "accuracy": 0.5, "margin": 0.0, "probe": {"x": 1.0}}
ROUND = {
    "name": "round 10",
    "accuracy": 0.61249,
    "margin": -12.34567,
    "response_length": 187.26,
    "kl": 8.125,
    "value": 0.71,
}
STAGE_SECONDS = {
    "initial/evaluate": {"seconds": 3.21},
    "round_10/generate": {"seconds": 1234.56, "tokens": 5},
    "round_10/train": {"seconds": 0.04},
    "round_1/evaluate": {"seconds": 77.0},
}


def cells(table):
    """Cells of every line, cut where the rule under the header has its gaps; then the notes."""
    header, rule, *lines = table.splitlines()
    lines, note = lines[:-4], "\n".join(lines[-4:])
    columns = [match.span() for match in re.finditer("-+", rule)]
    for line in [header, *lines]:
        between = [line[left[1] : right[0]] for left, right in itertools.pairwise(columns)]
        assert len(line) == len(rule) and all(gap == "  " for gap in between)
    return [[line[first:last] for first, last in columns] for line in [header, *lines]], note


def test_figures_and_seconds():
    (header, start, first), note = cells(results_table([START, ROUND], STAGE_SECONDS))
    names = [cell.strip() for cell in header]
    assert names == ["", *FIGURE_NAMES, *SHOWN]
    assert "seconds" in note and "held-out" in note
    row = dict(zip(names, (cell.strip() for cell in first), strict=True))
    expected = {
        "": "round 10",
        "accuracy": f"{ROUND['accuracy']:.3f}",
        "margin": f"{ROUND['margin']:.4f}",
        "kl": f"{ROUND['kl']:.2f}",
        "length": f"{ROUND['response_length']:.1f}",
        "wins": "-",
        "labels": "-",
        "value": f"{ROUND['value']:.4f}",
        "generate": "1234.6",
        "train": "0.0",
        "evaluate": "-",  # those of round 1 are not those of round 10
    }
    assert row == expected
    row = dict(zip(names, (cell.strip() for cell in start), strict=True))
    missing = {"kl", "length", "wins", "labels", "value", *SHOWN} - {"evaluate"}
    assert {name for name, cell in row.items() if cell == "-"} == missing
    assert (row[""], row["accuracy"], row["margin"], row["evaluate"]) == ("start", "0.500", "0.0000", "3.2")


@pytest.mark.parametrize("rows", [[], [START], [{"name": "start"}, ROUND, {"name": "round 2", "value": None}]])
def test_alignment(rows):
    table = results_table(rows, STAGE_SECONDS)
    assert table.endswith("\n")
    lines, _ = cells(table)
    assert len(lines) == 1 + len(rows)
    for line in lines:
        assert line[0] == line[0].strip().ljust(len(line[0]))
        for cell in line[1:]:
            assert cell.strip() and cell == cell.strip().rjust(len(cell))


def test_nothing_measured_is_all_dashes():
    (_, line), _ = cells(results_table([{"name": "round 1"}], {}))
    assert [cell.strip() for cell in line] == ["round 1"] + ["-"] * len(FIGURE_NAMES)


def test_a_measured_zero_is_no_dash():
    (_, line), _ = cells(results_table([{"name": "round 1", "accuracy": 0.0, "value": 0.0}], {}))
    assert [cell.strip() for cell in line[1:8]] == ["0.000", "-", "-", "-", "-", "-", "0.0000"]


def test_rows_of_other_sizes_are_told():
    rows = [
        {"name": name, "pairs": pairs, "prompts": 3} for name, pairs in (("start", 4), ("round 0", 4), ("round 1", 8))
    ]
    note = "measured on different numbers of held-out pairs: 4 (start, round 0), 8 (round 1); wins"
    assert note in results_table(rows, {}) and "different numbers" not in results_table(rows[:2], {})
    rows[2] |= {"prompts": 6}
    assert "8 (round 1); of prompts: 3 (start, round 0), 6 (round 1); wins" in results_table(rows, {})


def test_scoring_is_not_the_follower(tmp_path):
    stages = {"round_1/score": {"seconds": 6.5, "tokens_scored": 99}, "round_1/follower": {"seconds": 0.25}}
    write_ledger(tmp_path / "ledger.json", stages)
    assert read_ledger(tmp_path / "ledger.json")["stages"] == stages
    assert Ledger(tmp_path / "ledger.json", writes=True).stages == stages
    assert Ledger(tmp_path / "ledger.json", writes=False).stages == {}  # of ranks that may not see the file
    assert read_ledger(tmp_path / "none.json") == {"total": {}, "stages": {}}


def test_the_parts_of_plays_are_columns():
    play = {"seconds": 9.0, "seconds_generate": 4.0, "seconds_oracle": 1.0, "seconds_sync": 0.5, "samples": 8}
    row = {"name": "round 1", "win_rate": 0.625}
    (header, line), _ = cells(results_table([row], {"round_1/play": play, "round_1/evaluate": {"seconds": 2.0}}))
    shown = {name.strip(): cell.strip() for name, cell in zip(header, line, strict=True)}
    assert list(shown)[len(FIGURE_NAMES) + 1 :] == ["generate", "oracle", "sync", "evaluate"]
    assert (shown["wins"], shown["generate"], shown["oracle"], shown["sync"]) == ("0.625", "4.0", "1.0", "0.5")
