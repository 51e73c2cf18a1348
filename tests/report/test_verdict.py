"""What a page says first follows from the figures and their intervals."""

import math

import pytest
from report_folders import Page, make_comparison, make_leaderboard, make_run

from openrlhf_sgpo.intervals import change, share_error
from openrlhf_sgpo.report import write_report
from openrlhf_sgpo.report.verdict import comparison_verdict, leaderboard_verdict, run_verdict

PM = "\N{PLUS-MINUS SIGN}"


def margins(right, count):
    return by_id([1.0] * right + [-1.0] * (count - right))


def by_id(values):
    return {f"pair {number}": value for number, value in enumerate(values)}


def verdict(*rights, count=200, **more):
    """Of a start that equals its reference, and moments at which so many held-out pairs are right."""
    law = [by_id([0.0] * count), *(margins(right, count) for right in rights)]
    names = ["start", *(f"round {number}" for number in range(len(rights)))]
    return run_verdict(names, law, [{}, *(more for _ in rights)])


def test_a_seed_stage_that_helps_and_rounds_that_do_not():
    first, second = verdict(150, 152)
    assert first == f"Held-out accuracy rose from 0.500 to 0.750 {PM} 0.060 in the seed stage (200 held-out pairs)."
    assert second.startswith("The round after it changed it by 0.010 ")
    assert second.endswith("not distinguishable from no change on 200 held-out pairs.")


@pytest.mark.parametrize(
    ("rights", "phrase"),
    [
        ((60,), "Held-out accuracy fell from 0.500 to 0.300"),
        ((102,), "went from 0.500 to 0.510"),
        ((120, 120, 180), "The 2 rounds after it raised it by 0.300"),
        ((180, 120), "The round after it lowered it by 0.300"),
    ],
)
def test_the_words_follow_the_change(rights, phrase):
    assert phrase in " ".join(verdict(*rights))


def test_a_win_rate_is_told_and_doubted():
    assert any(
        f"with probability 0.700 {PM} 0.098." in sentence
        for sentence in verdict(150, win_rate=0.7, win_rate_error=0.05)
    )
    doubted = verdict(150, win_rate=0.55, win_rate_error=0.05)
    assert any("not distinguishable from one half" in sentence for sentence in doubted)


def test_nothing_measured_is_said():
    (sentence,) = run_verdict(["start", "round 0"], [{}, {}], [{}, {}])
    assert sentence.startswith("It is unknown whether the policy improved: neither held-out pairs")
    assert run_verdict(["start"], [{"a": 0.0}], [{}]) == []


def test_a_change_is_measured_over_the_same_pairs():
    """By hand: 3 of 20 turned right and 1 wrong. Nothing that moved is no certainty either."""
    before, after = [0.0] * 3 + [1.0] * 17, [1.0] * 3 + [0.0] + [1.0] * 16
    moved, half = change(before, after)
    assert moved == pytest.approx(0.1) and half == pytest.approx(1.96 * math.sqrt(5 - 4 / 22) / 22)
    assert change(before, before) == (0.0, pytest.approx(1.96 / 22))
    assert share_error([0.5] * 8) is None and share_error([]) is None
    assert share_error([1.0] * 8) > 0.1  # that eight are right does not make it certain


def test_other_numbers_of_pairs_are_compared_over_those_of_both():
    """A resumed run was evaluated with more pairs: 15 of the first 20 stay right, and so are all others."""
    start, seed = by_id([0.0] * 20), margins(15, 20)
    more = {f"more {number}": 1.0 for number in range(80)}
    first, second = run_verdict(["start", "round 0", "round 1"], [start, seed, seed | more], [{}] * 3)
    assert first.startswith("Held-out accuracy rose from 0.500 to 0.750 ") and "(20 held-out pairs)" in first
    assert f"changed it by 0.000 {PM}" in second and f"to 0.750 {PM}" in second and "on 20 held-out pairs" in second


def pair(first, second, rate, p):
    return {"first": first, "second": second, "win_rate": rate, "low": rate - 0.1, "high": rate + 0.1, "p_holm": p}


def test_who_is_preferred_in_a_comparison():
    rows = [pair("a", "b", 0.7, 0.01), pair("a", "c", 0.52, 0.6), pair("b", "c", 0.25, 0.02)]
    first, second = comparison_verdict(rows, 100)
    assert f"Preferred on 100 prompts: a over b (0.700 {PM} 0.100), c over b (0.750 {PM} 0.100)" in first
    assert second == "The other pair cannot be told apart."
    (nothing,) = comparison_verdict([pair("a", "b", 0.7, None), pair("a", "c", 0.52, 0.06)], 100)
    assert nothing.startswith("No group is preferred to another on 100 prompts")
    assert comparison_verdict([], None) == []


def test_who_leads_a_leaderboard():
    def result(model, value, error=None):
        return {"model": model, "figures": {"win_rate": value}, "errors": {} if error is None else {"win_rate": error}}

    close = [result("a", 50.0, 3.0), result("b", 55.0, 4.0)]
    (sentence,) = leaderboard_verdict({"alpaca_eval": close})
    half = 1.96 * 5
    assert sentence == (
        f"alpaca_eval: b leads with 55.00 {PM} 7.84 (win rate), 5.00 {PM} {half:.2f} ahead of a, a lead not "
        "distinguishable from zero."
    )
    (sentence,) = leaderboard_verdict({"alpaca_eval": [result("a", 50.0, 3.0), result("b", 65.0, 4.0)]})
    assert sentence.endswith(f"15.00 {PM} {half:.2f} ahead of a.")
    (sentence,) = leaderboard_verdict({"ifeval": [result("a", 0.5), result("b", 0.25)]})
    assert sentence.endswith("b follows; the uncertainty is unknown.")
    assert leaderboard_verdict({"x": [result("a", None)]}) == []


@pytest.mark.parametrize("make", [lambda folder: make_run(folder, radius=0.1), make_comparison, make_leaderboard])
def test_it_stands_on_top(make, tmp_path):
    page = write_report(make(tmp_path / "page"))
    sentences = [text for text in Page(page).paragraphs[1:] if PM in text]
    text = page.read_text(encoding="utf-8")
    assert text.index('class="verdict"') < text.index('class="facts"') < text.index("<h2")
    assert sentences and text.count("half of a 95% interval") == 1
