"""Reading pairs and prompts in every accepted shape, every reason for refusing a row, and rows read back as written."""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from data_rows import GOOD, QUESTION, TALK, said, without, write
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openrlhf_sgpo.data import DataError, Pair, Prompt, load_pairs, load_prompts
from openrlhf_sgpo.data.inspection import repeats_prompt
from openrlhf_sgpo.data.records import load_run_pairs
from openrlhf_sgpo.run_folder import write_jsonl

HH_TALK = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Why?", "chosen": "yes", "rejected": "no"}, QUESTION),
        ({"prompt": QUESTION, "chosen": said("yes"), "rejected": said("no")}, QUESTION),
        ({"prompt": TALK, "chosen": "yes", "rejected": said("no")}, TALK),
        ({"prompt": "Why?", "chosen": QUESTION + said("yes"), "rejected": QUESTION + said("no")}, QUESTION),
        ({"prompt": TALK, "chosen": TALK + said("yes"), "rejected": said("no")}, TALK),
        ({"chosen": TALK + said("yes"), "rejected": TALK + said("no")}, TALK),
        ({"prompt": None, "chosen": QUESTION + said("yes"), "rejected": QUESTION + said("no")}, QUESTION),
        ({"prompt": "Why?", "chosen": TALK + said("yes"), "rejected": TALK + said("no")}, TALK),
        ({"chosen": "Why? yes", "rejected": "Why? no"}, QUESTION),
        ({"chosen": f"{HH_TALK} yes", "rejected": f"{HH_TALK} no"}, TALK[1:]),
        ({"prompt": HH_TALK, "chosen": "yes", "rejected": "no"}, TALK[1:]),
        ({"prompt": HH_TALK, "chosen": f"{HH_TALK} yes", "rejected": f"{HH_TALK} no"}, TALK[1:]),
        ({"prompt": HH_TALK[:-12], "chosen": f"{HH_TALK} yes", "rejected": "no"}, TALK[1:]),
        ({"prompt": TALK[1:], "chosen": f"{HH_TALK} yes", "rejected": f"{HH_TALK} no"}, TALK[1:]),
        ({"prompt": "Why?", "chosen": f"{HH_TALK} yes", "rejected": f"{HH_TALK} no"}, TALK[1:]),
        (
            {"prompt": "Human: Why?"}
            | {name: f"Human: Why?\n\nAssistant: {said}" for name, said in (("chosen", "yes"), ("rejected", "no"))},
            QUESTION,
        ),
        ({"prompt": TALK[1:], "chosen": TALK + said("yes"), "rejected": TALK + said("no")}, TALK),
        ({"prompt": TALK, "chosen": TALK[1:] + said("yes"), "rejected": "no"}, TALK),
        ({"system": "Be brief.", "prompt": TALK[1:], "chosen": "yes", "rejected": "no"}, TALK),
        ({"system": "Be brief. ", "prompt": TALK, "chosen": "yes", "rejected": "no"}, TALK),
        ({"system": "Be brief.", "chosen": f"{HH_TALK} yes", "rejected": f"{HH_TALK} no"}, TALK),
        ({"system": " ", "system_prompt": None, "prompt": "Why?", "chosen": "yes", "rejected": "no"}, QUESTION),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?", "image": None}]}]}
            | {"chosen": "yes", "rejected": "no", "images": [], "tools": None, "history": None},
            QUESTION,
        ),
    ],
    ids=[
        *("strings", "messages", "mixed", "chosen repeats", "only chosen repeats", "implicit", "implicit by null"),
        *("prompt is the last question", "implicit strings", "Anthropic's dialogues", "Anthropic's prompt"),
        *("dialogues repeat a dialogue", "one repeats an open dialogue", "dialogues repeat messages"),
        *("prompt is the dialogue's last question", "dialogues of one turn", "responses have a system message"),
        "prompt has a system message",
        *("system", "system twice", "system of an implicit prompt", "empty system", "parts of text and nulls"),
    ],
)
def test_accepted_shapes(tmp_path, row, prompt):
    assert load_pairs(str(write(tmp_path, row))) == [Pair(id="row-0", prompt=prompt, chosen="yes", rejected="no")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", "blue.", "green.")),  # the example of TRL's pages
        ("The sky is blue.", "The sky is black.", ("The sky is", "blue.", "black.")),  # TRL would cut at "bl"
        ("1 + 1 = 2", "1 + 1 = 2 or 3", ("1 + 1 = 2", "", "or 3")),
        ("Q: a?\nA: b", "Q: a?\nC", ("Q: a?", "A: b", "C")),
        ("the same", "the same", ("the same", "", "")),
    ],
)
def test_the_prompt_of_two_texts_is_their_common_beginning(tmp_path, chosen, rejected, expected):
    (pair,) = load_pairs(str(write(tmp_path, {"chosen": chosen, "rejected": rejected})))
    assert (pair.prompt[0]["content"], pair.chosen, pair.rejected) == expected


