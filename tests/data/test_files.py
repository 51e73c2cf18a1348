"""Every kind of file and hub dataset gives the same records, and every damage is told with file, line and remedy."""

import gzip
import json
import re

import pytest
from data_rows import GOOD, QUESTION, TALK, said, without, write

from openrlhf_sgpo.data import DataError, Pair, Prompt, load_pairs, load_prompts
from openrlhf_sgpo.data.files import TEST_SPLITS, is_file


def ultrafeedback_row(index):
    """The columns of HuggingFaceH4/ultrafeedback_binarized."""
    question = {"role": "user", "content": f"Question {index}?"}
    return {
        "prompt": f"Question {index}?",
        "prompt_id": f"hash-{index}",
        "chosen": [question, *said("good")],
        "rejected": [question, *said("bad")],
        "messages": [question, *said("good")],
        "score_chosen": 8.0,
        "score_rejected": 4.5,
    }


def hub_folder(folder, **splits):
    """A dataset as the hub lays it out: a Parquet file for each split."""
    for split, rows in splits.items():
        (folder / "hub" / "data").mkdir(parents=True, exist_ok=True)
        as_parquet(folder / "hub" / "data" / f"{split}-00000-of-00001.parquet", rows)
    return str(folder / "hub")


def test_ultrafeedback_as_published(tmp_path, datasets):
    source = hub_folder(tmp_path, train_sft=[ultrafeedback_row(0)], train_prefs=[ultrafeedback_row(1)])
    expected = Pair("hash-1", [{"role": "user", "content": "Question 1?"}], "good", "bad")
    assert load_pairs(source) == [expected]
    assert load_prompts(source) == [Prompt("hash-1", expected.prompt, "good", "bad")]
    assert [pair.id for pair in load_pairs(source, split="train_sft")] == ["hash-0"]
    with pytest.raises(DataError, match="no split test or test_prefs; choose one of train_prefs, train_sft with"):
        load_pairs(source, splits=TEST_SPLITS)
    with pytest.raises(DataError, match="cannot be loaded .*tset"):
        load_pairs(source, split="tset")


def test_train_wins_over_train_prefs(tmp_path, datasets):
    rows = {split: [ultrafeedback_row(index)] for index, split in enumerate(("train_prefs", "train", "test"))}
    source = hub_folder(tmp_path, **rows)
    assert [pair.id for pair in load_pairs(source)] == ["hash-1"]
    assert [pair.id for pair in load_pairs(source, splits=TEST_SPLITS)] == ["hash-2"]


def test_unusable_rows_of_a_hub_dataset_are_left_out_and_named(tmp_path, datasets):
    """A published table cannot be mended by its reader; if no row is left it is an error all the same."""
    bad = {**ultrafeedback_row(1), "chosen": [{"role": "user", "content": "x"}]}
    pairs = load_pairs(hub_folder(tmp_path, train=[ultrafeedback_row(0), bad]))
    assert [pair.id for pair in pairs] == ["hash-0"]
    assert pairs.left_out == ("row 1 (the last message of column 'chosen' must have the role assistant)",)
    with pytest.raises(DataError, match="1 unusable rows(.|\n)*row 0: the last message") as caught:
        load_pairs(hub_folder(tmp_path / "other", train=[bad]))
    assert len(caught.value.problems) == 1


def test_a_name_that_is_no_dataset(tmp_path, datasets, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="nobody/nothing: cannot be loaded .*; expected .jsonl, .json"):
        load_pairs("nobody/nothing")


