"""Benchmark prompts are recognised by hash, in the data at hand as in what the file was made from."""

import importlib.util
from pathlib import Path

import pytest

from openrlhf_sgpo.data import load_pairs, load_prompts
from openrlhf_sgpo.data.benchmarks import benchmark_hashes, benchmarks_with, normalised, prompt_hash
from openrlhf_sgpo.data.files import read_rows

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
ALPACA_EVAL = SHARED / "alpaca_eval2" / "prompts_and_baseline.jsonl.gz"
MT_BENCH = SHARED / "mt_bench" / "question.jsonl"
there = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent: benchmark prompts are not shipped")


def question(text):
    return [{"role": "user", "content": text}]


def column(path, name):
    return [row[name] for _, row in read_rows(str(path)).entries]


def texts():
    return column(ALPACA_EVAL, "instruction"), column(MT_BENCH, "turns")


def test_hashes_are_shipped():
    assert {name: len(hashes) for name, hashes in benchmark_hashes().items()} == {"alpaca_eval": 805, "mt_bench": 80}
    assert prompt_hash("") not in benchmark_hashes()["alpaca_eval"] | benchmark_hashes()["mt_bench"]


def test_normalisation():
    assert normalised(" Was ist\tGRÖSSE_2?\n") == normalised("was ist größe 2") == "wasistgrösse2"
    assert len(prompt_hash("a")) == 16 and prompt_hash("A!") == prompt_hash("a") != prompt_hash("b")


@there
def test_every_benchmark_prompt_is_recognised():
    alpaca_eval, mt_bench = texts()
    assert len(alpaca_eval) == 805 and len(mt_bench) == 80
    assert all("alpaca_eval" in benchmarks_with(question(text.upper() + " ?!")) for text in alpaca_eval)
    assert all("mt_bench" in benchmarks_with(question(f" {turns[0]}\n")) for turns in mt_bench)


@there
def test_the_first_user_message_decides():
    text = texts()[0][0]
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "x"}
    assert benchmarks_with([system, *question(text), answer, *question("And?")]) == ["alpaca_eval"]
    assert benchmarks_with([*question("And?"), answer, *question(text)]) == []
    assert benchmarks_with([system]) == []


@there
def test_rows_that_are_known_to_be_in_alpaca_eval():
    path = SHARED / "hh_rlhf_heldout.jsonl.gz"
    known = column(path, "in_alpaca_eval")
    assert [benchmarks_with(pair.prompt) == ["alpaca_eval"] for pair in load_pairs(str(path))] == known
    assert sum(known) == 71
    for name in ("hh_rlhf_train", "ultrafeedback_binarized_train"):
        assert not any(benchmarks_with(pair.prompt) for pair in load_pairs(str(SHARED / f"{name}.jsonl.gz")))


@there
def test_the_script_writes_what_is_shipped(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark_prompts", ROOT / "eval" / "benchmark_prompts.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(str(ALPACA_EVAL), str(MT_BENCH), tmp_path / "out.json")
    shipped = ROOT / "openrlhf_sgpo" / "data" / "benchmark_prompts.json"
    assert (tmp_path / "out.json").read_bytes() == shipped.read_bytes()


@pytest.mark.parametrize("name", ["seed", "held_out", "prompts"])
def test_the_examples_hold_no_benchmark_prompt(name):
    prompts = load_prompts(str(ROOT / "examples" / "quickstart" / f"{name}.jsonl"))
    assert not any(benchmarks_with(prompt.messages) for prompt in prompts)