def test_anthropic_dialogues_keep_their_empty_and_equal_answers(tmp_path):
    """Published rows have them: the report counts them, the loader does not stop at them."""
    rows = [{"chosen": f"{HH_TALK} yes", "rejected": HH_TALK}, {"chosen": f"{HH_TALK} a", "rejected": f"{HH_TALK} a"}]
    first, second = load_pairs(str(write(tmp_path, *rows)))
    assert (first.chosen, first.rejected, first.prompt) == ("yes", "", TALK[1:])
    assert (second.chosen, second.rejected, second.prompt) == ("a", "a", TALK[1:])


def test_keys_of_a_message_that_say_nothing_are_dropped(tmp_path):
    row = without(prompt=[{"role": "user", "content": "Why?", "weight": 1, "name": None, "tool_calls": []}])
    (pair,) = load_pairs(str(write(tmp_path, row)))
    assert pair.prompt == QUESTION


def as_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(path, rows):
    pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(path)


def test_texts_that_are_no_lists_of_messages_are_texts(tmp_path):
    for text in (
        *(
            '{"a": 1}',
            '[{"name": "Ada", "role": "user"}]',
            "[1, 2]",
            "{'role': 'user'}",
            '[{"value": 3, "from": "here"}]',
        ),
        *("Use [{'role': 'user', 'content': 'x'}]", "[{'role': 'user', 'content': 'x'}] is how it looks"),
        '{"content": "x", "type": "y"}',
    ):
        (pair,) = load_pairs(str(write(tmp_path, without(chosen=text))))
        assert pair.chosen == text


def test_columns_about_a_row_are_no_prompt(tmp_path):
    more = {"id": "a row of some words", "source": "the web", "score_chosen": 3.0, "model": "gpt 4", "question": None}
    (pair,) = load_pairs(str(write(tmp_path, {"chosen": "Why? yes", "rejected": "Why? no"} | more)))
    assert (pair.prompt, pair.chosen) == (QUESTION, "yes")
    (pair,) = load_pairs(
        str(write(tmp_path, GOOD | {"question": "Why is that so?", "messages": QUESTION + said("So.")}))
    )
    assert pair.prompt == QUESTION
    dialogues = {"chosen": f"{HH_TALK} yes", "rejected": f"{HH_TALK} no", "context": "Chat about a lot of things"}
    assert load_pairs(str(write(tmp_path, dialogues)))[0].prompt == TALK[1:]


def test_a_response_that_is_a_dialogue_of_its_own_stays_whole(tmp_path):
    written = "Human: Knock, knock.\n\nAssistant: Who is there?"
    (pair,) = load_pairs(str(write(tmp_path, {"prompt": "Write a dialogue.", "chosen": written, "rejected": "No."})))
    assert (pair.prompt[0]["content"], pair.chosen) == ("Write a dialogue.", written)


def test_rows_without_an_id_are_named_by_position(tmp_path, datasets):
    rows = [without("id"), without(id=7), without(id="seven"), without("id")]
    expected = ["row-0", "7", "seven", "row-3"]
    assert [pair.id for pair in load_pairs(str(write(tmp_path, *rows)))] == expected
    # A table fills what a row lacks with null, which is no name: prompts of that name would be taken for one.
    for row in rows:
        row["id"] = str(row["id"]) if "id" in row else None
    path = tmp_path / "rows.parquet"
    as_parquet(path, rows)
    assert [pair.id for pair in load_pairs(str(path))] == expected
    assert [prompt.id for prompt in load_prompts(str(path))] == expected


