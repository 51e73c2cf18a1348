"""How far an oracle agrees with people: by a server whose rule is known, and by oracles that are swayed by one thing only."""

from __future__ import annotations

import json
import math
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import BIAS, JudgeServer, sigmoid
from tiny import write_jsonl

from openrlhf_sgpo.cli.main import judge_check
from openrlhf_sgpo.comparison.judge_check import PairShares, agreement_figures, ask, load, share_of
from openrlhf_sgpo.data.records import Pair
from openrlhf_sgpo.flags import SettingsError
from openrlhf_sgpo.oracle import PreferenceOracle, RewardOracle
from openrlhf_sgpo.oracle.base import antisymmetric

# Of each pair how often the chosen and the rejected answer say good, and how many characters they have more.
PAIRS = [
    (3, 0, 0, 20),
    (1, 0, 0, 20),
    (0, 0, 9, 0),
    (2, 2, 0, 9),
    (0, 1, 40, 0),
    (0, 4, 40, 0),
    (1, 0, 0, 0),
    (5, 1, 0, 99),
]


def answer(good: int, more: int) -> str:
    # Every good is five characters; without this the number of them would decide the length.
    return "good " * good + "x" * (40 - 5 * good + more)


def rows() -> list[dict]:
    return [
        {"id": f"pair-{i}", "prompt": f"Question {i}?", "chosen": answer(c, longer), "rejected": answer(r, more)}
        for i, (c, r, longer, more) in enumerate(PAIRS)
    ]


def pairs() -> list[Pair]:
    return [
        Pair(row["id"], [{"role": "user", "content": row["prompt"]}], row["chosen"], row["rejected"]) for row in rows()
    ]


def test_a_server_of_a_known_rule(tmp_path, capsys):
    """P(first) = sigmoid(d + BIAS) with d the first answer's lead in good: the figures follow from the leads of PAIRS."""
    same = rows()[0] | {"id": "same", "rejected": rows()[0]["chosen"]}
    data, out = write_jsonl(tmp_path / "pairs.jsonl", [*rows(), same]), tmp_path / "out"
    leads = [c - r for c, r, _, _ in PAIRS]
    gaps = [longer - more for _, _, longer, more in PAIRS]
    argv = ["--data.dataset", str(data), "--out", str(out), "--judge.model", "rule"]
    with JudgeServer() as server:
        assert judge_check([*argv, "--judge.base_url", server.url]) == 0
        assert len(server.asked) == 1 + 2 * len(PAIRS), "the trial, and every pair in both orders"
        printed = capsys.readouterr().out
        result = json.loads((out / "judge_check.json").read_text())
        with pytest.raises(ValueError, match="add --resume"):
            judge_check([*argv, "--judge.base_url", server.url])
        count = len(server.asked)
        judge_check([*argv, "--judge.base_url", server.url, "--resume"])
        assert len(server.asked) == count + 1, "the trial alone"
        again = json.loads((out / "judge_check.json").read_text())
    assert again["figures"] == result["figures"] and again["usage"]["judge_calls"] == 0
    assert result["pairs"] == len(PAIRS) and result["usage"]["judge_calls"] == 2 * len(PAIRS)
    assert result["model"] == "rule" and result["notes"] == ["1 pairs of two equal answers are left out"]
    value = {name: figure["value"] for name, figure in result["figures"].items()}
    places = [(sigmoid(lead + BIAS) + sigmoid(-lead + BIAS)) / 2 - 0.5 for lead in leads]
    # A lead of nothing is a tie over both orders, which the first place wins in each; one of 1 or more outdoes the BIAS.
    wins, ties = sum(lead > 0 for lead in leads), leads.count(0)
    assert (wins, ties, len(leads)) == (4, 2, 8)
    assert value["agreement"] == (4 + 2 / 2) / 8
    assert value["chosen_first"] == (4 + 2) / 8 and value["chosen_second"] == 4 / 8
    assert value["flips"] == 2 / 8
    assert value["position_bias"] == pytest.approx(fmean(places), abs=1e-9)
    spread = 1.959964 * stdev(places) / math.sqrt(8)
    assert result["figures"]["position_bias"]["interval"] == pytest.approx(
        [fmean(places) - spread, fmean(places) + spread]
    )
    # Seven pairs differ in length: the chosen answer is longer in three, of which one is a tie and two are lost.
    assert [(gap > 0) - (gap < 0) for gap in gaps] == [-1, -1, 1, -1, 1, 1, 0, -1]
    assert result["figures"]["length_bias"]["n"] == 7
    assert value["longer_chosen"] == pytest.approx(3 / 7)
    assert value["agreement_longer"] == pytest.approx(0.5 / 3)
    assert value["agreement_shorter"] == pytest.approx((3 + 0.5) / 4)
    assert value["longer_preferred"] == pytest.approx((0.5 + 0.5) / 7)
    assert value["length_bias"] == pytest.approx(1 / 7 - 3 / 7)
    assert "position bias" in printed and f"{value['agreement']:.3f}" in printed and "judge_calls 16" in printed
    said = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [row["chosen_first"] for row in said] == pytest.approx([sigmoid(lead + BIAS) for lead in leads])
    assert [row["chosen_second"] for row in said] == pytest.approx([sigmoid(-lead + BIAS) for lead in leads])


