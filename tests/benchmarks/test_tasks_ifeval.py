"""IFEval's verdicts on responses that can be judged by eye, and what its figures make of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

from openrlhf_sgpo.benchmarks.benchmark_files import content_hash
from openrlhf_sgpo.benchmarks.task import Responses
from openrlhf_sgpo.benchmarks.tasks import get
from openrlhf_sgpo.benchmarks.tasks import ifeval as module
from openrlhf_sgpo.benchmarks.tasks.ifeval import FIELDS, HUB_DIGEST, NEED_PUNKT, IFEval, IFEvalSettings

pytest.importorskip("eval_framework", reason="llm-eval-framework, which has the checkers, is not installed")
import nltk
from eval_framework.tasks.ifeval import instructions_util
from eval_framework.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

ENGLISH = "this is a sentence in plain english that nobody would take for anything else"
GERMAN = "Das ist ein Satz in deutscher Sprache, den niemand für etwas anderes halten wird."
# Instruction, its arguments, response, strict, loose.
CASES = [
    ("punctuation:no_comma", {}, "No pause here.", True, True),
    ("punctuation:no_comma", {}, "Well, no.", False, False),
    ("punctuation:no_comma", {}, "Sure, here it is:\nno pause", False, True),
    ("punctuation:no_comma", {}, "no pause\nAt your service, always", False, True),
    ("punctuation:no_comma", {}, "Sure, gladly:\nno pause\nYours, as ever", False, True),
    ("punctuation:no_comma", {}, "", False, False),
    ("punctuation:no_comma", {}, " \n ", False, False),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "one two three", True, True),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "one two", False, False),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 3}, "one two", True, True),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 3}, "one two three", False, False),
    (
        "length_constraints:number_words",
        {"relation": "less than", "num_words": 3},
        "Here you are:\none two",
        False,
        True,
    ),
    (
        "length_constraints:number_sentences",
        {"relation": "at least", "num_sentences": 2},
        "It is. So it is.",
        True,
        True,
    ),
    ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2}, "It is so", False, False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "first\n***\nsecond", True, True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "only one", False, False),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "It began.\n\nThen it went on.",
        True,
        True,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "It began.\n\nLater it went on.",
        False,
        False,
    ),
    ("detectable_format:json_format", {}, '{"fruit": "pear"}', True, True),
    ("detectable_format:json_format", {}, '```json\n{"fruit": "pear"}\n```', True, True),
    ("detectable_format:json_format", {}, "fruit: pear", False, False),
    ("detectable_format:json_format", {}, 'In JSON:\n{"fruit": "pear"}', False, True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", True, True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one", False, False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", True, True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and two", False, False),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1\na\nPart 2\nb",
        True,
        True,
    ),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}, "Part 1\na", False, False),
    ("detectable_format:constrained_response", {}, "My answer is yes.", True, True),
    ("detectable_format:constrained_response", {}, "It may be.", False, False),
    ("detectable_format:title", {}, "<<A title>>\nand a text", True, True),
    ("detectable_format:title", {}, "A title\nand a text", False, False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Goodbye.\nP.S. and thanks", True, True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Goodbye and thanks", False, False),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [place]", True, True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of a place", False, False),
    ("keywords:existence", {"keywords": ["pear", "plum"]}, "A pear and a plum.", True, True),
    ("keywords:existence", {"keywords": ["pear", "plum"]}, "A pear.", False, False),
    ("keywords:forbidden_words", {"forbidden_words": ["pear"]}, "A plum.", True, True),
    ("keywords:forbidden_words", {"forbidden_words": ["pear"]}, "A pear.", False, False),
    ("keywords:frequency", {"keyword": "pear", "frequency": 2, "relation": "at least"}, "pear by pear", True, True),
    ("keywords:frequency", {"keyword": "pear", "frequency": 2, "relation": "at least"}, "one pear", False, False),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": "less than"}, "see", True, True),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 2, "let_relation": "less than"},
        "see",
        False,
        False,
    ),
    ("change_case:english_lowercase", {}, ENGLISH, True, True),
    ("change_case:english_lowercase", {}, ENGLISH.capitalize(), False, False),
    ("change_case:english_lowercase", {}, f"Sure:\n{ENGLISH}", False, True),
    ("change_case:english_capital", {}, ENGLISH.upper(), True, True),
    ("change_case:english_capital", {}, ENGLISH, False, False),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "VERY GOOD indeed",
        True,
        True,
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "VERY good indeed",
        False,
        False,
    ),
    ("combination:two_responses", {}, "a pear\n******\na plum", True, True),
    ("combination:two_responses", {}, "a pear", False, False),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a fruit."}, "Name a fruit. A pear.", True, True),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a fruit."}, "A pear.", False, False),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a fruit."}, "Gladly!\nName a fruit. A pear.", False, True),
    ("startend:end_checker", {"end_phrase": "That is all."}, "A pear. That is all.", True, True),
    ("startend:end_checker", {"end_phrase": "That is all."}, "A pear.", False, False),
    ("startend:end_checker", {"end_phrase": "That is all."}, "A pear. That is all.\nAnything else?", False, True),
    ("startend:quotation", {}, '"A pear."', True, True),
    ("startend:quotation", {}, "A pear.", False, False),
    ("startend:quotation", {}, '**"A pear."**', False, True),
    ("language:response_language", {"language": "de"}, GERMAN, True, True),
    ("language:response_language", {"language": "de"}, ENGLISH, False, False),
]


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """A model that has learnt nothing: sentences end at full stops."""
    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (folder / name).write_text("")
    forget_punkt()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    yield
    forget_punkt()


@pytest.fixture
def no_punkt(monkeypatch):
    forget_punkt()
    monkeypatch.setattr(nltk.data, "path", [])


def forget_punkt():
    instructions_util._get_sentence_tokenizer.cache_clear()
    nltk.tokenize._get_punkt_tokenizer.cache_clear()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def task_of(tmp_path, prompts, **settings):
    """A task whose prompts have these (instruction, arguments) each."""
    rows = [
        {
            "key": key,
            "prompt": f"prompt {key}",
            "instruction_id_list": [name for name, _ in instructions],
            "kwargs": [arguments for _, arguments in instructions],
        }
        for key, instructions in enumerate(prompts, start=1)
    ]
    return IFEval(IFEvalSettings(write(tmp_path / "input_data.jsonl", rows), unverified=True, **settings))


def result_of(task, texts, folder):
    items = task.items()
    responses = {item.id: Responses(item.id, (text,)) for item, text in zip(items, texts, strict=True)}
    return task.evaluate("model", items, responses, None, folder)


def verdicts(folder, mode):
    rows = (folder / f"eval_results_{mode}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["follow_instruction_list"] for row in rows]


def published_rows():
    path = module.locate("ifeval.file", "", module.HUB, module.PACKAGE)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_verdicts_that_can_be_seen_by_eye(tmp_path, punkt):
    task = task_of(tmp_path, [[(name, arguments)] for name, arguments, *_ in CASES])
    result_of(task, [text for _, _, text, _, _ in CASES], tmp_path / "out")
    for mode, column in (("strict", 3), ("loose", 4)):
        followed = verdicts(tmp_path / "out", mode)
        wrong = [case for case, verdict in zip(CASES, followed, strict=True) if verdict != [case[column]]]
        assert not wrong, mode
    tried = {(case[0], case[3]) for case in CASES}
    assert tried == {(name, followed) for name in module_instructions() for followed in (True, False)}


def module_instructions():
    return {name for row in published_rows() for name in row["instruction_id_list"]}


def test_another_package_with_googles_checkers_agrees(tmp_path, punkt):
    common = pytest.importorskip("if_verifiable.common", reason="if-verifiable is not installed")
    from if_verifiable.ifeval import instructions_util as their_util
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT as THEIRS

    their_util._get_sentence_tokenizer.cache_clear()
    cases = [case for case in CASES if case[2].strip()]  # of an empty response it says nothing
    for name, arguments, text, strict, loose in cases:
        ((verdict,), _) = common.evaluate_instructions(text, [name], [arguments], "prompt", THEIRS)
        assert (verdict.strict_pass, verdict.loose_pass) == (strict, loose), (name, text)
    their_util._get_sentence_tokenizer.cache_clear()


@pytest.mark.slow
def test_the_language_of_a_short_text_does_not_change_from_call_to_call(tmp_path, monkeypatch):
    import langdetect

    text = "MENU BRAND TEN"
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", None)
    assert len({langdetect.detect(text) == "en" for _ in range(40)}) == 2, "it would"
    task = task_of(tmp_path, [[("change_case:english_capital", {})]] * 12)
    result_of(task, [text] * 12, tmp_path / "out")
    assert len({verdict for (verdict,) in verdicts(tmp_path / "out", "strict")}) == 1


def test_a_sign_that_upstream_takes_for_a_random_letter_has_one_verdict(tmp_path):
    arguments = {"letter": "#", "let_frequency": 4, "let_relation": "at least"}
    checker = INSTRUCTION_DICT["keywords:letter_frequency"]("keywords:letter_frequency")
    letters = set()
    for _ in range(100):
        checker.build_description(**arguments)
        letters.add(checker.get_instruction_args()["letter"])
    assert len(letters) > 5 and "#" not in letters, "it would not"
    half = "".join(sorted(letters)[::2]) * 4
    task = task_of(tmp_path, [[("keywords:letter_frequency", arguments)]] * 20)
    items = task.items()
    state = random.getstate()
    responses = {item.id: Responses(item.id, (half,)) for item in items}
    task.evaluate("model", items, responses, None, tmp_path / "out")
    assert len({verdict for mode in ("strict", "loose") for (verdict,) in verdicts(tmp_path / "out", mode)}) == 1
    assert random.getstate() == state, "other draws of the process are not disturbed"


def test_figures_by_hand(tmp_path):
    comma, words = (
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"relation": "less than", "num_words": 4}),
    )
    task = task_of(tmp_path, [[comma, words], [comma, words, ("detectable_format:title", {})]])
    # The first prompt is followed altogether. Of the second's instructions one is, and without its first line two are.
    result = result_of(task, ["no pause", "Well, here they are:\ntwo words, three"], tmp_path / "out")
    assert verdicts(tmp_path / "out", "strict") == [[True, True], [False, False, False]]
    assert verdicts(tmp_path / "out", "loose") == [[True, True], [False, True, False]]
    assert result.figures == {
        "prompt_strict": 50.0,
        "instruction_strict": 40.0,
        "prompt_loose": 50.0,
        "instruction_loose": pytest.approx(60.0),
    }
    # Two values that are d on either side of their mean have the standard error d. Prompts: 100 and 0. Instructions, loose:
    # 60 + (200 - 2 * 60) / 2.5 = 92 and 60 + (100 - 3 * 60) / 2.5 = 28; strict: 40 + (200 - 2 * 40) / 2.5 = 88 and -8.
    assert result.errors == pytest.approx(
        {"prompt_strict": 50, "instruction_strict": 48, "prompt_loose": 50, "instruction_loose": 32}
    )
    assert result.categories == {"detectable_format": 0.0, "length_constraints": 50.0, "punctuation": 50.0}
    assert (result.n, result.expected, result.parse_failures, result.judge) == (2, 2, 0, None)
    assert result.average_length == fmean([len("no pause"), len("Well, here they are:\ntwo words, three")])


def test_one_prompt_has_figures_and_no_errors(tmp_path):
    result = result_of(task_of(tmp_path, [[("punctuation:no_comma", {})]]), ["none"], tmp_path / "out")
    assert set(result.figures.values()) == {100.0} and result.errors == {}


def test_the_published_prompts(punkt):
    items = IFEval(IFEvalSettings()).items()
    assert len(items) == len({item.id for item in items}) == 541
    counts = Counter(name for item in items for name in item.facts["instructions"])
    assert (len(counts), counts.total()) == (25, 834)  # 25 types: Table 1 of the paper
    assert {item.temperature for item in items} == {0.0}
    assert get("ifeval") is IFEval and not IFEval.judged


def test_the_hubs_older_prompt_is_taken_and_noted_and_another_change_is_not(tmp_path, punkt):
    rows = published_rows()
    (changed,) = [row for row in rows if row["key"] == 2785]
    changed["prompt"] = changed["prompt"].replace("at least 3 placeholders", "at least one placeholder")
    assert content_hash(rows, FIELDS) == HUB_DIGEST
    task = IFEval(IFEvalSettings(write(tmp_path / "hub.jsonl", rows), limit=1))
    assert len(task.items()) == 1
    (note,) = result_of(task, ["text"], tmp_path / "out").notes
    assert "2785" in note
    changed["kwargs"][1]["num_placeholders"] = 1
    path = write(tmp_path / "other.jsonl", rows)
    with pytest.raises(ValueError, match=r"--ifeval\.file: .*not the published file.*--ifeval\.unverified"):
        IFEval(IFEvalSettings(path)).items()
    task = IFEval(IFEvalSettings(path, limit=1, unverified=True))
    (note,) = result_of(task, ["text"], tmp_path / "out").notes
    assert "not the published file" in note


def test_what_cannot_be_checked_without_nltks_model_is_an_error_before_anybody_answers(tmp_path, no_punkt):
    failed, prompts = set(), 0
    for row in published_rows():
        unchecked = False
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            checker = INSTRUCTION_DICT[name](name)
            checker.build_description(**arguments)
            try:
                checker.check_following("Some text. And MORE of it.")
            except LookupError:
                failed.add(name)
                unchecked = True
        prompts += unchecked
    assert failed == set(NEED_PUNKT)
    with pytest.raises(ValueError, match=rf"--tasks ifeval: {prompts} prompts .*punkt_tab.*nltk\.downloader punkt_tab"):
        IFEval(IFEvalSettings()).items()
    other = task_of(tmp_path, [[("punctuation:no_comma", {})]])
    assert len(other.items()) == 1


@pytest.mark.parametrize(
    "instructions",
    [[("no:such", {})], [("punctuation:no_comma", {"unknown": 1})], [("keywords:frequency", {"relation": "about"})]],
)
def test_an_instruction_without_a_checker_is_an_error_before_anybody_answers(tmp_path, instructions):
    with pytest.raises(ValueError, match=r"--ifeval\.file: the instructions of prompt 2 cannot be checked"):
        task_of(tmp_path, [[("punctuation:no_comma", {})], instructions]).items()


def test_a_negative_limit_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"--ifeval\.limit: -1 is out of range"):
        task_of(tmp_path, [[("punctuation:no_comma", {})]], limit=-1).items()


def test_responses_of_other_tools(tmp_path):
    task = task_of(tmp_path, [[("punctuation:no_comma", {})]] * 3, limit=2)
    rows = [{"prompt": f"prompt {key}", "response": f"text {key}"} for key in (3, 1, 2)]
    read = {
        response.id: response.turns for response in task.read_responses(Path(write(tmp_path / "answers.jsonl", rows)))
    }
    assert read == {"1": ("text 1",), "2": ("text 2",)}
    for wrong, message in (
        ([*rows, {"prompt": "prompt 4", "response": ""}], r"unknown prompt \(1\): 'prompt 4'"),
        ([*rows, rows[0]], r"prompt answered twice \(1\): 'prompt 3'"),
        ([{"prompt": "prompt 1", "response": None}], "line 1: response is not text"),
        ([*rows, {"prompt": 7, "response": ""}], "line 4: prompt is not text"),
        ([{"prompt": "prompt 1"}], "no field response"),
    ):
        with pytest.raises(ValueError, match=message):
            task.read_responses(Path(write(tmp_path / "wrong.jsonl", wrong)))
