"""The commands and code that the documentation shows are executed (training ones as a dry run)."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from running import forked

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


def test_settings_of_estimates_are_right(monkeypatch):
    from openrlhf_sgpo.estimate import settings

    lines = [line for block in blocks("bash") for line in block.splitlines() if "openrlhf-sgpo estimate" in line]
    monkeypatch.chdir(ROOT)
    for line in lines:
        assert settings.load(shlex.split(line)[2:]).settings.gpu in settings.KNOWN
    assert len(lines) >= 2


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
    process = forked(
        ROOT / "examples" / "drop_in.py",
        *("--model.model_name_or_path", str(tiny_model), "--data.dataset", str(tiny_data["pairs"])),
        *("--data.max_len", "128", "--ckpt.output_dir", str(tmp_path / "out"), "--train.batch_size", "4"),
        *("--ds.param_dtype", "fp32", "--ds.zero_stage", "0", "--adam.lr", "1e-3"),
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "loss_mean" in process.stderr or "loss=" in process.stderr


def test_figures_of_the_study_on_the_page_of_recipes_are_the_study_s():
    study = " ".join((ROOT / "docs" / "robustness_study.md").read_text(encoding="utf-8").split())
    recipes = " ".join((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split())
    quoted = re.findall(r"-?\d\.\d+ ± \d\.\d+", recipes)
    assert len(quoted) >= 8
    for figure in quoted:
        assert figure in study, figure


def test_learning_rates_on_the_page_of_recipes_are_those_of_its_recipes():
    from openrlhf_sgpo.run_settings import load

    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for recipe in ("quickstart", "zephyr-7b.paper", "zephyr-7b.released", "llama-3-8b.paper", "one-gpu"):
        config, _ = load(["--config", recipe, "--ckpt.output_dir", "out"])
        for rate in (config.adam.lr, config.seed.lr or config.adam.lr):
            assert f"{rate:.0e}".replace("e-0", "e-") in page, recipe


@pytest.fixture(scope="module")
def site():
    """The script that builds the documentation site."""
    specification = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_links_on_the_site_lead_to_its_pages_or_to_the_repository(site):
    page = ROOT / "docs" / "algorithms" / "sgpo.md"
    assert site.on_the_site(page, "../runs.md#metrics") == "../runs.md#metrics"
    assert site.on_the_site(page, "../../README.md#algorithms") == "../index.md#algorithms"
    assert site.on_the_site(page, "../figures/worst_case.svg") == "../figures/worst_case.svg"
    assert site.on_the_site(page, "../../openrlhf_sgpo/dro") == f"{site.REPOSITORY}/blob/main/openrlhf_sgpo/dro"
    assert site.on_the_site(ROOT / "README.md", "docs/data.md") == "data.md"
    assert site.on_the_site(page, "#certificate") == "#certificate"
    assert site.on_the_site(page, "https://example.org/a") == "https://example.org/a"
    with pytest.raises(ValueError, match=r"sgpo\.md links to nowhere\.md"):
        site.on_the_site(page, "nowhere.md")


def test_every_page_is_in_the_site_s_menu(site, tmp_path):
    """The modules on the pages of the Python interface are there, too."""
    site.write_source(tmp_path / "source")
    written = {str(path.relative_to(tmp_path / "source")) for path in (tmp_path / "source").rglob("*.md")}
    assert set(re.findall(r'"([\w/-]+\.md)"', site.SETTINGS)) == written
    for _, modules in site.REFERENCE.values():
        assert all(importlib.util.find_spec(module) for module in modules if module != "openrlhf_sgpo.trl")
