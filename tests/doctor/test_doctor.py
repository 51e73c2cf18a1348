"""The doctor on machines that are whole, empty and broken; each empty one is a virtual environment without any package."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from openrlhf_sgpo import extras
from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.doctor.checks import Diagnosis
from openrlhf_sgpo.doctor.features import FEATURES, Feature, attempt_all, feature_checks
from openrlhf_sgpo.doctor.machine import gpu_checks, network_checks
from openrlhf_sgpo.doctor.packages import pinned_versions
from openrlhf_sgpo.doctor.probes import Outcome, attempt
from openrlhf_sgpo.doctor.report import starts, text_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def empty_python(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


def examined(python: Path, *argv: str, path: str = "") -> subprocess.CompletedProcess:
    """The command as its console script runs it."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{path}", "HOME": os.environ.get("HOME", "/")}
    command = [python, "-c", "import sys; from openrlhf_sgpo.__main__ import main; sys.exit(main())", "doctor", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=python.parent)


def test_a_machine_without_packages_gets_a_report_and_commands(empty_python):
    process = examined(empty_python, "--offline")
    assert process.returncode == 1
    assert process.stderr == "" and "Traceback" not in process.stdout
    lines = process.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("training would not start; ")
    text = " ".join(process.stdout.split())
    for feature in FEATURES:
        assert feature.name in text
    assert "-> pip install --no-deps openrlhf==" in text or "'openrlhf-sgpo[" in text


def test_broken_packages_are_lines_of_the_report(empty_python, tmp_path):
    """One that cannot be loaded, one that ends its process, and one that does not come back."""
    for name, code in {
        "torch": "raise OSError('libcudart.so.13: cannot open shared object file')",
        "peft": "import os; print('noise'); os.abort()",
        "wandb": "import time; time.sleep(600)",
        "datasets": "raise SystemExit(3)",
    }.items():
        (tmp_path / f"{name}.py").write_text(code)
    process = examined(empty_python, "--offline", "--json", "--timeout", "3", path=str(tmp_path))
    assert process.returncode == 1 and process.stderr == ""
    checks = {check["name"]: check for check in json.loads(process.stdout)["checks"]}
    assert checks["train --ds.lora.rank"]["detail"] == "the process ended by SIGABRT"
    assert checks["W&B"]["detail"] == "took longer than 3 seconds"
    assert checks["W&B"]["mend"] == "openrlhf-sgpo doctor --timeout 6"
    assert checks["data of the hub"]["detail"] == "SystemExit: 3"
    assert checks["TensorBoard"]["detail"].startswith("OSError: libcudart.so.13")


def test_an_answer_says_what_failed(monkeypatch):
    answer = attempt("print('noise'); answer['value'] = 3; print('more')", 20)
    assert answer == Outcome(values={"value": 3})
    missing = attempt("import no_such_package.part", 20)
    assert missing.missing == "no_such_package" and missing.problem.startswith("ModuleNotFoundError")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-key-of-some-length")
    hidden = attempt("import os; raise RuntimeError('with ' + os.environ['OPENAI_API_KEY'])", 20)
    assert hidden.problem == "RuntimeError: with [hidden]"
    # In the packages' folder, not in Python's own.
    broken = attempt("import yaml; yaml.safe_load('a: [')", 20)
    assert broken.package == "yaml"


@pytest.mark.parametrize("broken", ["import no_such_package", "raise SystemExit(3)", "import os; os.abort()"])
def test_what_does_not_work_beside_the_others_is_tried_alone(broken, tmp_path, monkeypatch):
    """One process for all that works, unless that process crashes."""
    monkeypatch.setattr("openrlhf_sgpo.doctor.features.TORCH", "pass")
    note = f"import os; open({str(tmp_path / 'who')!r}, 'a').write(f'{{os.getpid()}} ')"
    features = [Feature("first", note), Feature("broken", broken), Feature("second", note)]
    _, answers = attempt_all(20, features)
    assert {name for name, answer in answers.items() if answer.problem} == {"broken"} and len(answers) == 3
    assert answers["broken"] == attempt(broken, 20)
    processes = (tmp_path / "who").read_text().split()
    assert len(processes) == (3 if "abort" in broken else 2)
    assert len(set(processes)) == (3 if "abort" in broken else 1)


