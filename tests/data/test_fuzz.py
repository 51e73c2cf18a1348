"""Whatever rows or bytes come: pairs, prompts and drafts that can be written, read and tokenized, or a DataError."""

import gzip
import json
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openrlhf_sgpo.benchmarks.benchmark_files import TEXT, content_hash, read_fields
from openrlhf_sgpo.config import DataLimits
from openrlhf_sgpo.data import DataError, Pair, Prompt, load_pairs, load_prompts
from openrlhf_sgpo.data.inspection import inspect_pairs, inspect_prompts
from openrlhf_sgpo.data.messages import ROLES
from openrlhf_sgpo.data.pairwise import transcript
from openrlhf_sgpo.data.records import fingerprint, load_run_pairs
from openrlhf_sgpo.data.tokens import ChatFormat
from openrlhf_sgpo.refinement.drafts import load_drafts
from openrlhf_sgpo.run_folder import write_jsonl

BUDGET = settings(
    max_examples=120,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        *("Why?", "Why? Because.", "Why? No.", "  ", "\ud800", "<|im_end|>", "\x00"),
        *("\n\nHuman: Why?\n\nAssistant:", "\n\nHuman: Why?\n\nAssistant: So.", "Human: a\n\nAssistant: b\n\nHuman: c"),
        *("[{'role': 'user', 'content': 'Why?'}]", '[{"name": "f"}]', '{"a": 1}', "[" * 500, "1" * 5000),
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from([*ROLES, "human", "", None]) | LEAVES,
        "content": TEXTS
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS | st.none()}))
        | LEAVES,
        "from": TEXTS,
        "value": TEXTS,
        "tool_calls": st.lists(st.dictionaries(TEXTS, LEAVES, max_size=2), max_size=2) | LEAVES,
        "reasoning_content": LEAVES,
        "name": LEAVES,
    },
)
GOOD_MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": TEXTS})
VALUES = st.recursive(
    LEAVES | st.lists(MESSAGE, max_size=3) | st.lists(GOOD_MESSAGE, min_size=1, max_size=3),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(TEXTS, values, max_size=2),
    max_leaves=4,
)
COLUMNS = [
    "prompt",
    "chosen",
    "rejected",
    "messages",
    "id",
    "prompt_id",
    "system",
    "system_prompt",
    "tools",
    "question",
]
COLUMNS += [
    "chat_template_kwargs",
    "images",
    "chosen_truncated",
    "source",
    "round",
    "flipped",
    "scores",
    "text",
    "output",
]
COLUMNS += ["instruction", "generator", "truncated", "method", "depth"]
ROWS = st.dictionaries(st.sampled_from(COLUMNS) | TEXTS, VALUES, max_size=5) | st.fixed_dictionaries(
    {
        "prompt": TEXTS | st.lists(GOOD_MESSAGE, min_size=1, max_size=2),
        "chosen": TEXTS,
        "rejected": TEXTS,
        "text": TEXTS,
    },
    optional=dict.fromkeys(("id", "system", "tools", "chat_template_kwargs", "chosen_truncated", "scores"), VALUES),
)
READERS = [load_pairs, load_run_pairs, load_prompts, lambda path: load_drafts(path, None)[0]]


@pytest.fixture(scope="module")
def chat(tiny_model):
    from transformers import AutoTokenizer

    return ChatFormat(AutoTokenizer.from_pretrained(tiny_model), 400)


def check(path, chat):
    """Every reader ends in a DataError or in sound records."""
    for reader in READERS:
        with suppress(DataError):
            sound(reader(str(path)), path.parent, chat)
    with suppress(DataError):
        content_hash(read_fields(path, {"prompt": TEXT}), ["prompt"])


def sound(records, folder, chat):
    """They have texts and known roles, are written and read back equal, and can be shown and tokenized."""
    assert records
    fingerprint(records)
    for record in records:
        messages = record.prompt if isinstance(record, Pair) else record.messages
        assert messages and all(
            message["role"] in ROLES and isinstance(message["content"], str) for message in messages
        )
        assert messages[-1]["role"] != "assistant"
        transcript(messages, record.template_kwargs.get("tools", ())).encode()
        record.id.encode()
    if isinstance(records[0], Pair):
        write_jsonl(folder / "again.jsonl", [pair.to_row() for pair in records])
        again = load_run_pairs(str(folder / "again.jsonl"))
        assert [replace(pair, scores={}) for pair in again] == [replace(pair, scores={}) for pair in records]
    try:
        if isinstance(records[0], Prompt):
            report = inspect_prompts(records, chat, DataLimits(), name="", room=8).report
        else:
            report = inspect_pairs(records, chat, DataLimits(), name="").report
    except ValueError as error:  # what the template would drop
        if type(error) is not ValueError:
            raise
        return
    report.text().encode()
    assert report.rows == len(records)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.slow