# Each row that must be refused, with what its message must say beside file and line.
REFUSED = [
    (b'{"prompt": "\xff"}', ["not UTF-8", "byte 12", "convert the file"]),
    (b'{"prompt":', ["not JSON", "column 11"]),
    (["a", "list"], ["expected an object, found list"]),
    ("text", ["expected an object, found str"]),
    ({}, ["missing column chosen and rejected", "found nothing"]),
    (without("chosen"), ["missing column chosen;", "found id, prompt, rejected"]),
    (without(rejected=None), ["missing column rejected;"]),
    (without("prompt"), ["missing column prompt", "do not share their beginning", "found chosen, id, rejected"]),
    (
        {"chosen": QUESTION + said("yes"), "rejected": TALK + said("no")},
        ["missing column prompt", "do not share the messages before the last one"],
    ),
    (without(prompt=5), ["column 'prompt'", "non-empty string or a list of {role, content} messages"]),
    (without(prompt="  \n"), ["column 'prompt'", "non-empty string"]),
    (without(prompt=[]), ["column 'prompt'", "list of {role, content} messages"]),
    (without(prompt=["Why?"]), ["column 'prompt'", "{role, content}"]),
    (without(prompt=[{"content": "Why?"}]), ["column 'prompt'", "{role, content}"]),
    (
        without(prompt=[{"role": "user", "content": None}]),
        ["column 'prompt', message 1", "{role, content}", "found null"],
    ),
    (without(prompt=[{"role": "human", "content": "Why?"}]), ["has the role 'human', none of system,", "write 'user'"]),
    (without(chosen=[{"role": "gpt", "content": "So."}]), ["column 'chosen', message 1", "write 'assistant'"]),
    (without(prompt=[{"role": "User", "content": "Why?"}]), ["has the role 'User'", "write 'user'"]),
    (
        {"prompt": None, "chosen": "Well, yes", "rejected": "Well, no"},
        ["column prompt is null; fill it, or remove it"],
    ),
    (
        {name: TALK[:1] + said(text) for name, text in (("chosen", "yes"), ("rejected", "no"))},
        ["missing column prompt, and no message but the system's precedes the response"],
    ),
    (without(prompt=[{"role": "narrator", "content": "Why?"}]), ["has the role 'narrator', none of system, user,"]),
    (without(prompt=[{"from": "human", "value": "Why?"}]), ["has 'from' and 'value'; expected {role, content}"]),
    (
        without(prompt=[{"role": "user", "content": [{"type": "image_url", "image_url": "x.png"}]}]),
        ["message 1 has a part of kind 'image_url'; only text"],
    ),
    (
        without(prompt=QUESTION + [{"role": "assistant", "content": "", "function_call": {"name": "f"}}] + QUESTION),
        ["message 2 has the field 'function_call'; rename it to 'tool_calls'"],
    ),
    (
        without(chosen=[{"role": "assistant", "content": "So.", "reasoning_content": "Hm."}]),
        ["response in column 'chosen' has reasoning_content"],
    ),
    (without(tools="clock"), ["column 'tools' is not JSON"]),
    (without(tools=[1]), ["column 'tools' must be a list of objects"]),
    (without(tools={"name": "clock"}), ["column 'tools' must be a list of objects"]),
    (without(chat_template_kwargs=[1]), ["column 'chat_template_kwargs' must be an object"]),
    (without(chat_template_kwargs={"tokenize": True}), ["column 'chat_template_kwargs' may not set tokenize"]),
    (
        {"prompt": "Why?", "chosen": TALK + said("yes"), "rejected": [*QUESTION, *TALK[1:], *said("no")]},
        ["messages of column 'rejected' before the response differ from those of column 'prompt'"],
    ),
    *(
        (without(chosen=text), ["column 'chosen' holds messages written as text; write the list itself"])
        for text in (
            str(QUESTION + said("So.")),
            json.dumps(QUESTION + said("So.")),
            json.dumps(said("So."), indent=2),
            "[{'role': 'user', 'content': 'Why?'}\n {'role': 'assistant', 'content': \"It's so\"}]",
            "array([{'content': 'So.', 'role': 'assistant'}], dtype=object)",
            str(said("So.")[0]),
            '[{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]',
        )
    ),
    (without(prompt=json.dumps(QUESTION)), ["column 'prompt' holds messages written as text"]),
    (
        without(prompt=[{"role": "user", "content": "[{'type': 'text', 'text': 'Why?'}]"}]),
        ["column 'prompt' holds messages written as text"],
    ),
    *(
        (
            {"chosen": "So it is.", "rejected": "So it was.", column: value},
            [f"missing column prompt; rename '{column}' if"],
        )
        for column, value in (
            *(("question", "Why?"), ("instruction", "Why?"), ("input", "Why?"), ("query", "Why?")),
            *(("messages", QUESTION), ("conversations", [{"from": "human", "value": "Why?"}])),
            ("what_they_asked", "Why is that so?"),
        )
    ),
    (without(system=["Be brief."]), ["column 'system' must be text"]),
    (without(system="Be long.", prompt=TALK), ["column 'system' differs from the system message"]),
    (without(images=["x.png"]), ["column 'images' is not read: only text"]),
    (without(history=[["Hello", "Hi"]]), ["column 'history' is not read: write its turns into 'prompt'"]),
    (without(chosen=5), ["column 'chosen'", "{role, content}"]),
    (without(rejected={"content": "No."}), ["column 'rejected'", "{role, content}"]),
    (without(chosen=QUESTION), ["column 'chosen'", "last message", "must have the role assistant"]),
    (without(prompt=TALK + said("Because")), ["prompt ends with an assistant message", "chosen and rejected"]),
    (without(prompt=[{"role": 3, "content": "Why?"}]), ["column 'prompt'", "{role, content}"]),
    (without(chosen="half \ud83d"), ["column 'chosen' holds half a character", "\\ud83d", "rewrite the text"]),
    (without(prompt="\udc00"), ["column 'prompt' holds half a character"]),
    (without(chosen_truncated="no"), ["column 'chosen_truncated' must be true or false"]),
    (
        {"chosen": QUESTION + said("a") + said("yes"), "rejected": QUESTION + said("a") + said("no")},
        ["two assistant messages end the conversation"],
    ),
    (b"[" * 100_000, ["nested too deeply"]),
]


