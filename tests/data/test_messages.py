"""What the chat template needs beside role and content: read from rows, kept in a run's files, shown to every oracle."""

import json
import shutil

import pytest
import running

from openrlhf_sgpo.config import DataLimits
from openrlhf_sgpo.data import DataError, Pair, Prompt, load_pairs, load_prompts
from openrlhf_sgpo.data.inspection import inspect_pairs, inspect_prompts
from openrlhf_sgpo.data.pairwise import transcript
from openrlhf_sgpo.data.records import Answer, load_run_pairs
from openrlhf_sgpo.data.tokens import ChatFormat
from openrlhf_sgpo.oracle.base import Question, rank
from openrlhf_sgpo.oracle.implicit import as_group
from openrlhf_sgpo.refinement.drafts import load_drafts
from openrlhf_sgpo.rollout.roles import follower_context
from openrlhf_sgpo.run_folder import write_jsonl

CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
CALLED = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": "", "reasoning_content": "Look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "12:00", "tool_call_id": "1", "name": "clock"},
]
ROW = {"prompt": CALLED, "chosen": "Noon.", "rejected": "Late.", "tools": TOOLS}
TOLD = {"tools": TOOLS, "enable_thinking": False}
# Renders all of it, each thing in brackets of its own.
TEMPLATE = (
    "{% if tools %}<<{{ tools | tojson }}>>{% endif %}{% if enable_thinking is false %}<<quick>>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content }}{{ m.name }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "<<{{ call.function.name }}>>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    return ChatFormat(tokenizer, 1000)


def written(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_fields_and_arguments_reach_pairs_prompts_and_drafts(tmp_path):
    row = ROW | {"chat_template_kwargs": {"enable_thinking": False}}
    path = written(tmp_path, row | {"text": "an answer"})
    assert load_pairs(path) == [Pair("row-0", CALLED, "Noon.", "Late.", template_kwargs=TOLD)]
    assert load_prompts(path) == [Prompt("row-0", CALLED, "Noon.", "Late.", TOLD)]
    assert load_drafts(path, None)[0] == [Prompt("row-0", CALLED, template_kwargs=TOLD)]
    messages = {"messages": [*CALLED, {"role": "assistant", "content": "Noon."}], "tools": TOOLS}
    assert load_prompts(written(tmp_path, messages)) == [Prompt("row-0", CALLED, template_kwargs={"tools": TOOLS})]


def test_arguments_may_be_json_text_and_nulls_are_none(tmp_path):
    rows = [
        ROW | {"tools": json.dumps(TOOLS), "chat_template_kwargs": '{"enable_thinking": false}'},
        ROW | {"tools": "", "chat_template_kwargs": None},
        ROW | {"tools": [{"name": "clock", "strict": None}], "chat_template_kwargs": {"enable_thinking": None}},
    ]
    pairs = load_pairs(written(tmp_path, *rows))
    assert [pair.template_kwargs for pair in pairs] == [TOLD, {}, {"tools": [{"name": "clock"}]}]


def test_a_table_fills_what_messages_lack_with_nulls_which_mean_nothing(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    plain = {"prompt": CALLED[:1], "chosen": "Noon.", "rejected": "Late."}
    write_table(pyarrow.Table.from_pylist([ROW, plain]), tmp_path / "rows.parquet")
    called, asked = load_pairs(str(tmp_path / "rows.parquet"))
    assert (called.prompt, called.template_kwargs) == (CALLED, {"tools": TOOLS})
    assert (asked.prompt, asked.template_kwargs) == (CALLED[:1], {})


def test_a_table_with_values_that_json_has_not_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    row = {"prompt": "Why?", "chosen": "a", "rejected": "b", "tools": [{"name": b"clock"}]}
    write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="row 0: column 'tools' holds a bytes"):
        load_pairs(str(tmp_path / "rows.parquet"))


def test_a_runs_own_files_keep_them(tmp_path):
    pair = Pair("a", CALLED, "Noon.", "Late.", source="implicit", round=1, template_kwargs=TOLD)
    write_jsonl(tmp_path / "pairs.jsonl", [pair.to_row()])
    assert load_run_pairs(str(tmp_path / "pairs.jsonl")) == [pair]
    write_jsonl(tmp_path / "prompts.jsonl", [Prompt("a", CALLED, template_kwargs=TOLD).to_row()])
    assert load_prompts(str(tmp_path / "prompts.jsonl")) == [Prompt("a", CALLED, template_kwargs=TOLD)]
    plain = Pair("a", CALLED[:1], "Noon.", "Late.")
    assert not {"tools", "chat_template_kwargs", "template_kwargs"} & plain.to_row().keys()


def test_every_reader_of_a_prompt_renders_them(chat):
    pair = Pair("a", CALLED, "Noon.", "Late.", template_kwargs=TOLD)
    asked = Question("a", CALLED, (Answer("Noon."), Answer("Late.")), TOLD)
    wanted = chat.prompt(CALLED, TOLD)
    text = chat.tokenizer.decode(wanted)
    assert text.startswith("<<[{") and "]>><<quick>><|im_start|>user" in text and "<<clock>>" in text
    limits = DataLimits()
    prompts = inspect_prompts([Prompt("a", CALLED, template_kwargs=TOLD)], chat, limits, name="", room=8)
    assert inspect_pairs([pair], chat, limits, name="").groups[0].prompt == wanted
    assert prompts.tokens[0] == wanted
    assert as_group(asked, chat).prompt == wanted
    draft = follower_context(
        chat, Prompt("a", CALLED, template_kwargs=TOLD), Answer("So.", False, (1,)), "Again.", 900
    )[0]
    assert chat.tokenizer.decode(draft).startswith(text.rpartition("<|im_start|>assistant")[0])
    assert rank(asked, [1.0, 0.0], "judge", 1).template_kwargs == TOLD


def test_the_same_question_with_other_tools_is_no_duplicate(chat):
    pairs = [Pair(name, CALLED[:1], "Noon.", "Late.", template_kwargs=told) for name, told in (("a", TOLD), ("b", {}))]
    report = inspect_pairs(pairs, chat, DataLimits(), name="").report
    assert next(finding.count for finding in report.findings if finding.name == "duplicate") == 0


def test_a_judge_reads_tools_and_calls():
    said = transcript(CALLED, TOOLS)
    assert said.startswith(
        f"Tools: {json.dumps(TOOLS)}\n\nUser: What time is it?\n\nAssistant: [reasoning_content: Look.]\n"
    )
    assert f"[tool_calls: {json.dumps([CALL])}]" in said and said.endswith("[name: clock]\n12:00")
    assert transcript(CALLED[:1]) == "User: What time is it?"


@pytest.mark.slow
def test_they_go_through_rounds(tiny_model, tiny_data, tmp_path):
    """A run whose prompts have tools and a system column: its files have both."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    prompts = [{"prompt": f"What time is it at {n}?", "system": "Be brief.", "tools": TOOLS} for n in range(8)]
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    pairs = [{"prompt": f"Say {n}", "chosen": "yes" * (n + 1), "rejected": "no", **kwargs} for n in range(8)]
    data = {**tiny_data, "prompts": tmp_path / "prompts.jsonl", "pairs": tmp_path / "pairs.jsonl"}
    write_jsonl(data["prompts"], prompts)
    write_jsonl(data["pairs"], pairs)
    argv = running.arguments(model, data, tmp_path / "run")
    argv[argv.index("--data.max_len") + 1] = "400"
    process = running.train(*argv)
    assert process.returncode == 0, process.stderr
    round_1 = tmp_path / "run" / "round_1"
    asked = running.read_jsonl(round_1 / "prompts.jsonl")
    ranked = running.read_jsonl(round_1 / "pairs.jsonl")
    assert len(asked) == 4 and ranked
    for row in asked + ranked:
        assert row["tools"] == TOOLS and row["prompt"][0] == {"role": "system", "content": "Be brief."}
    for row in running.read_jsonl(tmp_path / "run" / "round_0" / "pairs.jsonl"):
        assert row["chat_template_kwargs"] == {"enable_thinking": False}
