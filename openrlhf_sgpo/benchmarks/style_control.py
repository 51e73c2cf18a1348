"""Style control, as arena-hard-auto's show_result.py defines it: win rates at the average style of a pool of models.

With tokens t and counts m of headers, list items and bold texts, the style of the answer a against the baseline's b has the
features

    (t_a - t_b) / (t_a + t_b)    and    (d_a - d_b) / (d_a + d_b + 1)    for the densities d = m / (t + 1),

standardised over all games of the pool. The model of the judge is P(model wins) = sigmoid(theta_model + beta . features), and
the rate is sigmoid(theta_model). It therefore depends on the pool: published tables have some 28 models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from openrlhf_sgpo.intervals import NORMAL_95
from openrlhf_sgpo.run_folder import read_jsonl

_CODE = re.compile(r"```[^`]*```")
_PATTERNS = {
    "header_count": {f"h{level}": rf"^#{{{level}}}\s" for level in range(1, 7)},
    "list_count": {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"},
    "bold_count": {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"},
}
_ITERATIONS = 200
_RIDGE = 1e-6  # keeps a model that wins every game finite


class StyledGame(NamedTuple):
    """A judgement of the pool. style: tokens, headers, list items and bold texts of the model's answer, then of the baseline's.
    score: the model's, in [0, 1]. weight: how often the judgement counts."""

    question: str
    category: str
    model: str
    style: tuple[Sequence[int], Sequence[int]]
    score: float
    weight: float


def encoding() -> Any:
    """tiktoken's encoding of GPT-4o, which counts the tokens; it is downloaded once. Raises ValueError."""
    loaded = _load_encoding()
    if isinstance(loaded, str):
        raise ValueError(loaded)
    return loaded


@cache  # of a failure, too: each attempt waits for the network
def _load_encoding() -> Any:
    """The encoding, or why there is none."""
    try:
        import tiktoken

        return tiktoken.encoding_for_model("gpt-4o")
    except Exception as error:  # the library raises those of its downloads
        return f"tiktoken's encoding of GPT-4o, which counts the tokens, cannot be had ({type(error).__name__})"


def style_metadata(text: str) -> dict[str, Any]:
    """The counts of an answer in arena-hard-auto's format. Raises ValueError without the ``encoding``."""
    tokens = len(encoding().encode(text, disallowed_special=()))
    return {"token_len": tokens, **markdown_counts(text)}


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold texts outside of blocks of code."""
    prose = _CODE.sub("", text)
    return {
        group: {name: len(re.findall(pattern, prose, re.MULTILINE)) for name, pattern in patterns.items()}
        for group, patterns in _PATTERNS.items()
    }


def style_counts(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens, headers, list items and bold texts. metadata: as ``style_metadata`` returns them."""
    return (metadata["token_len"], *(sum(metadata[group].values()) for group in _PATTERNS))


def style_features(answer: Sequence[int], baseline: Sequence[int]) -> list[float]:
    """The four features of an answer against the baseline's, of ``style_counts``, before they are standardised."""
    total = answer[0] + baseline[0]
    features = [(answer[0] - baseline[0]) / total if total else 0.0]
    for count, other in zip(answer[1:], baseline[1:], strict=True):
        density, baseline_density = count / (answer[0] + 1), other / (baseline[0] + 1)
        features.append((density - baseline_density) / (density + baseline_density + 1))
    return features


