"""A file with every defect planted a known number of times: the counts are exact, and each limit stops with its flag."""

import copy
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from openrlhf_sgpo import flags
from openrlhf_sgpo.config import Config, DataLimits
from openrlhf_sgpo.data import DataError, Pair, Prompt, load_pairs
from openrlhf_sgpo.data import benchmarks as benchmarks_module
from openrlhf_sgpo.data.inspection import inspect_pairs, inspect_prompts, near_identical, repeats_prompt, unfinished
from openrlhf_sgpo.data.records import Records
from openrlhf_sgpo.data.report import quantiles, require
from openrlhf_sgpo.data.seed import flip_labels
from openrlhf_sgpo.data.tokens import ChatFormat
from openrlhf_sgpo.integrity import intact

ROOT = Path(__file__).parents[2]
MAX_LEN = 400
NONE_ALLOWED = DataLimits(**{item.name: 0.0 for item in fields(DataLimits)})
ALL_ALLOWED = DataLimits(**{item.name: 1.0 for item in fields(DataLimits)})
OPEN_END = "a story that goes on and on over many quiet hills and far beyond " * 2 + "until the very last"

# Each finding with rows that show it, and with how many of their pairs do. Rows are (prompt, chosen, rejected, more).
PLANTED = {
    "empty": [("e1", "", "No."), ("e2", "Yes.", " \n")],
    "identical": [("i1", "Same.", "Same."), ("i2", "Same.", "Same. "), ("i3", "", "")],
    "too_long": [("x" * 380, "Yes.", "No.")],
    "truncated": [
        ("t1", "y" * 500 + ".", "No."),
        ("t2", "Yes.", "n" * 500 + "."),
        ("t3", "A cut", "No.", {"chosen_truncated": True}),
        ("t4", "y" * 500, "n" * 500),
    ],
    "double_bos": [
        ("<|im_start|>user\nb1", "Yes.", "No."),
        ("b2", "<|im_start|>Yes.", "No."),
        ("<|start_header_id|>user<|end_header_id|>\n\nb3", "Yes.", "No."),  # the template of another tokenizer
    ],
    "double_eos": [("s1", "Yes.<|im_end|>", "No."), ("s2", "Yes.", "No.<|im_end|>"), ("s3<|im_end|>", "Yes.", "No.")],
    "near_identical": [
        ("n1", "Yes, it is.", "yes it is"),
        ("n2", "word " * 20 + "one.", "word " * 20 + "two."),
    ],
    "repeats_prompt": [
        ("r1: what is it?", "r1: what is it? A cat.", "r1: what is it? A dog."),
        ("r2: what  is it?", "r2: what is\nit? A cat.", "A dog."),
        ("r3", "### User: r3 ### Assistant: A cat.", "### User: r3 ### Assistant: None."),
    ],
    "duplicate": [("d1", "Yes.", "No."), ("d1 ", "Yes.", "No."), ("d1", " Yes.", "No.\n")],
    "contradictory": [("c1", "Yes.", "No."), ("c1", "No.", "Yes.")],
    "unfinished": [("u1", OPEN_END, "No."), ("u2", OPEN_END + " one", OPEN_END + " two two two two two two two")],
    "benchmark": [("Plan a trip to the moon!", "Yes.", "No."), ("plan a trip, to the MOON", "Sure.", "No.")],
    "held_out": [("held out 1", "Yes.", "No."), ("held out 1", "Yes!!", "Never."), ("held  out 2", "Yes.", "No.")],
}
# Where not every planted row shows the finding: the first of several equal rows does not, held-out prompts count once.
FEWER = {"duplicate": 2, "contradictory": 1, "held_out": 2}
COUNTS = {name: FEWER.get(name, len(rows)) for name, rows in PLANTED.items()}
HELD_OUT = ["held out 1", "held out 2", "held out 3", "held out 4"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatFormat(tokenizer, MAX_LEN)


@pytest.fixture(autouse=True)
def one_benchmark(monkeypatch):
    """A benchmark whose texts may stand here."""
    hashes = {"alpaca_eval": {benchmarks_module.prompt_hash("Plan a trip to the moon.")}, "mt_bench": frozenset()}
    monkeypatch.setattr(benchmarks_module, "benchmark_hashes", lambda: hashes)


def rows_of(names=tuple(PLANTED), sound=20):
    rows = [(f"sound {index}?", f"Yes, {index}.", "No, never.") for index in range(sound)]
    rows += [row for name in names for row in PLANTED[name]]
    return [
        {"id": f"id-{index}", "prompt": prompt, "chosen": chosen, "rejected": rejected, **dict(*more)}
        for index, (prompt, chosen, rejected, *more) in enumerate(rows)
    ]


def write(folder, rows, name="pairs.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def question(text):
    return [{"role": "user", "content": text}]


def inspected(folder, chat, rows, limits=ALL_ALLOWED):
    questions = [question(text) for text in HELD_OUT]
    return inspect_pairs(load_pairs(write(folder, rows)), chat, limits, name="--data.dataset pairs", held_out=questions)


def test_every_planted_defect_is_counted(tmp_path, chat):
    rows = rows_of()
    result = inspected(tmp_path, chat, rows)
    findings = {finding.name: finding for finding in result.report.findings}
    assert {name: finding.count for name, finding in findings.items() if finding.count} == COUNTS
    assert result.report.rows == len(rows)
    left_out = sum(findings[name].count for name in ("empty", "identical", "too_long"))
    assert result.report.kept == len(result.pairs) == len(result.groups) == len(rows) - left_out
    assert findings["truncated"].parts == {"chosen": 3, "rejected": 2}
    assert findings["unfinished"].parts == {"chosen": 2, "rejected": 1}
    assert findings["benchmark"].parts == {"alpaca_eval": 2}
    assert (findings["held_out"].of, findings["held_out"].share) == (4, 0.5)
    assert all(finding.of == len(rows) for name, finding in findings.items() if name != "held_out")
    planted = [row["id"] for row in rows if row["prompt"] in ("t1", "t2", "t3", "t4")]
    assert findings["truncated"].examples == planted


def test_what_is_kept_comes_with_its_tokens(tmp_path, chat):
    result = inspected(tmp_path, chat, rows_of())
    assert result.groups == [chat.pair(pair) for pair in result.pairs]
    assert all(len(group.prompt) + len(response) <= MAX_LEN for group in result.groups for response in group.responses)
    for pair, group in zip(result.pairs, result.groups, strict=True):
        (flipped,) = flip_labels([pair], 1.0, seed=0)
        assert result.tokens_of(pair) == group
        assert result.tokens_of(flipped) == chat.pair(flipped)
    assert result.tokens_of(replace(result.pairs[0], id="other")) is None
    assert result.tokens_of(replace(result.pairs[0], chosen="other")) is None
    assert result.tokens_of(replace(result.pairs[0], prompt=question("other"))) is None


@pytest.mark.parametrize("name", [name for name in PLANTED if name != "unfinished"])  # a guess has no limit
def test_each_limit_stops_with_its_flag_and_passes_with_it(tmp_path, chat, name):
    rows = rows_of([name])
    with pytest.raises(DataError) as caught:
        require([inspected(tmp_path, chat, rows, NONE_ALLOWED).report])
    (problem,) = caught.value.problems
    assert problem in str(caught.value)
    of = len(HELD_OUT) if name == "held_out" else len(rows)
    share = COUNTS[name] / of
    assert problem.startswith(
        f"--data.dataset pairs: {name} {COUNTS[name]} of {of} ({share:.1%}, limit 0.0%), such as id-"
    )
    flag, value = re.search(r"--data.limits.(\w+) (\S+) accepts this$", problem).groups()
    assert flag == name and float(value) < share + 0.001
    limits = flags.parse([f"--data.limits.{flag}", value], {"": Config}).instances[""].data.limits
    with pytest.raises(DataError):
        require([inspected(tmp_path, chat, rows, NONE_ALLOWED).report])
    require([inspected(tmp_path, chat, rows, replace(NONE_ALLOWED, **{name: getattr(limits, name)})).report])


def test_all_exceeded_limits_are_told_at_once(tmp_path, chat):
    with pytest.raises(DataError) as caught:
        require([inspected(tmp_path, chat, rows_of(), NONE_ALLOWED).report] * 2)
    told = [problem.partition(": ")[2].split()[0] for problem in caught.value.problems]
    assert sorted(told) == sorted([name for name in PLANTED if name != "unfinished"] * 2)


def test_sound_data_shows_nothing_and_passes(tmp_path, chat):
    result = inspected(tmp_path, chat, rows_of([]), NONE_ALLOWED)
    assert not any(finding.count for finding in result.report.findings)
    assert result.report.kept == result.report.rows == 20
    require([result.report])


def test_rows_of_a_hub_dataset_that_cannot_be_read(chat):
    pairs = Records([Pair("a", question("?"), "Yes.", "No.")] * 3, ["row 2 (missing column chosen)"])
    report = inspect_pairs(pairs, chat, DataLimits(duplicate=1.0, malformed=0.0), name="hub").report
    assert (report.rows, report.kept) == (4, 3)
    with pytest.raises(
        DataError, match=r"hub: malformed 1 of 4 \(25.0%, limit 0.0%\), such as row 2 \(missing column"
    ) as caught:
        require([report])
    assert "--data.limits.malformed 0.25 accepts this" in str(caught.value)
    prompts = Records([Prompt("a", question("?"))], ["row 1 (missing column prompt)"])
    with pytest.raises(DataError, match="hub: malformed 1 of 2"):
        require([inspect_prompts(prompts, chat, DataLimits(), name="hub", room=2).report])


def test_a_conversation_that_the_template_refuses(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        tokenizer.chat_template
    )
    chat, system = ChatFormat(strict, MAX_LEN), {"role": "system", "content": "Be brief."}
    messages = {"a": question("?"), "b": [system, *question("?")]}
    result = inspect_pairs(
        [Pair(id, conversation, "Yes.", "No.") for id, conversation in messages.items()], chat, DataLimits(), name="x"
    )
    assert [pair.id for pair in result.pairs] == ["a"]
    with pytest.raises(
        DataError, match=r"x: refused 1 of 2 .*, such as b \(.*: no system\); .*refused 0.5 accepts this"
    ):
        require([result.report])
    prompts = inspect_prompts(
        [Prompt(id, conversation) for id, conversation in messages.items()], chat, DataLimits(), name="x", room=2
    )
    assert [prompt.id for prompt in prompts.prompts] == ["a"]
    assert "refused 1 of 2" in prompts.report.problems()[0]


def test_an_end_of_turn_that_is_no_token_is_a_missing_eos(tokenizer):
    """Nothing that a model writes then stops an engine."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = tokenizer.chat_template.replace("<|im_end|>", "###")
    pairs = [Pair("a", question("?"), "Yes.", "No."), Pair("b", question("??"), "y" * 500, "n" * 500)]
    report = inspect_pairs(pairs, ChatFormat(plain, MAX_LEN), DataLimits(), name="x").report
    with pytest.raises(DataError, match="missing_eos 1 of 2 .*such as a; .*--data.limits.missing_eos 0.5 accepts this"):
        require([report])


def test_no_room_for_the_end_of_turn_alone_is_a_missing_eos(tokenizer, chat):
    pair = Pair("a", question("?"), "Yes, it is.", "No.")
    room = len(chat.prompt(pair.prompt)) + len("Yes, it is.")
    counts = {
        finding.name: finding
        for finding in inspect_pairs([pair], ChatFormat(tokenizer, room), DataLimits(), name="x").report.findings
    }
    assert (counts["missing_eos"].count, counts["truncated"].count) == (1, 0)
    assert counts["missing_eos"].parts == {"chosen": 1}


def test_a_template_that_doubles_the_begin_of_sequence(tokenizer):
    doubled = copy.deepcopy(tokenizer)
    doubled.chat_template = "{{ '<|im_start|>' }}" + tokenizer.chat_template
    pairs = [Pair("a", question("?"), "Yes.", "No.")]
    with pytest.raises(DataError, match="double_bos 1 of 1"):
        require([inspect_pairs(pairs, ChatFormat(doubled, MAX_LEN), DataLimits(), name="x").report])
    prompts = [Prompt("a", question("?"))]
    with pytest.raises(DataError, match="double_bos 1 of 1"):
        require([inspect_prompts(prompts, ChatFormat(doubled, MAX_LEN), DataLimits(), name="x", room=2).report])


def test_the_limit_can_make_responses_equal(tokenizer, chat):
    pairs = [Pair("a", question("?"), "z" * 50 + "A", "z" * 50 + "B"), Pair("b", question("?"), "Yes.", "No.")]
    short = ChatFormat(tokenizer, len(chat.prompt(question("?"))) + 40)
    result = inspect_pairs(pairs, short, DataLimits(), name="x")
    (identical,) = [finding for finding in result.report.findings if finding.name == "identical"]
    assert (identical.count, identical.parts, [pair.id for pair in result.pairs]) == (1, {"once cut": 1}, ["b"])


def test_nothing_left_is_an_error_whatever_the_limits(chat):
    report = inspect_pairs([Pair("a", question("?"), "", "No.")], chat, ALL_ALLOWED, name="x").report
    with pytest.raises(DataError, match="x: none of 1 pairs can be used"):
        require([report])


def test_prompts(chat):
    texts = {
        "a": "?",
        "b": "x" * 360,
        "c": "?",
        "d": "held out 1",
        "e": "<|im_start|>?",
        "f": "plan A trip to the Moon?!",
    }
    prompts = [Prompt(id, question(text)) for id, text in texts.items()] + [Prompt("g", question(" "))]
    held_out = [question("held out  1")]
    result = inspect_prompts(prompts, chat, NONE_ALLOWED, name="prompts", room=30, held_out=held_out)
    counts = {finding.name: finding.count for finding in result.report.findings if finding.count}
    assert counts == dict.fromkeys(["too_long", "duplicate", "held_out", "double_bos", "benchmark", "empty"], 1)
    assert [prompt.id for prompt in result.prompts] == ["a", "c", "d", "e", "f"]
    told = {problem.split()[1] for problem in result.report.problems()}
    # Held-out prompts are left out by the run.
    assert told == {"duplicate", "double_bos", "benchmark", "empty", "too_long"}


def test_a_row_or_two_of_a_small_file_are_a_note(chat):
    """The finding is a limit's only from three rows on, or from half of the rows."""

    def report(bad, sound, limits=None):
        pairs = [Pair(f"b{n}", question(f"<|im_start|>{n}"), "Yes.", "No.") for n in range(bad)]
        pairs += [Pair(f"s{n}", question(str(n)), "Yes.", "No.") for n in range(sound)]
        return inspect_pairs(pairs, chat, limits or DataLimits(), name="x").report

    for bad in (1, 2):
        require([report(bad, 24 - bad)])
        share = f"{bad / 24:.1%}"
        assert f"note: double_bos {bad} of 24 ({share}); give plain messages" in report(bad, 24 - bad).text()
    for bad, sound, limits in ((3, 21, None), (1, 1, None), (1, 23, DataLimits(double_bos=0.0))):
        with pytest.raises(DataError, match=f"double_bos {bad} of {bad + sound}"):
            require([report(bad, sound, limits)])


def test_many_prompts_that_are_too_long_are_a_note(chat):
    """A quarter of UltraFeedback's leave no room for an answer at the default length; what is left is worth a run."""
    prompts = [Prompt(str(n), question(str(n) + "x" * (390 if n < 3 else 0))) for n in range(10)]
    report = inspect_prompts(prompts, chat, DataLimits(), name="x", room=30).report
    require([report])
    assert "note: too_long 3 of 10 (30.0%); raise --data.max_len" in report.text()


@pytest.mark.parametrize(
    ("asked", "chosen", "rejected", "expected"),
    [
        ("Why?", "Why? Because.", "Why? No.", ["chosen", "rejected"]),
        ("Why?", "\n Why?  Because.", "No.", ["chosen"]),
        ("Why?", "Because. Why? No.", "No.", []),
        ("Why so?", "Why, so it is.", "Why so, it is.", []),
        ("Why?", "[INST] Why? [/INST] Because.", "[INST] Why? [/INST] No.", ["chosen", "rejected"]),
        ("Why?", "[INST] Why? [/INST] Because.", "No.", []),
    ],
)
def test_repeats_prompt(asked, chosen, rejected, expected):
    assert repeats_prompt(Pair("a", question(asked), chosen, rejected)) == expected


def test_pairs_that_only_evaluate_may_be_a_benchmarks(chat):
    pairs = [Pair("a", question("Plan a trip to the moon."), "Yes.", "No.")]
    assert inspect_pairs(pairs, chat, DataLimits(), name="x").report.problems()
    report = inspect_pairs(pairs, chat, DataLimits(), name="x", trained_on=False).report
    assert not report.problems() and "alpaca_eval 1" in report.text()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("Yes!", " yes", True),
        ("a_b", "ab", True),
        ("!!!", "???", False),
        ("42", "43", False),
        ("one two", "two one", True),
        (" ".join(map(str, range(20))), " ".join(map(str, range(1, 21))), True),  # 19 of 20 words
        (" ".join(map(str, range(19))), " ".join(map(str, range(1, 20))), False),  # 18 of 19
        ("word " * 100, "word " * 80, False),
        ("", "", False),
        ("word-" * 100, "word" * 100, True),  # beginnings of different length
        ("-" * 200 + "word", "word", True),
        ("-" * 200 + "word", "work", False),
        ("Stra\u00dfe " * 50, "STRASSE" * 50, True),
    ],
)
def test_near_identical(first, second, expected):
    assert near_identical(first, second) == near_identical(second, first) == expected


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (" and then they went", True),
        (" and then they went,", True),
        (" and then they went.", False),
        (" and then they went!)", False),
        (" is 4 x 10 or 40", False),
        ("\n\nSincerely,\nAda", False),
        ("\n- a list of things that has no full stop", False),
        ("\n3. a list of things that has no full stop", False),
    ],
)
def test_unfinished(ending, expected):
    assert unfinished("word " * 20 + "word" + ending) == expected
    assert not unfinished("it is short and open")


