"""YAML that people write: settings, suites, presets. What is wrong with it is told at once, whatever it is."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openrlhf_sgpo import flags, yaml_files
from openrlhf_sgpo.benchmarks.judge import EvaluationJudgeSettings, with_preset
from openrlhf_sgpo.comparison.suite import read_suite
from openrlhf_sgpo.config import Config

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "laughs": (LAUGHS, "line 4: more than 5000 values"),
    "itself": ("algo: &a [*a]\n", r"line 1: \*a is inside the value that it stands for"),
    "deep": ("[" * 60_000, "line 1: more than 32 levels of nesting"),
    "deep_lines": ("".join(" " * depth + "a:\n" for depth in range(200)), "line 32: more than 32 levels"),
    "dashes": ("- " * 30_000, "more than 32 levels"),
    "long": ("a: " + "x" * 70_000, "more than 64 KiB"),
    "many": ("a: [" + "b," * 30_000 + "]", "more than 5000 values"),
    "undefined": ("algo: *nothing\n", "line 1: found undefined alias"),
    "control": ("a: \x00\n", "unacceptable character"),
    "two": ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
}


def readers(path):
    """Everything that reads YAML of people's own."""
    yield lambda: flags.parse(["--config", str(path)], {"": Config})
    yield lambda: flags.peek(["--config", str(path)], "algo")
    yield lambda: read_suite(path)
    yield lambda: with_preset(EvaluationJudgeSettings(preset=str(path)), {})
    yield lambda: yaml_files.load(path)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name, tmp_path):
    text, reason = HOSTILE[name]
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    for read in readers(path):
        start = time.process_time()
        with pytest.raises(ValueError, match=f"{path} cannot be read: .*{reason}"):
            read()
        assert time.process_time() - start < 5


def test_values_that_do_not_fit_their_tags(tmp_path):
    path = tmp_path / "suite.yaml"
    texts = ["!!int x", "!!int ''", "!!bool maybe", "2021-99-99", "!!timestamp x", "!!float x", "1" + ":1" * 300 + ".5"]
    for text in [*texts, "!!binary é", "!!python/object/apply:os.system [ls]", "{[a]: b}", "!mine x"]:
        path.write_text(f"out: {text}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"{path} cannot be read: "):
            yaml_files.load(path)


def test_other_encodings_and_other_files_are_told(tmp_path):
    path = tmp_path / "settings.yaml"
    for encoding in ("utf-16", "utf-32", "latin-1"):
        path.write_bytes("algo: é\n".encode(encoding))
        with pytest.raises(ValueError, match="is not UTF-8; convert the file"):
            yaml_files.load(path)
    path.write_bytes("algo: é\n".encode("utf-8-sig"))
    assert yaml_files.load(path) == {"algo": "é"}
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: Is a directory"):
        yaml_files.load(tmp_path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        yaml_files.load(tmp_path / "absent.yaml")


def test_aliases_of_little_are_read(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("a: &a {b: 1, c: [2]}\nd: {<<: *a, b: 3}\ne: *a\n")
    assert yaml_files.load(path) == {"a": {"b": 1, "c": [2]}, "d": {"b": 3, "c": [2]}, "e": {"b": 1, "c": [2]}}
    path.write_text("train: {batch_size: &size 8, micro_batch_size: *size}\n")
    config = flags.parse(["--config", str(path)], {"": Config}).instances[""]
    assert config.train.batch_size == config.train.micro_batch_size == 8


NAMES = st.sampled_from(["algo", "train", "batch_size", "train.seed", "adam.betas", "judge", "api_key", "out", "seeds"])
SUITE_NAMES = st.sampled_from(
    ["out", "seeds", "algorithms", "common", "compare", "name", "settings", "trials", "fork_from"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | SUITE_NAMES | st.integers(), inner, max_size=4),
    max_leaves=15,
)
PIECES = st.sampled_from(
    [
        "algo",
        "train:",
        "a: ",
        "- ",
        "? ",
        "[",
        "]",
        "{",
        "}",
        ",",
        ": ",
        "&a ",
        "*a",
        "!!int ",
        "!!map ",
        "!x ",
        "<<: ",
        "'",
        '"',
    ]
    + [
        "\n",
        "\n  ",
        "|\n",
        ">-\n",
        "#",
        "%YAML 9.9\n",
        "---\n",
        "...",
        "\\",
        "\t",
        "~",
        "é",
        "\u2028",
        "1:30",
        "0o7",
        "1e999",
    ]
)
FILES = (
    VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace"))
    | st.lists(PIECES, max_size=25).map(lambda pieces: "".join(pieces).encode())
    | st.binary(max_size=60)
    | st.text(max_size=40).map(lambda text: text.encode("utf-16"))
)


@given(FILES)
@example(LAUGHS.encode())
@settings(max_examples=100)
def test_any_file_is_read_or_refused_with_an_error_of_ours(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content)
    kinds = set()
    for read in readers(path):
        try:
            read()
        except ValueError as error:
            kinds.add(type(error))
    assert kinds <= {ValueError, flags.SettingsError}
