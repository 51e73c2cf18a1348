"""The commands and code that the documentation shows are executed (training ones as a dry run)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_sgpo.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [block for page in PAGES for block in pattern.findall(page.read_text(encoding="utf-8"))]


TRAINING = [
    line for block in blocks("bash") for line in block.splitlines() if re.search(r"train_ssapo|[-_]sgpo train", line)
]
EVALUATING = [
    line
    for block in blocks("bash")
    for line in block.splitlines()
    if re.search(r"-sgpo (evaluate|compare|judge-check) |bash eval/", line)
]
RECIPES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


def test_there_are_commands_to_test():
    assert len(TRAINING) >= 5
    assert len(EVALUATING) >= 8
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_resolve(command, monkeypatch, capsys):
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith("train_ssapo.sh") or word == "train")
    argv = words[script + 1 :]
    if argv[:1] == ["--num_gpus"]:
        argv = argv[2:]
    monkeypatch.chdir(ROOT)
    assert main(["train", *argv, "--dry_run"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", EVALUATING)
def test_settings_of_evaluating_commands_are_right(command, tmp_path, monkeypatch):
    """Up to what folders and servers can tell, which are not there."""
    from openrlhf_sgpo.benchmarks import settings as evaluate_settings
    from openrlhf_sgpo.comparison import judge_check
    from openrlhf_sgpo.comparison import settings as compare_settings

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    for name in ("their_outputs.json", "pairs.jsonl"):
        Path(name).write_text("")
    program, name, *argv = shlex.split(command)
    if program == "bash":
        script = (ROOT / name).read_text()
        assert os.access(ROOT / name, os.X_OK)
        name, *fixed = re.search(r'main (\w+) (.*) "\$@"', script)[0].split()[1:-1]
        argv = [*fixed, *argv]
    if name == "evaluate":
        assert evaluate_settings.load(argv).contestants
    elif name == "compare":
        assert compare_settings.read_settings(argv if argv[0].startswith("-") else ["--runs", *argv], {}).runs
    else:
        assert judge_check.load(argv).out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_resolve(recipe, tmp_path):
    from openrlhf_sgpo.run_settings import load

    config, _ = load(["--config", str(recipe), "--ckpt.output_dir", str(tmp_path)])
    # Algorithms that sample in every step have no prompts of a round.
    assert len(config.rounds.prompts) in (0, config.rounds.count) and config.rounds.count > 0


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path):
    (tmp_path / "block.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, tmp_path / "block.py"], check=True, env=environment, cwd=tmp_path)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^make ([\w-]+)$", "\n".join(blocks("bash")), re.MULTILINE)
    assert targets == ["quickstart", "test", "install-gpu"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_the_drop_in_example_trains(tiny_model, tiny_data, tmp_path):
    process = subprocess.run(
        [
            *(sys.executable, ROOT / "examples" / "drop_in.py", "--model.model_name_or_path", tiny_model),
            *("--data.dataset", tiny_data["pairs"], "--data.max_len", "128", "--ckpt.output_dir", tmp_path / "out"),
            *("--train.batch_size", "4", "--ds.param_dtype", "fp32", "--ds.zero_stage", "0", "--adam.lr", "1e-3"),
        ],
        env={name: value for name, value in os.environ.items() if name != "RANK"},  # of tests in this process
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "loss_mean" in process.stderr or "loss=" in process.stderr
