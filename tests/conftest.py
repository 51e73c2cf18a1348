"""Fixtures of all tests. What tests import is in plain modules: several files are called conftest, and an import of that name
gets one of them."""

from __future__ import annotations

import gc
import os
import signal
import sys
from itertools import chain, islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tiny import make_tiny_model, write_jsonl

import openrlhf_sgpo  # noqa: F401 - before torch, because it says how OpenMP waits

# A shell starts jobs in the background with SIGINT ignored, and their children inherit that. Some tests interrupt children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Servers of the tests are on this machine, whatever proxy stands before others.
for name in ("no_proxy", "NO_PROXY"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))

# How long an example takes says nothing on a machine that does other things, and a failure must come again.
settings.register_profile("any machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Ray ends engines when the machine's memory is nearly full, whoever fills it.
os.environ.update(RAY_memory_monitor_refresh_ms="0")

gc.disable()  # until everything is imported
known: set[str] = set()  # modules whose objects no collection walks over


# Files whose tests take a minute and more, the longest first.
LONGEST = (
    *("test_ray_launcher.py", "test_resume.py", "test_plays.py", "test_behind.py", "test_session.py"),
    *("test_engines.py", "test_shared_files.py", "test_robustness_study.py", "test_report_browser.py"),
    *("test_judge_server_start.py", "test_rounds.py"),
)


@pytest.hookimpl(trylast=True)  # of what is selected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each process gets an equal part of the list from xdist, and takes from the end of another's when it has done its own. So
    the longest files are dealt out to the beginnings of the parts, or one process would end long after the others."""
    count = getattr(config, "workerinput", {"workercount": 1})["workercount"]
    parts: list[list[pytest.Item]] = [[] for _ in range(count)]
    for place, name in enumerate(LONGEST):
        turn, number = divmod(place, count)
        part = parts[count - 1 - number if turn % 2 else number]
        part += (item for item in items if item.path.name == name)
    others = iter([item for item in items if item.path.name not in LONGEST])
    for number, part in enumerate(parts):
        left = len(items) - sum(map(len, parts[:number]))
        part += islice(others, max(0, left // (count - number) - len(part)))
    items[:] = [*chain(*parts), *others]


def pytest_collection_finish() -> None:
    """Everything is imported now: the collections that engines and checkpoints ask for pass over these million objects."""
    gc.freeze()
    gc.enable()
    known.update(sys.modules)


def pytest_runtest_logfinish() -> None:
    """And over those of packages that only a test has imported, as vLLM."""
    if len(sys.modules.keys() - known) > 500:
        gc.collect()
        gc.freeze()
        known.update(sys.modules)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def other_tiny_model(tmp_path_factory) -> Path:
    """Same architecture and tokenizer, other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture(scope="session")
def tiny_reward_model(tiny_model, tmp_path_factory) -> Path:
    from reward_models import make_reward_model

    return make_reward_model(tiny_model, tmp_path_factory.mktemp("model") / "reward", mean=2.0, std=4.0)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> dict[str, Path]:
    """24 seed pairs, 8 held-out pairs, 24 prompts of different lengths."""
    folder = tmp_path_factory.mktemp("data")

    def pair(index: int) -> dict:
        return {
            "id": f"pair-{index}",
            "prompt": f"Say {'yes ' * (index % 4)}to {index}",
            "chosen": "yes" + "!" * (index % 5),
            "rejected": "no" + " no" * (index % 3),
        }

    return {
        "pairs": write_jsonl(folder / "pairs.jsonl", [pair(index) for index in range(24)]),
        "held_out": write_jsonl(folder / "held_out.jsonl", [pair(index) for index in range(100, 108)]),
        "prompts": write_jsonl(
            folder / "prompts.jsonl", [{"id": f"p{i}", "prompt": f"What is {'very ' * (i % 3)}{i}?"} for i in range(24)]
        ),
    }


@pytest.fixture
def make_resources(tiny_model, tmp_path):
    """What an oracle works with, on the tiny model in fp32, with changes of the settings by dotted name."""

    def make(resident=False, folder=None, **changes):
        from openrlhf_sgpo.config import Config
        from openrlhf_sgpo.data.tokens import ChatFormat, load_tokenizer
        from openrlhf_sgpo.openrlhf import build_strategy
        from openrlhf_sgpo.oracle import Resources
        from openrlhf_sgpo.training.scoring import Scorer

        config = Config()
        config.model.model_name_or_path = config.ref.model_name_or_path = str(tiny_model)
        # Batches of different lengths, so that there is padding.
        config.train.batch_size = config.train.micro_batch_size = 2
        config.ds.param_dtype, config.ds.zero_stage = "fp32", 0
        for name, value in changes.items():
            group, _, leaf = name.partition("__")
            setattr(getattr(config, group), leaf, value)
        strategy, path = build_strategy(config), folder or tmp_path
        tokenizer = load_tokenizer(str(tiny_model), False, "model.model_name_or_path")
        scorer = Scorer(config, strategy, tokenizer.pad_token_id, path / "log_probs")
        return Resources(config, strategy, ChatFormat(tokenizer, config.data.max_len), scorer, path, resident)

    return make
