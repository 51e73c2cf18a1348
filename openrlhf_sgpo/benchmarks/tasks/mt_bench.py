"""MT-Bench (Zheng et al., arXiv 2306.05685): a judge grades two answers to each of 80 questions from 1 to 10.

Temperatures, categories with reference answers and score patterns come from FastChat's ``llm_judge``. The requests are our own,
because FastChat's fail with openai 1 or later, and its second run is averaged with the first.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

from openrlhf_sgpo.benchmarks.benchmark_files import (
    NUMBER,
    TEXT,
    TEXTS,
    Fields,
    Hub,
    Kind,
    check_once,
    locate,
    read_checked,
    read_fields,
    upstream,
)
from openrlhf_sgpo.benchmarks.judge import EvaluationJudge
from openrlhf_sgpo.benchmarks.task import Item, Responses, Result, Task
from openrlhf_sgpo.content_cache import content_key
from openrlhf_sgpo.data.records import Messages
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.intervals import bootstrap_interval
from openrlhf_sgpo.judge.client import Request
from openrlhf_sgpo.judge.reply import written_text
from openrlhf_sgpo.run_folder import write_jsonl

DECODING = {"temperature": 0, "max_tokens": 2048}  # as in run_judge_single of fastchat.llm_judge.common
PROMPT_NAMES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
FIGURES = ("turn_1", "turn_2", "average")


INTEGER = Kind("an integer", lambda value: type(value) is int)
TWO_TEXTS = Kind("a list of two texts", lambda value: TEXTS.holds(value) and len(value) == 2)


def _turns(choices: Any) -> list[str]:
    """The texts of FastChat's first choice; empty if it has none."""
    first = choices[0] if isinstance(choices, list) and choices else None
    turns = first.get("turns") if isinstance(first, dict) else None
    return turns if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns) else []


class BenchmarkFile(NamedTuple):
    """places: paths below --mt_bench.folder, in FastChat's layout and others. hub: path in the Space lmsys/mt-bench."""

    places: tuple[str, ...]
    hub: str
    fields: Fields
    digest: str


QUESTIONS = BenchmarkFile(
    ("question.jsonl",),
    "data/mt_bench/question.jsonl",
    {"question_id": INTEGER, "category": TEXT, "turns": TWO_TEXTS},
    "a6cbf8e3cefe366d13bc0a0f9b3326bd",
)
PROMPTS = BenchmarkFile(
    ("judge_prompts.jsonl", "../judge_prompts.jsonl"),
    "data/judge_prompts.jsonl",
    dict.fromkeys(("name", "type", "system_prompt", "prompt_template", "output_format"), TEXT),
    "da2529c6b000840d27576bd56bbf82fd",
)
REFERENCES = BenchmarkFile(
    ("reference_answer/gpt-4.jsonl", "reference_answer_gpt-4.jsonl"),
    "data/mt_bench/reference_answer/gpt-4.jsonl",
    {
        "question_id": INTEGER,
        "choices": Kind("a list with two texts in [0].turns", lambda value: len(_turns(value)) == 2),
    },
    "c60658387b59a4d6e8c2b44be3ce0838",
)


@dataclass
class MTBenchSettings:
    folder: str = setting(
        "",
        "folder with question.jsonl, judge_prompts.jsonl and reference_answer/gpt-4.jsonl, such as FastChat's data/mt_bench "
        "(default: the files of the hub's Space lmsys/mt-bench)",
    )
    limit: int = setting(0, "number of questions, taken from each category in turn (0: all)", low=0)
    unverified: bool = setting(False, "accept files even if their content is not the published one")


class Files(NamedTuple):
    """prompts: the judge's, by name. references: GPT-4's answers to both turns, by question. notes: for the result."""

    questions: list[dict[str, Any]]
    prompts: dict[str, dict[str, Any]]
    references: dict[int, list[str]]
    notes: list[str]


class Judgement(NamedTuple):
    """The grade of one answer. turn: 1 or 2. score: None if the judge gave none."""

    question: str
    category: str
    turn: int
    score: float | None