def as_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_gzip(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def as_json(path, rows):
    path.write_text(json.dumps(rows))


def as_parquet(path, rows):
    pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(path)


def as_indented_json(path, rows):
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8-sig")


def as_lines_with_a_byte_order_mark(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8-sig")


FORMATS = {
    "pairs.jsonl": as_jsonl,
    "v1.2.jsonl.gz": as_gzip,
    "pairs.json": as_json,
    "indented.json": as_indented_json,
    "lines.json": as_jsonl,
    "PAIRS.JSONL": as_lines_with_a_byte_order_mark,
    "pairs.json.gz": as_gzip,
    "pairs.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_file_format_gives_the_same_records(tmp_path, name, datasets):
    pairs = [
        Pair(id=f"p{index}", prompt=prompt, chosen=f"Größe {index} ☃", rejected="no\nline")
        for index, prompt in enumerate([QUESTION, TALK, QUESTION])
    ]
    rows = [pair.to_row() for pair in pairs]
    for row in rows:
        del row["scores"]  # Parquet has no empty struct
    path = tmp_path / name
    FORMATS[name](path, rows)
    assert load_pairs(str(path)) == pairs
    assert load_pairs(str(path), limit=2) == pairs[:2]
    assert load_prompts(str(path)) == [Prompt(pair.id, pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


def test_limit_stops_reading(tmp_path):
    rows = [without(id=index) for index in range(3)]
    path = str(write(tmp_path, rows[0], b"", rows[1], b"not JSON", rows[2]))
    assert [pair.id for pair in load_pairs(path, limit=2)] == ["0", "1"]
    for limit in (0, 3):
        with pytest.raises(DataError, match="line 4: not JSON"):
            load_pairs(path, limit=limit)


def named(lines):
    """The numbers of the lines that a message names."""
    numbers = []
    for line in lines:
        places = re.search(r", lines? ([\d, -]+):", line).group(1)
        for run in places.split(", "):
            first, _, last = run.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    return numbers


def test_many_bad_lines_stay_readable(tmp_path):
    path = write(
        tmp_path, GOOD, *[without("chosen")] * 5000, GOOD, without("rejected"), *[b"{" + b"x" * n for n in range(40)]
    )
    with pytest.raises(DataError) as caught:
        load_pairs(str(path))
    _, *lines = str(caught.value).splitlines()
    assert "lines 2-5001: missing column chosen; found id, prompt, rejected" in lines[0]
    assert len(str(caught.value)) < 5000
    assert sorted(named(lines)) == [*range(2, 5002), *range(5003, 5044)]
    assert len(caught.value.problems) == 5041


def test_bad_rows_of_arrays_and_tables_are_named_by_place(tmp_path, datasets):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, without("chosen"), GOOD, 3], indent=1))
    with pytest.raises(DataError, match="line 8: missing column chosen(.|\n)*line 19: expected an object, found int"):
        load_pairs(str(path))
    path = tmp_path / "rows.parquet"
    as_parquet(path, [GOOD, without(chosen=None), GOOD])
    with pytest.raises(DataError, match="rows.parquet, row 1: missing column chosen"):
        load_pairs(str(path))


def gzipped(content):
    return gzip.compress(content * 100)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("utf16.jsonl", json.dumps(GOOD).encode("utf-16"), "UTF-16, not UTF-8; convert the file"),
        ("utf16le.json", json.dumps(GOOD).encode("utf-16-le"), "UTF-16, not UTF-8; convert the file"),
        ("latin.json", b'[\n{"prompt": "\xff"}]', "line 2: not UTF-8; convert the file"),
        ("whole.json", json.dumps({"data": [GOOD]}).encode(), "one key 'data'; expected an array of rows"),
        ("broken.json", b'[{"prompt": 1},\n {"chosen"}]', "line 2: not JSON"),
        ("commas.json", b"[{}\n{}]", "line 1: not JSON: expected a comma or the end"),
        ("open.json", b'[{"a": 1},\n', "line 2: not JSON"),
        (
            "two.json",
            json.dumps([GOOD]).encode() + b"\n\n" + json.dumps([GOOD]).encode(),
            "line 3: not JSON: there is more after",
        ),
        ("tail.json", json.dumps([GOOD]).encode() + b"}", "line 1: not JSON: there is more after the end of the array"),
        (
            "twice.jsonl",
            b'{"prompt": "x", "chosen": "a", "rejected": "b", "chosen": "c"}',
            "line 1: the key 'chosen' appears twice",
        ),
        ("twice.json", b'[\n{"prompt": "x", "prompt": "y"}]', "line 2: the key 'prompt' appears twice"),
        ("deep.json", b"[" * 100_000, "nested too deeply"),
        ("damaged.jsonl.gz", gzipped(json.dumps(GOOD).encode())[:-20], "damaged, or not of the kind its name says"),
        ("plain.jsonl.gz", json.dumps(GOOD).encode(), "damaged, or not of the kind its name says"),
        (
            "digits.jsonl",
            b'{"id": ' + b"1" * 5000 + b"}",
            "line 1: not a row: a number has more digits than can be read",
        ),
        ("digits.json", b"[" + b"1" * 5000 + b"]", "line 1: not a row: a number has more digits than can be read"),
        ("text.parquet", json.dumps(GOOD).encode(), "damaged, or not a Parquet file"),
        ("empty.jsonl", b"", "no rows, the file is empty"),
        ("empty.parquet", b"", "no rows, the file is empty"),
        ("empty.json", b"[]", "no rows"),
        ("pairs.csv", b"prompt,chosen,rejected", "unknown kind of file; expected .jsonl, .json"),
        ("pairs.parquet.gz", b"x", "unknown kind of file; expected .jsonl, .json"),
    ],
)
@pytest.mark.parametrize("load", [load_pairs, load_prompts])
def test_damaged_files(tmp_path, name, content, message, load):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / name))
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_a_file_has_no_splits(tmp_path):
    with pytest.raises(DataError, match="a file has no splits, remove the split 'test'"):
        load_pairs(str(write(tmp_path, GOOD)), split="test")


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.jsonl.gz", "gone.json", "gone.parquet"])
@pytest.mark.parametrize("load", [load_pairs, load_prompts])
def test_missing_file(tmp_path, name, load):
    with pytest.raises(DataError, match=f"{name}: no such file"):
        load(str(tmp_path / name))


@pytest.mark.parametrize(
    "name", ["gone.csv", "./gone", "../gone", "~/gone", "/gone/pairs", "data/of/pairs", "gone.txt.gz"]
)
@pytest.mark.parametrize("load", [load_pairs, load_prompts])
def test_what_no_hub_dataset_is_called_is_a_missing_file(name, load):
    with pytest.raises(DataError, match=f"{re.escape(name)}: no such file; check the path .expected .jsonl"):
        load(name)


@pytest.mark.parametrize("name", ["pairs", "org/pairs", "org/pairs-v1.0", "org/pairs_10.5k"])
def test_names_of_hub_datasets_are_no_files(name):
    assert not is_file(name)


@pytest.mark.parametrize("load", [load_pairs, load_prompts])
def test_file_without_rows(tmp_path, load):
    path = write(tmp_path, b"", b"  ")
    with pytest.raises(DataError, match="rows.jsonl: no rows"):
        load(str(path))


def test_a_table_with_a_date_that_python_has_not(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    table = pyarrow.table(
        {**{name: [text] for name, text in GOOD.items()}, "day": pyarrow.array([10**8], pyarrow.date32())}
    )
    write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet: damaged, or not a Parquet file .date value out of range"):
        load_pairs(str(tmp_path / "rows.parquet"))