@BUDGET
@given(st.lists(ROWS, min_size=1, max_size=3), st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".json.gz"]))
def test_any_rows(chat, rows, kind):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{kind}"
        text = json.dumps(rows) if ".json" in kind and "l" not in kind else "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
        check(path, chat)


LINE = json.dumps({"id": "a", "prompt": [{"role": "user", "content": "Why?"}], "chosen": "So.", "rejected": "\u00e9"})
SOUND = f"{LINE}\n{LINE}\n".encode()
BYTES = st.binary(max_size=60) | st.builds(
    lambda start, length, put: SOUND[:start] + put + SOUND[start + length :],
    st.integers(0, len(SOUND)),
    st.integers(0, 40),
    st.binary(max_size=4)
    | st.sampled_from([b"[" * 2000, b'{"a":' * 2000, b"1" * 5000, b"NaN", b"1e999", b"\xff\xfe", b'"\\ud800"']),
)


@BUDGET
@given(BYTES, st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".json.gz"]), st.booleans(), st.integers(0, 60))
def test_any_bytes(chat, content, kind, compressed, lost):
    with tempfile.TemporaryDirectory() as folder:
        content = gzip.compress(content) if compressed else content
        path = Path(folder) / f"rows{kind}"
        path.write_bytes(content[: max(0, len(content) - lost)] if lost > 40 else content)
        check(path, chat)


def columns():
    """Tables of every type that people's tools write, columns of one type each."""
    import pyarrow

    message = {"role": st.sampled_from([*ROLES, "human"]) | st.none(), "content": TEXTS | st.none()}
    message |= {"tool_calls": st.none() | st.just([{"name": "f", "arguments": None}]), "name": st.none() | st.just("a")}
    cells = {
        pyarrow.string(): TEXTS,
        pyarrow.binary(): st.binary(max_size=4),
        pyarrow.int64(): st.integers(0, 9),
        pyarrow.float64(): st.floats(),
        pyarrow.bool_(): st.booleans(),
        pyarrow.timestamp("ns"): st.integers(-(2**60), 2**60),
        pyarrow.date32(): st.integers(-(10**6), 10**7),
        pyarrow.list_(pyarrow.string()): st.lists(TEXTS, max_size=2),
        pyarrow.map_(pyarrow.string(), pyarrow.string()): st.lists(st.tuples(TEXTS, TEXTS), max_size=2),
        pyarrow.list_(
            pyarrow.struct(
                {
                    "role": pyarrow.string(),
                    "content": pyarrow.string(),
                    "name": pyarrow.string(),
                    "tool_calls": pyarrow.list_(
                        pyarrow.struct({"name": pyarrow.string(), "arguments": pyarrow.string()})
                    ),
                }
            )
        ): st.lists(st.fixed_dictionaries(message), max_size=3),
    }
    types = st.sampled_from(list(cells))
    return types.flatmap(
        lambda kind: st.tuples(st.just(kind), st.lists(cells[kind] | st.none(), min_size=2, max_size=2))
    )


@pytest.mark.slow
@BUDGET
@given(st.data())
def test_any_table(chat, data):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    names = data.draw(st.lists(st.sampled_from(COLUMNS), unique=True, max_size=5))
    drawn = {name: data.draw(columns()) for name in ("prompt", "chosen", "rejected", *names)}
    try:
        table = pyarrow.table({name: pyarrow.array(cells, kind) for name, (kind, cells) in drawn.items()})
    except (pyarrow.ArrowException, UnicodeEncodeError):  # halves of characters cannot be in a table
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        write_table(table, path)
        content = path.read_bytes()
        start, put = data.draw(st.integers(0, len(content))), data.draw(st.none() | st.binary(min_size=1, max_size=8))
        if put:
            path.write_bytes(content[:start] + put + content[start + len(put) :])
        check(path, chat)