class MTBench(Task):
    """Scores from 1 to 10. The result's ``n`` and ``expected`` count judgements, two per question."""

    name = "mt_bench"
    packages = ("fastchat",)
    answer_fields: ClassVar = {"question_id": NUMBER}
    Settings: ClassVar[type] = MTBenchSettings

    @cached_property
    def _files(self) -> Files:
        (questions, question_notes), (rows, prompt_notes), (references, reference_notes) = map(
            self._rows, (QUESTIONS, PROMPTS, REFERENCES)
        )
        prompts = {row["name"]: row for row in rows}
        if missing := [name for name in PROMPT_NAMES if name not in prompts]:
            raise ValueError(f"--mt_bench.folder: judge_prompts.jsonl has no prompt {', '.join(missing)}")
        trial = Item("0", ("", ""), facts={"reference": ("", "")})
        for name in PROMPT_NAMES:
            try:
                grading(prompts[name], trial, ("", ""))
            except (LookupError, ValueError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"--mt_bench.folder: judge_prompts.jsonl, prompt {name}: the template cannot be filled in ({error})"
                ) from error
        turns = {row["question_id"]: _turns(row["choices"]) for row in references}
        return Files(questions, prompts, turns, [*question_notes, *prompt_notes, *reference_notes])

    def _rows(self, file: BenchmarkFile) -> tuple[list[dict[str, Any]], list[str]]:
        user_path = ""
        if self.settings.folder:
            places = [Path(self.settings.folder) / place for place in file.places]
            user_path = str(next((place for place in places if place.is_file()), places[0]))
        path = locate("mt_bench.folder", user_path, Hub("lmsys/mt-bench", "space", file.hub))
        return read_checked("mt_bench.folder", path, file.fields, file.digest, self.settings.unverified)

    def items(self) -> list[Item]:
        """Ids are FastChat's, from 81 to 160."""
        references, common = self._files.references, _fastchat()
        items = []
        for row in spread(self._files.questions, self.settings.limit):
            number, category = row["question_id"], row["category"]
            referenced = category in common.NEED_REF_CATS
            if referenced and number not in references:
                raise ValueError(f"--mt_bench.folder: there is no reference answer to question {number} ({category})")
            facts = {"reference": tuple(references[number]) if referenced else ()}
            items.append(
                Item(str(number), tuple(row["turns"]), category, common.temperature_config.get(category, 0.7), facts)
            )
        return items

    def read_responses(self, path: Path) -> list[Responses]:
        """Responses in FastChat's model answers, {"question_id", "choices": [{"turns"}]}, or in {"question_id", "turns"}; skips
        those beyond the limit."""
        rows = read_fields(path, self.answer_fields)
        answers = [(str(row["question_id"]), _turns(row.get("choices") or [row])) for row in rows]
        check_once(
            path, "question", [key for key, _ in answers], [str(row["question_id"]) for row in self._files.questions]
        )
        for key, turns in answers:
            if len(turns) != 2:
                raise ValueError(
                    f"{path}: question {key} needs the texts of two answers in choices[0].turns, or in turns"
                )
        ids = {item.id for item in self.items()}
        return [Responses(key, tuple(turns)) for key, turns in answers if key in ids]

    def preflight(self, judge: EvaluationJudge) -> list[str]:
        item = Item("0", ("How much is two and two?",), facts={"reference": ()})
        request = Request("a first question", grading(self._files.prompts["single-v1"], item, ("Four.",)))
        (text,) = judge.ask(self.name, DECODING, [request], written_text, "")
        if text is None:
            raise ValueError("--judge: the judge's reply to MT-Bench's request for a judgement is empty")
        grade = score(text)
        return [
            f"the judge's first MT-Bench judgement has no score as [[5]]: {text[:80]!r}"
            if grade is None
            else f"the judge's first MT-Bench score is {grade:g}"
        ]

    def requests(
        self, items: Sequence[Item], responses: Mapping[str, Responses], judge: EvaluationJudge
    ) -> tuple[dict[str, Any], list[Request]]:
        """Two judgements per question, by turn."""
        prompts = self._files.prompts
        return DECODING, [
            Request(
                f"the judgement of turn {turn} of question {item.id}",
                grading(prompts[prompt_name(item, turn)], item, responses[item.id].turns),
            )
            for item in items
            for turn in (1, 2)
        ]

    def evaluate(
        self,
        model: str,
        items: Sequence[Item],
        responses: Mapping[str, Responses],
        judge: EvaluationJudge | None,
        folder: Path,
    ) -> Result:
        assert judge is not None
        notes = list(self._files.notes)
        graded_turns = [(item, turn) for item in items for turn in (1, 2)]
        names = [prompt_name(item, turn) for item, turn in graded_turns]
        decoding, requests = self.requests(items, responses, judge)
        texts = judge.ask(self.name, decoding, requests, written_text, f"{model}: MT-Bench")
        judgements = [
            Judgement(item.id, item.category, turn, None if text is None else score(text))
            for (item, turn), text in zip(graded_turns, texts, strict=True)
        ]
        write_jsonl(folder / "model_answer.jsonl", (_answer_row(model, responses[item.id]) for item in items))
        write_jsonl(
            folder / "judgments.jsonl",
            (
                _judgement_row(model, (str(judge.identity["model"]), name), judgement, request, text)
                for name, judgement, request, text in zip(names, judgements, requests, texts, strict=True)
                if text is not None
            ),
        )
        outliers = sum(judgement.score is not None and not 1 <= judgement.score <= 10 for judgement in judgements)
        if outliers:
            notes.append(f"{outliers} scores are not between 1 and 10, and count as they are")
        parts = {name: of_figure(judgements, name) for name in FIGURES}
        failures = sum(judgement.score is None for judgement in judgements)
        return Result(
            self.name,
            model,
            n=len(judgements) - failures,
            expected=len(judgements),
            figures={name: mean_score(part) for name, part in parts.items()},
            intervals={name: interval for name, part in parts.items() if (interval := score_interval(part))},
            categories=category_scores(judgements),
            average_length=fmean(len(turn) for item in items for turn in responses[item.id].turns),
            parse_failures=failures,
            notes=notes,
        )