def test_the_command_that_mends_is_for_what_failed():
    answers = {feature.name: Outcome() for feature in FEATURES}
    answers["evaluate"] = Outcome("ModuleNotFoundError: No module named 'fastchat'", missing="fastchat")
    answers["compare"] = Outcome("ModuleNotFoundError: No module named 'openai'", missing="openai.types")
    answers["train"] = Outcome("ImportError: undefined symbol", package="deepspeed")
    answers["games --out"] = Outcome("ModuleNotFoundError: No module named 'matplotlib'", missing="matplotlib")
    checks = {check.name: check for check in feature_checks(answers, "cpu", 120)}
    assert checks["evaluate"].mend == extras.BENCHMARKS
    assert checks["compare"].mend == "pip install openai" and checks["compare"].status == "fails"
    assert (
        checks["train"].mend
        == "pip install --force-reinstall --no-deps deepspeed==" + pinned_versions("cpu")["deepspeed"]
    )
    assert checks["games --out"].status == "note"  # nothing is broken, somebody may not want it
    assert not starts(list(checks.values()))
    assert starts([check for name, check in checks.items() if name != "train"])


def test_tested_versions_are_those_of_the_setup_file(monkeypatch):
    """The metadata that pip has written from it, which may be older than the checkout only in what is not pinned."""
    given: dict = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    for extra in ("gpu", "cpu"):
        pinned = [text for text in given["extras_require"][extra] if "==" in text]
        expected = dict(re.sub(r"\[.*\]", "", text).split("==") for text in [*pinned, extras.OPENRLHF])
        assert pinned_versions(extra) == expected


@pytest.mark.parametrize(
    ("values", "listed", "status", "word"),
    [
        ({"built_for": None, "usable": False}, "", "note", "the CPU"),
        ({"built_for": None, "usable": False}, "A, 1 MiB, 580.65", "fails", "built for CPUs"),
        (
            {"built_for": "13.0", "usable": False, "reason": "driver too old"},
            "A, 1 MiB, 535.1",
            "fails",
            "driver 535.1",
        ),
        ({"built_for": "13.0", "usable": False}, "", "fails", "no GPU is visible"),
        ({"usable": True, "devices": [["A", 80 * 2**30, 78 * 2**30]]}, "A, 81920 MiB, 580.65", "ok", "78 of 80 GiB"),
        ({"usable": True, "devices": [["A", 80 * 2**30, 9 * 2**30]]}, "A, 81920 MiB, 580.65", "note", "9 of 80 GiB"),
    ],
)
def test_gpus_as_driver_and_torch_see_them(values, listed, status, word, monkeypatch):
    monkeypatch.setattr("openrlhf_sgpo.doctor.machine.tool", lambda *_: listed)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, *_ = gpu_checks(Outcome(values=values))
    assert first.status == status and word in first.detail
    assert bool(first.mend) == (first.status == "fails" or "9 of 80" in word)
    assert first.stops == (status == "fails")


def test_an_empty_list_of_gpus_asks_for_the_cpu(monkeypatch):
    """As training takes it, which otherwise refuses a torch for CUDA without a GPU."""
    monkeypatch.setattr("openrlhf_sgpo.doctor.machine.tool", lambda *_: "A, 81920 MiB, 580.65")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (check,) = gpu_checks(Outcome(values={"built_for": "13.0", "usable": False}))
    assert (check.status, check.stops) == ("note", False)


def test_gpus_are_not_judged_by_a_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr("openrlhf_sgpo.doctor.machine.tool", lambda *_: "A, 81920 MiB, 580.65")
    (check,) = gpu_checks(Outcome("OSError: libcudart.so.13", package="torch"))
    assert (check.name, check.status, check.stops, check.mend) == ("torch", "fails", True, extras.TRAINING_ON_GPUS)
    assert "libcudart" in check.detail and "the driver sees 1" in check.detail


def test_keys_are_named_and_not_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_of_some_length")
    text = text_of(network_checks(offline=True))
    assert "HF_TOKEN" in text and "secret" not in text


def test_an_address_that_does_not_answer_is_a_note(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    hub, _ = network_checks()
    assert hub.status == "note" and "Connection refused" in hub.detail and hub.mend


def test_long_lines_are_wrapped_and_colours_only_on_a_terminal():
    checks = [Diagnosis("s", "n", "fails", "word " * 60, "command " * 30, stops=True), Diagnosis("s", "m", "ok")]
    plain, coloured = text_of(checks), text_of(checks, colour=True)
    assert max(map(len, plain.splitlines())) <= 80 and "\x1b" not in plain
    assert re.sub("\x1b\\[[0-9]*m", "", coloured) == plain
    assert plain.splitlines()[-1] == "training would not start; 1 of 2 checks fail"


def test_arguments(capsys):
    assert main(["doctor", "--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    for argv in (["--timeout"], ["--timeout", "0"], ["--timeout", "nan"], ["runs"]):
        assert main(["doctor", *argv]) == 2
        assert "unexpected" in capsys.readouterr().err


@pytest.mark.slow
def test_this_machine_would_train():
    process = examined(Path(sys.executable), "--offline", "--json", "--timeout", "300")
    result = json.loads(process.stdout)
    assert process.returncode == 0 and result["starts"], process.stdout
    failing = [check["name"] for check in result["checks"] if check["status"] == "fails"]
    assert failing == []