@pytest.mark.parametrize(("row", "said_about_it"), REFUSED)
def test_a_refused_row_is_named_with_its_reason(tmp_path, row, said_about_it):
    path = write(tmp_path, GOOD, b"", row)
    with pytest.raises(DataError) as caught:
        load_pairs(str(path))
    head, problem = str(caught.value).splitlines()
    assert head == "1 unusable rows (correct or remove them):"
    assert problem.strip().startswith(f"{path}, line 3: ")
    for part in said_about_it:
        assert part in problem


def test_every_bad_line_is_listed_once(tmp_path):
    """In the message, where lines with one reason share a line, and one by one in the exception."""
    rows = [line for row, _ in REFUSED for line in (GOOD, row)]
    path = write(tmp_path, *rows)
    with pytest.raises(DataError) as caught:
        load_pairs(str(path))
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{len(REFUSED)} unusable rows")
    assert len(lines) <= 21
    assert sorted(named(lines)) == [2 * (index + 1) for index in range(len(REFUSED))]
    assert len(caught.value.problems) == len(REFUSED)
    for index, problem in enumerate(caught.value.problems):
        assert problem.startswith(f"{path}, line {2 * (index + 1)}: ")
        assert all(part in problem for part in REFUSED[index][1])


def named(lines):
    """The numbers of the lines that a message names."""
    numbers = []
    for line in lines:
        places = re.search(r", lines? ([\d, -]+):", line).group(1)
        for run in places.split(", "):
            first, _, last = run.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def test_foreign_columns_are_not_taken_for_this_packages_own(tmp_path):
    for foreign in (
        {"source": ["web"], "round": "first", "flipped": "no", "scores": [1, 2]},
        {"source": "web", "round": 3, "flipped": True, "scores": {"chosen": 1.0}},
    ):
        assert load_pairs(str(write(tmp_path, without(**foreign)))) == load_pairs(str(write(tmp_path, GOOD)))


