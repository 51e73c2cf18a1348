"""What can be done here: for each feature, whether it works, and the command that mends it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from openrlhf_sgpo import extras
from openrlhf_sgpo.doctor.checks import Diagnosis
from openrlhf_sgpo.doctor.machine import TORCH
from openrlhf_sgpo.doctor.packages import installed, pinned_versions
from openrlhf_sgpo.doctor.probes import Outcome, attempt

TRAINING = "train"


class Feature(NamedTuple):
    """name: as commands and flags call it. code: statements that fail where it does not work. install: what to install where
    something is missing that ``extras`` has no command for; empty for the packages of training. optional: whether runs do as
    well without it."""

    name: str
    code: str
    install: str = ""
    optional: bool = False


FEATURES = (
    Feature(TRAINING, "import openrlhf_sgpo.loop"),
    Feature("train --rollout.engine vllm", "import openrlhf_sgpo.openrlhf.engine"),
    Feature("train --ds.lora.rank", "import peft"),
    Feature("train --ds.attn_implementation flash_attention_2", "import flash_attn", optional=True),
    Feature("data of the hub", "import datasets"),
    Feature("Parquet files", "import pyarrow.parquet"),
    Feature(
        "evaluate",
        "from importlib import import_module\n"
        "from openrlhf_sgpo.benchmarks import evaluate, tasks\n"
        "for name in tasks.names():\n"
        "    for package in tasks.get(name).packages:\n"
        "        import_module(package)\n",
        extras.BENCHMARKS,
    ),
    Feature("judges on a server", "import openai, openrlhf_sgpo.judge.client"),
    Feature("judges served here", "import vllm.entrypoints.openai.api_server, openrlhf_sgpo.judge.server"),
    Feature("compare", "import openrlhf_sgpo.comparison.compare"),
    Feature("report", "import plotly.graph_objects, openrlhf_sgpo.report.run_page"),
    Feature("openrlhf_sgpo.trl", "import openrlhf_sgpo.trl", extras.TRL, optional=True),
    Feature("solver program", "import cvxpy", optional=True),
    Feature("games --out", "import matplotlib", optional=True),
    Feature("W&B", "import wandb", optional=True),
    Feature("trackio", "import trackio", optional=True),
    Feature("TensorBoard", "from torch.utils.tensorboard import SummaryWriter", optional=True),
)


# Most of their time goes into packages that several features import.
_TOGETHER = """
answer["works"] = []
for name, code in {codes!r}.items():
    try:
        exec(code, {{}})
    except BaseException:
        continue
    answer["works"].append(name)
"""


def attempt_all(limit: float, features: Sequence[Feature] = FEATURES) -> tuple[Outcome, dict[str, Outcome]]:
    """The answers to ``TORCH`` and to every feature by its name: one process for all features, and then one for each that does
    not work there, or for all if that process crashes or takes too long. As many processes at a time as there are cores, up to
    four."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        torch = pool.submit(attempt, TORCH, limit)
        together = attempt(_TOGETHER.format(codes={feature.name: feature.code for feature in features}), limit)
        answers = {name: Outcome() for name in together.values.get("works", ())}
        alone = {
            feature.name: pool.submit(attempt, feature.code, limit)
            for feature in features
            if feature.name not in answers
        }
        answers |= {name: answer.result() for name, answer in alone.items()}
        return torch.result(), answers


def feature_checks(answers: dict[str, Outcome], extra: str, limit: float) -> list[Diagnosis]:
    """extra: gpu or cpu, whichever this machine needs. limit: seconds that each process had."""
    checks = []
    for feature in FEATURES:
        answer = answers[feature.name]
        if not answer.problem:
            checks.append(Diagnosis("features", feature.name, "ok"))
            continue
        problem = f"{answer.missing.partition('.')[0]} is not installed" if answer.missing else answer.problem
        absent = feature.optional and answer.missing
        checks.append(
            Diagnosis(
                "features",
                feature.name,
                "note" if absent else "fails",
                problem,
                _mend(feature, answer, extra, limit),
                stops=feature.name == TRAINING,
            )
        )
    return checks


def _mend(feature: Feature, answer: Outcome, extra: str, limit: float) -> str:
    training = feature.install or extras.training(extra)
    if answer.missing:
        return extras.install(answer.missing, training)
    if answer.late:
        return f"openrlhf-sgpo doctor --timeout {2 * limit:g}"
    name = next((name for name in pinned_versions(extra) if name.replace("-", "_") == answer.package), answer.package)
    if not name or name == "openrlhf_sgpo":
        return training
    version = pinned_versions(extra).get(name) or installed(name)
    return f"pip install --force-reinstall --no-deps {name}{f'=={version}' if version else ''}"
