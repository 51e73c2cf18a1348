"""The data of a run as a whole, and the command that reports on it."""

import json
import re
import shlex
from pathlib import Path

import pytest
from running import forked

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms.dpo import DPO
from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.run_data import inspect_run, load_run
from openrlhf_sgpo.data.tokens import ChatFormat
from openrlhf_sgpo.run_settings import check_data

ROOT = Path(__file__).parents[2]
MAX_LEN = 400


def write(folder, rows, name="pairs.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def row(index):
    return {"id": f"id-{index}", "prompt": f"question {index}?", "chosen": f"Yes, {index}.", "rejected": "No, never."}


def arguments(folder, model, *more):
    bad = [
        {"id": "long", "prompt": "x" * 380},
        {"chosen": "y" * 500},
        {"rejected": "n" * 500},
        {"chosen_truncated": True},
    ]
    pairs = write(
        folder, [row(index) for index in range(60)] + [row(60 + at) | change for at, change in enumerate(bad)]
    )
    held_out = write(folder, [row(index) for index in range(100, 120)], "held_out.jsonl")
    prompts = write(folder, [{"prompt": "Why?"}, {"prompt": "How?"}], "prompts.jsonl")
    return [
        *("--model.model_name_or_path", str(model), "--data.dataset", pairs, "--eval.dataset", held_out),
        *("--data.prompt_dataset", prompts, "--data.max_len", str(MAX_LEN), *more),
    ]


def test_the_command_prints_the_reports(tmp_path, tiny_model, capsys):
    assert main(["data", *arguments(tmp_path, tiny_model)]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^--\S+ \S+: (.*)", printed, re.MULTILINE) == [
        "64 pairs, 63 kept",
        "20 pairs, 20 kept",
        "2 prompts, 2 kept",
    ]


def test_the_command_stops_at_a_limit(tmp_path, tiny_model, capsys):
    argv = arguments(tmp_path, tiny_model, "--data.limits.truncated", "0.01")
    assert main(["data", *argv]) == 2
    printed = capsys.readouterr()
    assert "64 pairs, 63 kept" in printed.out and "exceeded" in printed.out
    assert "truncated 3 of 64 (4.7%, limit 1.0%)" in printed.err
    assert "--data.limits.truncated 0.047 accepts this" in printed.err


def test_the_command_names_bad_rows_of_all_files_before_it_needs_a_tokenizer(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    bad = str(tmp_path / "bad.jsonl")
    argv = ["--data.dataset", bad, "--eval.dataset", bad, "--data.prompt_dataset", bad]
    assert main(["data", *argv, "--model.model_name_or_path", "/no/such/model"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("bad.jsonl, line 1: ") == 3
    assert "column 'prompt' must be" in printed and "missing column chosen" in printed


def test_the_command_checks_what_it_needs_and_nothing_else(capsys):
    assert main(["data", "--data.max_len", "0", "--data.limits.empty", "2", "--data.dataset", "x.jsonl"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("error: ").partition(":")[0] for line in lines] == [
        "--model.model_name_or_path",
        "--data.max_len",
        "--data.limits.empty",
    ]


@pytest.mark.parametrize(
    ("split", "dataset"),
    [
        ("data.dataset_split", "data.dataset"),
        ("data.prompt_split", "data.prompt_dataset"),
        ("eval.split", "eval.dataset"),
    ],
)
def test_a_split_of_a_file_is_an_error_that_names_the_flag(split, dataset):
    sources = {"model.model_name_or_path": "m", "data.dataset": "org/name", dataset: "pairs.jsonl", split: "test"}
    argv = [word for name, value in sources.items() for word in (f"--{name}", value)]
    with pytest.raises(flags.SettingsError) as caught:
        check_data(flags.parse(argv, {"": Config}).instances[""], DPO)
    assert str(caught.value) == f"--{split}: --{dataset} pairs.jsonl is a file, which has no splits; leave it out"


def test_a_run_without_rounds_or_evaluation_has_one_report(tmp_path, tiny_model):
    from transformers import AutoTokenizer

    argv = arguments(tmp_path, tiny_model)
    config = flags.parse([*argv[:4], *argv[8:]], {"": Config}).instances[""]
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model), MAX_LEN)
    data = inspect_run(load_run(config, with_prompts=False), chat, config, 8)
    assert len(data.reports) == 1
    assert not data.held_out.pairs and not data.prompts.prompts
    assert "held_out" not in {finding.name for finding in data.human.report.findings}


@pytest.mark.slow
def test_the_example_of_the_page_prints_what_the_page_shows():
    model = ROOT / "build" / "smollm2"
    if not (model / "tokenizer.json").exists():
        pytest.skip(f"{model} is absent: make build/smollm2/config.json")
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    command, shown = re.search(r"```bash\n(openrlhf-sgpo data .*?)\n```.*?```text\n(.*?)```", page, re.DOTALL).groups()
    process = forked(None, *shlex.split(command)[1:])
    assert process.returncode == 0, process.stderr
    assert process.stdout == shown


@pytest.mark.slow
def test_ultrafeedback_passes_at_default_settings_with_a_note(capsys):
    data, model = ROOT.parent / "shared" / "data", ROOT / "build" / "smollm2"
    if not data.is_dir():
        pytest.skip("needs ../shared/data, which is not shipped")
    if not (model / "tokenizer.json").exists():
        pytest.skip(f"{model} is absent: make build/smollm2/config.json")
    pairs = str(data / "ultrafeedback_binarized_train.jsonl.gz")
    argv = ["--model.model_name_or_path", str(model), "--data.dataset", pairs, "--data.prompt_dataset", pairs]
    assert main(["data", *argv]) == 0
    printed = capsys.readouterr().out
    assert "note: truncated 379 of 1000 (37.9%); raise --data.max_len" in printed
    assert "note: too_long 288 of 1000 (28.8%); raise --data.max_len" in printed