def test_prompts(tmp_path):
    chat = {"messages": TALK + said("an answer")}
    rows = [{"prompt": "Why?"}, {"id": "talk", "prompt": TALK}, GOOD, chat, {"prompt": HH_TALK}]
    assert load_prompts(str(write(tmp_path, *rows))) == [
        Prompt("row-0", QUESTION),
        Prompt("talk", TALK),
        Prompt("good", QUESTION, "Because.", "No."),
        Prompt("row-3", TALK),
        Prompt("row-4", TALK[1:]),
    ]


@pytest.mark.parametrize(
    "row",
    [
        without("rejected"),
        without(chosen="", id="good"),
        without(chosen="No."),
        without(chosen=5),
        without(chosen=QUESTION),
        without(chosen_truncated="?"),
    ],
    ids=["one answer", "empty", "identical", "wrong type", "wrong role", "wrong flag"],
)
def test_a_prompt_with_unusable_answers_is_a_prompt(tmp_path, row):
    assert load_prompts(str(write(tmp_path, row))) == [Prompt("good", QUESTION)]


def test_implicit_prompts_of_preference_rows(tmp_path):
    path = write(tmp_path, {"chosen": f"{HH_TALK} yes", "rejected": f"{HH_TALK} no"})
    assert load_prompts(str(path)) == [Prompt("row-0", TALK[1:], "yes", "no")]


@pytest.mark.parametrize(
    ("row", "said_about_it"),
    [
        ({"question": "Why?"}, "missing column prompt; found question"),
        ({}, "missing column prompt; found nothing"),
        ({"prompt": ""}, "column 'prompt' must be a non-empty string"),
        ({"prompt": 3}, "column 'prompt' must be a non-empty string"),
        ({"prompt": TALK[:3]}, "the prompt ends with an assistant message"),
        ({"messages": said("an answer")}, "column 'messages' holds no prompt before its last response"),
    ],
)
def test_refused_prompts(tmp_path, row, said_about_it):
    with pytest.raises(DataError) as caught:
        load_prompts(str(write(tmp_path, {"prompt": "Why?"}, row)))
    assert f"line 2: {said_about_it}" in str(caught.value)


# Texts with everything that some reader takes for the end of a line.
TEXTS = st.text(min_size=1).filter(str.strip) | st.sampled_from(["a\u2028b", "a\x85b", "a\r\nb", "a\x0bb\x0c", '"\\'])
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user"]), "content": TEXTS},
    optional={"reasoning_content": TEXTS, "tool_calls": st.just([{"function": {"name": "clock"}}]), "name": TEXTS},
)
MESSAGES = st.lists(MESSAGE, min_size=1, max_size=3)
PAIRS = st.builds(
    Pair,
    id=st.text(),
    prompt=MESSAGES,
    chosen=TEXTS,
    rejected=TEXTS,
    source=st.sampled_from(["human", "implicit"]),
    round=st.integers(0, 9),
    flipped=st.booleans(),
    chosen_truncated=st.booleans(),
    rejected_truncated=st.booleans(),
    scores=st.dictionaries(st.sampled_from(["chosen", "rejected"]), st.floats(allow_nan=False, allow_infinity=False)),
    template_kwargs=st.fixed_dictionaries(
        {}, optional={"tools": st.just([{"name": "clock", "parameters": {}}]), "enable_thinking": st.booleans()}
    ),
).filter(lambda pair: pair.chosen != pair.rejected)


@settings(max_examples=60)
@given(st.lists(PAIRS, min_size=1, max_size=3))
def test_written_pairs_read_back_equal(pairs):
    assume(len({pair.id for pair in pairs}) == len(pairs))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        write_jsonl(path, [pair.to_row() for pair in pairs])
        assert load_run_pairs(str(path)) == pairs