class FirstPlace(PreferenceOracle):
    name = "first"

    def prefer(self, prompt, first, second):
        return 1.0


class Longer(RewardOracle):
    name = "longer"

    def score(self, prompt, answer):
        return len(answer)


class Matrices(PreferenceOracle):
    """Knows both answers at once, and shows them to nobody in an order."""

    name = "matrices"

    def matrices(self, questions, label):
        return [antisymmetric(2, {(0, 1): 0.75}) for _ in questions]


def values(judge) -> dict[str, float | None]:
    said, shows_orders = ask(judge, pairs())
    return {name: figure.value for name, figure in agreement_figures(pairs(), said, shows_orders).items()}


def test_who_always_takes_the_first_knows_nothing():
    figures = values(FirstPlace())
    assert (figures["position_bias"], figures["flips"]) == (0.5, 1)
    assert (figures["chosen_first"], figures["chosen_second"]) == (1, 0)
    assert figures["agreement"] == figures["longer_preferred"] == 0.5


def test_who_always_takes_the_longer_one():
    figures = values(Longer())
    assert not {"position_bias", "flips", "chosen_first", "chosen_second"} & figures.keys()
    assert (figures["longer_preferred"], figures["agreement_longer"], figures["agreement_shorter"]) == (1, 1, 0)
    assert figures["length_bias"] == pytest.approx(1 - figures["longer_chosen"])
    # One pair of equal lengths is a tie.
    assert figures["agreement"] == (7 * figures["longer_chosen"] + 0.5) / 8


def test_who_knows_no_order():
    figures = values(Matrices())
    assert figures["agreement"] == 1 and "position_bias" not in figures


def test_a_preference_must_be_a_probability():
    class Wrong(FirstPlace):
        def prefer(self, prompt, first, second):
            return 1.5

    with pytest.raises(ValueError, match="oracle first, question pair-0: prefer returned 1.5, not a probability"):
        ask(Wrong(), pairs())


SHARES = st.floats(0, 1)


@given(st.lists(st.tuples(SHARES, SHARES), min_size=8, max_size=8))
def test_figures_fit_together(shares):
    said = [PairShares(*both) for both in shares]
    figures = agreement_figures(pairs(), said, True)
    value = {name: figure.value for name, figure in figures.items()}
    chosen = value["longer_chosen"]
    # Who agrees where people chose the shorter answer does not prefer the longer one.
    preferred = chosen * value["agreement_longer"] + (1 - chosen) * (1 - value["agreement_shorter"])
    assert value["longer_preferred"] == pytest.approx(preferred)
    assert value["length_bias"] == pytest.approx(preferred - chosen)
    for figure in figures.values():
        assert figure.interval[0] - 1e-12 <= figure.value <= figure.interval[1] + 1e-12
    # With people's choice and the other answer exchanged, all that was right is wrong, and places are what they were.
    turned = [Pair(pair.id, pair.prompt, pair.rejected, pair.chosen) for pair in pairs()]
    other = {
        name: figure.value
        for name, figure in agreement_figures(turned, [PairShares(b, a) for a, b in shares], True).items()
    }
    assert other["agreement"] == pytest.approx(1 - value["agreement"])
    assert other["position_bias"] == pytest.approx(value["position_bias"]) and other["flips"] == value["flips"]
    assert other["longer_preferred"] == pytest.approx(value["longer_preferred"])