def read_games(
    model: str,
    judgements: Path,
    answers: Path,
    baselines: Mapping[str, tuple[str, Sequence[int]]],
    verdicts: Mapping[str, tuple[float, float]],
) -> list[StyledGame]:
    """The games of a model from files in arena-hard-auto's format. model: its name in the games. baselines: name and style of
    the baseline by question; other questions, and games against another, are left out. verdicts: the score and weight of A, by
    label; a question without two of them is left out. Raises ValueError."""
    styles = {row["uid"]: style_counts(row.get("metadata") or _counted(row)) for row in read_jsonl(answers)}
    games = []
    for row in read_jsonl(judgements):
        question, labels = row["uid"], [game["score"] if game else None for game in row["games"]]
        baseline, baseline_style = baselines.get(question, ("", ()))
        first, second = (verdicts.get(label or "") for label in labels)
        if row.get("baseline", baseline) == baseline and baseline and first and second:
            if question not in styles:
                raise ValueError(f"{answers} has no answer to question {question}, which is judged in {judgements}")
            style = styles[question], baseline_style
            # A is the baseline in the first game.
            for score, weight in ((1 - first[0], first[1]), second):
                games.append(StyledGame(question, row["category"], model, style, score, weight))
    return games


def _counted(row: Mapping[str, Any]) -> dict[str, Any]:
    return style_metadata(row["messages"][-1]["content"]["answer"])


def controlled_rates(games: Sequence[StyledGame]) -> dict[str, tuple[float, float, float]]:
    """(rate, low, high) in percent by model: the rate at the pool's average style, by maximum likelihood, with a 95% interval.

    The interval is that of the sandwich estimator, in which the games of a question belong together, whoever played; the
    benchmark's own resamples single judgements, at 90%.
    """
    models = sorted({game.model for game in games})
    weights = np.array([game.weight for game in games])
    scores = np.array([game.score for game in games])
    features = np.array([style_features(*game.style) for game in games])
    mean = np.average(features, axis=0, weights=weights)
    deviation = np.sqrt(weights @ (features - mean) ** 2 / (weights.sum() - 1))
    # A style that nobody varies controls nothing.
    standardised = np.divide(features - mean, deviation, out=np.zeros_like(features), where=deviation > 1e-12)
    columns = np.array([[game.model == model for model in models] for game in games], dtype=np.float64)
    design = np.hstack([columns, standardised])
    coefficients, residuals, curvature = _maximum_likelihood(design, scores, weights)
    questions = {question: number for number, question in enumerate(dict.fromkeys(game.question for game in games))}
    sums = np.zeros((len(questions), design.shape[1]))
    np.add.at(sums, [questions[game.question] for game in games], residuals[:, None] * design)
    bread = np.linalg.inv(curvature)
    errors = np.sqrt(np.diag(bread @ sums.T @ sums @ bread))
    return {
        model: (_percent(theta), _percent(theta - NORMAL_95 * error), _percent(theta + NORMAL_95 * error))
        for model, theta, error in zip(models, coefficients, errors, strict=False)
    }


def _percent(log_odds: float) -> float:
    return 100 / (1 + math.exp(-log_odds))


def _maximum_likelihood(
    design: npt.NDArray[np.float64], scores: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Coefficients of a logistic regression by Newton's method, its weighted residuals, and the curvature of its loss. Raises
    ValueError if it does not come to an end."""
    coefficients = np.zeros(design.shape[1])

    def loss(at: npt.NDArray[np.float64]) -> float:
        logits = design @ at
        return float(weights @ (np.logaddexp(0, logits) - scores * logits) + _RIDGE / 2 * at @ at)

    for _ in range(_ITERATIONS):
        chances = np.exp(-np.logaddexp(0, -design @ coefficients))
        residuals = weights * (scores - chances)
        spread = weights * chances * (1 - chances)
        curvature = design.T @ (spread[:, None] * design) + _RIDGE * np.eye(len(coefficients))
        step = np.linalg.solve(curvature, design.T @ residuals - _RIDGE * coefficients)
        if np.abs(step).max() < 1e-9:
            return coefficients + step, residuals, curvature
        # Where styles nearly tell the winners, whole steps can overshoot forever.
        before = loss(coefficients)
        while loss(coefficients + step) > before and np.abs(step).max() > 1e-9:
            step /= 2
        coefficients += step
    raise ValueError(f"the regression on styles does not converge in {_ITERATIONS} steps")