def spread(questions: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """``limit`` questions in their order, chosen as the first of each category, then the second, and so on. 0: all."""
    rounds: Counter[str] = Counter()
    places = []
    for place, row in enumerate(questions):
        places.append((rounds[row["category"]], place))
        rounds[row["category"]] += 1
    return [questions[place] for place in sorted(place for _, place in sorted(places)[: limit or None])]


def _fastchat() -> Any:
    return upstream("mt_bench", "fastchat.llm_judge.common")


def prompt_name(item: Item, turn: int) -> str:
    """The name of the judge prompt, chosen as make_judge_single in fastchat.llm_judge.gen_judgment does."""
    return f"single{'-math' if item.facts['reference'] else ''}-v1{'-multi-turn' if turn == 2 else ''}"


def grading(prompt: Mapping[str, Any], item: Item, turns: Sequence[str]) -> Messages:
    """The judge's prompt, as in run_judge_single of fastchat.llm_judge.common. Turn 1 uses question, answer and ref_answer_1;
    turn 2 uses both of each."""
    texts = {"question": item.turns[0], "answer": turns[0]}
    for name, pair in (("question", item.turns), ("answer", turns), ("ref_answer", item.facts["reference"])):
        texts |= {f"{name}_{turn}": text for turn, text in enumerate(pair, start=1)}
    return [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**texts)},
    ]


def score(text: str) -> float | None:
    """The first [[n]] in a judgement, else the first [n]; None if it has neither."""
    common = _fastchat()
    match = common.one_score_pattern.search(text) or common.one_score_pattern_backup.search(text)
    return float(match[1]) if match else None


def of_figure(judgements: Sequence[Judgement], name: str) -> list[Judgement]:
    """The judgements behind a figure: those of turn_1 or turn_2, or all for the average."""
    return [judgement for judgement in judgements if name in (f"turn_{judgement.turn}", "average")]


def mean_score(judgements: Sequence[Judgement]) -> float | None:
    """Mean of the scores, as in display_result_single of fastchat.llm_judge.show_result; None if no judgement has one."""
    scores = [judgement.score for judgement in judgements if judgement.score is not None]
    return fmean(scores) if scores else None


def score_interval(judgements: Sequence[Judgement]) -> tuple[float, float] | None:
    """95% bootstrap interval of the mean over questions of their mean scores. The judgements of a question are not independent,
    so they are resampled together. None if no judgement has a score."""
    means = _means(judgements, lambda judgement: judgement.question)
    return bootstrap_interval(list(means.values()), seed=0, draws=2000, level=0.95) if means else None


def category_scores(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Mean score over both turns, by category."""
    return _means(judgements, lambda judgement: judgement.category)


def _means(judgements: Sequence[Judgement], key: Callable[[Judgement], str]) -> dict[str, float]:
    groups: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        groups.setdefault(key(judgement), []).append(judgement)
    return {name: mean for name, group in groups.items() if (mean := mean_score(group)) is not None}


def _answer_row(model: str, responses: Responses) -> dict[str, Any]:
    """A row of FastChat's model answers."""
    return {
        "question_id": int(responses.id),
        "answer_id": content_key(model, responses.id, responses.turns),
        "model_id": model,
        "choices": [{"index": 0, "turns": list(responses.turns)}],
        "tstamp": time.time(),
    }


def _judgement_row(
    model: str, judge: tuple[str, str], judgement: Judgement, request: Request, text: str
) -> dict[str, Any]:
    """A row of FastChat's single-answer judgements; a score of -1 means none. judge: model and prompt."""
    return {
        "question_id": int(judgement.question),
        "model": model,
        "judge": list(judge),
        "user_prompt": request.messages[-1]["content"],
        "judgment": text,
        "score": -1 if judgement.score is None else judgement.score,
        "turn": judgement.turn,
        "tstamp": time.time(),
    }