@given(st.integers(1, 400), st.data())
def test_wilsons_interval_ends_where_the_score_test_rejects(n, data):
    """Its ends are the proportions q with |share - q| = 1.96 sqrt(q (1 - q) / n)."""
    hits = data.draw(st.integers(0, n))
    share, ends, _ = share_of([1.0] * hits + [0.0] * (n - hits))
    for q in ends:
        assert abs(share - q) == pytest.approx(1.959964 * math.sqrt(q * (1 - q) / n), abs=1e-7)


FILES = "--data.dataset p.jsonl --out o"
SERVER = "--judge.model m --judge.base_url http://x/v1"


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (SERVER, "--data.dataset: missing"),
        (f"--data.dataset p.jsonl {SERVER}", "--out: missing"),
        (f"{FILES} --judge.model m", "--judge.base_url: missing"),
        (f"{FILES} --oracle implicit", "--oracle: implicit is a policy's own reward"),
        (f"{FILES} --oracle nobody", "--oracle: "),
        (f"{FILES} --oracle reward_model", "--reward.model_name_or_path: missing"),
        (f"{FILES} --oracle reward_model --judge.model m", "--judge.model: --oracle reward_model has no use for it"),
        (f"{FILES} {SERVER} --data.max_len 9", "--data.max_len: --oracle judge has no use for it"),
        (f"{FILES} {SERVER} --data.max_samples -1", "--data.max_samples: -1 is out of range"),
        (f"{FILES} {SERVER} --judge.concurrency 0", "--judge.concurrency: 0 is out of range"),
        (f"{FILES} {SERVER} --judge.swap random", "--judge.swap is unknown"),
    ],
)
def test_settings_that_cannot_work(argv, problem):
    with pytest.raises(SettingsError) as caught:
        load(argv.split())
    assert any(text.startswith(problem) for text in caught.value.args), caught.value.args


def test_a_judge_that_does_not_answer_is_found_before_the_folder_is_made(tmp_path):
    data, out = write_jsonl(tmp_path / "pairs.jsonl", rows()), tmp_path / "out"
    with JudgeServer(lambda *_: "401") as server:
        argv = ["--data.dataset", data, "--out", out, "--judge.model", "rule", "--judge.base_url", server.url]
        with pytest.raises(ValueError, match="set --judge.api_key"):
            judge_check([str(word) for word in argv])
    assert not out.exists()


@pytest.mark.slow
def test_a_reward_model(tiny_reward_model, tmp_path):
    """Its own rewards of the two answers say what it agrees with."""
    data, out = write_jsonl(tmp_path / "pairs.jsonl", rows()), tmp_path / "out"
    argv = ["--data.dataset", data, "--out", out, "--oracle", "reward_model", "--ds.param_dtype", "fp32"]
    assert judge_check([str(word) for word in [*argv, "--reward.model_name_or_path", tiny_reward_model]]) == 0
    result = json.loads((out / "judge_check.json").read_text())
    said = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert result["figures"]["agreement"]["value"] == fmean(row["chosen_first"] > 0.5 for row in said)
    assert all(row["chosen_first"] + row["chosen_second"] == pytest.approx(1) for row in said)
    assert len({row["chosen_first"] for row in said}) == len(PAIRS)
    assert result["notes"] == ["the oracle shows no order, so its position bias is 0 by construction"]
    assert result["usage"]["judge_calls"] == 2 * len(PAIRS)