def test_quantiles():
    assert quantiles(range(1, 101)) == {"5%": 5, "50%": 50, "95%": 95, "max": 100}
    assert quantiles([7]) == {"5%": 7, "50%": 7, "95%": 7, "max": 7}


def test_lengths(chat):
    pairs = [
        Pair("a", question("?"), "Yes.", "No."),
        Pair("b", question("?"), "y" * 500, "No"),
        Pair("c", question("?"), "A", "B"),
    ]
    report = inspect_pairs(pairs, chat, ALL_ALLOWED, name="x").report
    prompt = len(chat.prompt(question("?")))
    assert report.lengths["chosen"] == {"5%": 2, "50%": 5, "95%": 501, "max": 501}
    assert report.lengths["needed"]["max"] == prompt + 501
    assert report.longer == pytest.approx({"chosen": 2 / 3, "equal": 1 / 3})


def test_labels(chat):
    pairs = [
        Pair("a", question("?"), "Yes.", "No.", weight=0.0),
        Pair("b", question("?"), "Yes, sir.", "No.", weight=3.0, chosen_probability=0.6),
        Pair("c", question("?"), "", "No.", chosen_probability=0.0),
    ]
    report = inspect_pairs(pairs, chat, ALL_ALLOWED, name="x").report
    expected = {"weight": {"min": 0, "mean": 1.5, "max": 3}, "chosen_probability": {"min": 0.6, "mean": 0.8, "max": 1}}
    assert report.labels == report.to_dict()["labels"] == expected
    assert report.text().splitlines()[-2:] == [
        "  weight from 0 to 3, mean 1.5",
        "  chosen_probability from 0.6 to 1, mean 0.8",
    ]
    assert "weight" not in inspect_pairs(pairs[2:], chat, ALL_ALLOWED, name="x").report.text()


def test_the_report_as_text_and_as_json(tmp_path, chat):
    report = inspected(tmp_path, chat, rows_of(), DataLimits()).report
    lines = report.text().splitlines()
    assert lines[0] == f"--data.dataset pairs: {report.rows} pairs, {report.kept} kept"
    for name, count in COUNTS.items():
        (line,) = [line for line in lines if line.split()[0] == name]
        assert line.split()[1] == str(count)
    assert "none: malformed, refused, missing_eos" in report.text()
    assert max(map(len, lines)) <= 120
    row = json.loads(json.dumps(report.to_dict()))
    assert {finding["name"]: finding["count"] for finding in row["findings"] if finding["count"]} == COUNTS
    assert row["findings"][0].keys() == {"name", "count", "of", "limit", "examples", "parts", "share"}
    assert intact(row) and not intact(row | {"kept": row["kept"] + 1})


def test_the_page_lists_every_finding_with_its_limit():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for item in fields(DataLimits):
        (row,) = re.findall(rf"^\| `{item.name}` \|.*$", page, re.MULTILINE)
        assert row.split("|")[-2].strip() == f"{item.default:g}"
    assert "| `unfinished` |" in page
