"""Random command lines and files end in settings or in SettingsError, and quickly."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stderr
from itertools import chain

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from openrlhf_sgpo import algorithms, flags, trl_names
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.run_settings import load

pytestmark = pytest.mark.slow

FIXED = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
ALGORITHMS = ("sgpo", "dpo", "slhf", "preference_model", "inpo")


def leaves(tree: dict, prefix: str = "") -> list[str]:
    return [
        name
        for key, value in tree.items()
        for name in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"])
    ]


NAMES = sorted(
    {
        name
        for algo in ALGORITHMS
        for name in leaves(flags.to_dict({"": Config(), algo: algorithms.get(algo).settings()}))
    }
)
# Text that a shell can hand over: no null byte, and bytes that are not UTF-8 as surrogates.
TEXT = st.text(st.characters(exclude_characters="\0"), max_size=12)
NUMBERS = st.one_of(st.integers(-(10**6), 10**30).map(str), st.floats().map(str))
VALUES = st.one_of(
    NUMBERS,
    TEXT,
    st.sampled_from(
        ["true", "false", "null", "", "0", "1", "all", "bf16", "hf", "1e400", "9" * 5000, "٣", "1_0", "nan"]
    ),
)
NAME = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(sorted(trl_names.ANSWERS)),
    st.sampled_from(["algo", "config", "adam", "sgpo", "", ".", "seed."]),
    TEXT,
)
FLAG = st.builds(lambda name, values: [f"--{name}", *values], NAME, st.lists(VALUES, max_size=3))
JOINED = st.builds(lambda name, value: [f"--{name}={value}"], NAME, VALUES)
ARGV = (
    st.lists(st.one_of(FLAG, JOINED, VALUES.map(lambda value: [value])), max_size=8).map(chain.from_iterable).map(list)
)
REQUIRED = [
    *("--model.model_name_or_path", "m", "--data.dataset", "d.jsonl", "--ckpt.output_dir", "o"),
    *("--data.prompt_dataset", "p.jsonl"),
]


def load_or_settings_error(argv: list[str]) -> None:
    """Loads; what loads is stable, and nothing takes long."""
    begin = time.monotonic()
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            config, _ = load(argv)
        assert config.ckpt.output_dir and config.model.model_name_or_path
    except flags.SettingsError as error:
        said.write("" if str(error).strip() else "no reason")
    assert time.monotonic() - begin < 5
    assert all(line.startswith("note: ") for line in said.getvalue().splitlines())


@FIXED
@given(ARGV)
@example(["--config", "\0"])
@example(["--config="])
@example(["--" + "learning" * 500, "1"])
@example(["--algo", "..:x"])
@example(["--algo", ":"])
@example(["--train.batch_size", "9" * 5000])
@example(["--data.dataset", "\0"])
def test_random_command_lines(argv):
    load_or_settings_error(argv)


@FIXED
@given(st.sampled_from(ALGORITHMS), st.lists(st.one_of(FLAG, JOINED), max_size=4))
@example("sgpo", [["--train.seed", str(2**64)]])
def test_random_flags_of_a_run_that_is_otherwise_right(algo, more):
    load_or_settings_error(["--algo", algo, *REQUIRED, *chain.from_iterable(more)])


TREE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda children: st.one_of(st.lists(children, max_size=3), st.dictionaries(NAME, children, max_size=4)),
    max_leaves=12,
)


@FIXED
@given(tree=st.dictionaries(NAME, TREE, max_size=6), algo=st.sampled_from(ALGORITHMS))
def test_random_files(tree, algo, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8", errors="surrogatepass")
    load_or_settings_error(["--config", str(path), "--algo", algo, *REQUIRED])


@FIXED
@given(st.binary(max_size=60))
def test_random_bytes_as_a_file(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    load_or_settings_error(["--config", str(path), *REQUIRED])


@pytest.mark.parametrize("value", ["-1", "1e30"])
def test_every_flag_answers_for_itself(value):
    for name in NAMES[:: 1 if value == "-1" else 3]:
        if name != "algo":
            load_or_settings_error(["--algo", "sgpo", *REQUIRED, f"--{name}={value}"])