def test_written_rows_have_the_conversational_shape_and_datasets_reads_them(tmp_path, datasets):
    plain = Pair(id="a", prompt=TALK, chosen="yes", rejected="no")
    ranked = replace(
        plain, id="b", source="implicit", round=2, flipped=True, rejected_truncated=True, scores={"chosen": 0.5}
    )
    rows = [pair.to_row() for pair in (plain, ranked)]
    for row in rows:
        # What TRL's is_conversational asks for: lists of messages that consist of role and content.
        for column in ("prompt", "chosen", "rejected"):
            assert all(message.keys() == {"role", "content"} for message in row[column])
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]
        assert row["prompt"] == TALK
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, rows)
    table = datasets.load_dataset("json", data_files=str(path), split="train")
    for row, read in zip(rows, table, strict=True):
        for column in row.keys() - {"scores"}:
            assert read[column] == row[column]
        # Tables of older versions fill absent keys with null.
        assert {key: value for key, value in read["scores"].items() if value is not None} == row["scores"]


def test_repeated_ids_are_made_distinct(tmp_path):
    """Prompts and responses are joined by id: a repeated id would give an answer to another question."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": "same", "prompt": text}) + "\n" for text in ("a", "b", "c")))
    prompts = load_prompts(str(path))
    assert len({prompt.id for prompt in prompts}) == 3
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["a", "b", "c"]


def test_a_context_that_is_not_the_prompt_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    talk = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"prompt": "question", "chosen": talk, "rejected": "b"}) + "\n")
    with pytest.raises(DataError, match="column 'chosen' before the response differ from those of column 'prompt'"):
        load_pairs(str(path))


DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data, which is not shipped")
@pytest.mark.parametrize("name", ["ultrafeedback_binarized_train", "ultrafeedback_binarized_eval", "hh_rlhf_heldout"])
def test_published_preferences_load_as_they_are(name):
    pairs = load_pairs(str(DATA / f"{name}.jsonl.gz"))
    prompts = load_prompts(str(DATA / f"{name}.jsonl.gz"))
    assert len(pairs) == len(prompts) == {"ultrafeedback_binarized_eval": 200, "hh_rlhf_heldout": 928}.get(name, 1000)
    assert [pair.prompt for pair in pairs] == [prompt.messages for prompt in prompts]
    repeating = [pair.id for pair in pairs if repeats_prompt(pair)]
    assert len(repeating) <= 0.01 * len(pairs)


@pytest.mark.parametrize("column", ["weight", "chosen_probability"])
def test_labels_are_numbers_in_their_range(tmp_path, column):
    """Every wrong row is named; null is no label; whole numbers are numbers."""
    wrong = ["1", True, [1], -0.1, float("nan"), float("inf")] + [1.5] * (column == "chosen_probability")
    right = [None, 0, 1, 0.25] + [3] * (column == "weight")
    with pytest.raises(DataError) as caught:
        load_pairs(str(write(tmp_path, *[without(**{column: value}, id=str(value)) for value in [*right, *wrong]])))
    first = len(right) + 1
    for line, value in enumerate(wrong, start=first):
        assert re.search(rf"line {line}: column '{column}' must be", str(caught.value)), value
    assert f"{len(wrong)} unusable rows" in str(caught.value)
    pairs = load_pairs(str(write(tmp_path, *[without(**{column: value}, id=str(value)) for value in right])))
    assert [getattr(pair, column) for pair in pairs] == [1.0 if value is None else value for value in right]


def test_labels_are_written_where_they_are_not_1(tmp_path):
    pair = Pair("a", QUESTION, "Because.", "No.", weight=0.5, chosen_probability=0.75)
    write_jsonl(tmp_path / "pairs.jsonl", [pair.to_row(), replace(pair, id="b", weight=1.0).to_row()])
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert rows[0]["weight"] == 0.5 and "weight" not in rows[1] and rows[1]["chosen_probability"] == 0.75
    assert load_run_pairs(str(tmp_path / "pairs.jsonl")) == [pair, replace(pair, id="b", weight=1.0)]
