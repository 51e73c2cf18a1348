"""``openrlhf-sgpo compare --suite FILE``: train every algorithm with every seed, then compare them.

A suite is a YAML file. ``common`` holds settings of ``train`` for all; the ``settings`` of an algorithm are merged into them
(keys nested or dotted; null removes a common setting). Each run has its own process and its own folder, OUT/NAME/seed_S.
"""

from __future__ import annotations

import os.path
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from openrlhf_sgpo import algorithms, flags, keys, oracle, run_settings, yaml_files
from openrlhf_sgpo.comparison.settings import inference, read_settings
from openrlhf_sgpo.launch import end_with_parent
from openrlhf_sgpo.run_folder import ADDRESS, differences, read_configuration, write_text

Tree = dict[str, Any]

_KEYS = ("out", "seeds", "algorithms", "common", "compare")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_TAKEN = ("start", "comparison", "compare.yaml")
_ALGORITHM_KEYS = ("name", "settings", "trials", "fork_from")


@dataclass(frozen=True)
class Entry:
    """An algorithm of a suite. settings: those of ``train``, nested, including the common ones. fork_from: the algorithm whose
    seed stage and first samples it reuses, see ``--ckpt.fork_from``."""

    name: str
    settings: Tree
    trials: int = 1
    fork_from: str = ""


@dataclass(frozen=True)
class Suite:
    """A parsed suite file. compare: settings of ``compare``, nested."""

    out: Path
    seeds: list[int]
    entries: list[Entry]
    compare: Tree = field(default_factory=dict)

    def folder(self, name: str, seed: int) -> Path:
        return self.out / name / f"seed_{seed}"


@dataclass(frozen=True)
class SuiteRun:
    """One run. words: arguments of ``train``. resolved: the complete settings that follow from them."""

    folder: Path
    words: list[str]
    resolved: Tree

    @property
    def finished(self) -> bool:
        return (self.folder / "table.txt").exists()

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")


def train_suite(argv: Sequence[str]) -> list[str]:
    """Train all unfinished runs; returns the arguments of ``compare`` for them. argv: arguments of ``compare``, with
    ``--suite``; they override the file's ``compare``.

    All settings are checked before the first run starts, and a judge's server is called once. Raises ValueError, also for a
    run that fails.
    """
    if any(word.partition("=")[0] == "--config" for word in argv):
        raise flags.SettingsError(
            "--config: leave it out; put settings of the comparison under `compare` in the file of --suite"
        )
    if taken := [word for word in argv if word.partition("=")[0] in ("--runs", "--trials")]:
        raise flags.SettingsError(f"{taken[0]}: --suite says which runs are compared; leave it out")
    suite = read_suite(Path(flags.peek(argv, "suite") or ""))
    runs = prepare_runs(suite)
    words = _compare_words(suite, argv)
    settings = read_settings(words, runs[0].resolved)
    held_out = {run.resolved["eval"]["dataset"] for run in runs}
    if not settings.prompts and (len(held_out) > 1 or "" in held_out):
        raise flags.SettingsError(
            "--prompts: missing, the algorithms do not share an --eval.dataset; give a file of prompts"
        )
    if settings.oracle == "judge":
        oracle.get(settings.oracle).check(inference(settings, "", ""))
    for number, run in enumerate(runs, start=1):
        train_run(run, f"{number} of {len(runs)}")
    return words


def read_suite(path: Path) -> Suite:
    """The suite in a YAML file. Raises flags.SettingsError with every problem of the file's own keys."""
    try:
        tree = yaml_files.load(path)
    except ValueError as error:
        raise flags.SettingsError(f"--suite {error}") from error
    # API keys first: nothing from a file that holds one is written to disk.
    problems = list(_refused(tree)) or list(_suite_problems(tree))
    flags.refuse([f"--suite {path}: {problem}" for problem in problems])
    common = nested(tree.get("common") or {})
    entries = [
        Entry(**item | {"settings": merged(common, nested(item.get("settings") or {}))}) for item in tree["algorithms"]
    ]
    return Suite(Path(tree["out"]), tree["seeds"], entries, nested(tree.get("compare") or {}))


def prepare_runs(suite: Suite) -> list[SuiteRun]:
    """The runs in training order, one algorithm after the other; writes the settings files that they read.

    Raises flags.SettingsError with the problems of each run's settings, and for folders that hold a run with other settings.
    """
    problems, runs = [], []
    for entry in suite.entries:
        file = suite.out / entry.name / "settings.yaml"
        write_text(file, yaml.safe_dump(entry.settings, sort_keys=False))
        for seed in suite.seeds:
            folder = suite.folder(entry.name, seed)
            words = ["--config", str(file), "--train.seed", str(seed), "--ckpt.output_dir", str(folder)]
            if entry.fork_from:
                words += ["--ckpt.fork_from", str(suite.folder(entry.fork_from, seed))]
            try:
                runs.append(SuiteRun(folder, words, _resolved(words, folder)))
            except flags.SettingsError as error:
                problems += [f"{entry.name}: {problem}" for problem in error.args]
                break
    flags.refuse(problems)
    return runs


def train_run(run: SuiteRun, position: str) -> None:
    """Finish the run in a separate process, whose output goes to the log beside the folder. position: shown as progress.

    Raises ValueError if it fails.
    """
    if run.finished:
        print(f"{position}: {run.folder} is finished", flush=True)
        return
    print(f"{position}: {run.folder}, see {run.log}", flush=True)
    resume = ["--resume"] if (run.folder / "resolved_config.yaml").exists() else []
    command = [sys.executable, "-m", "openrlhf_sgpo.cli.main", "train", *run.words, *resume]
    begin = time.monotonic()
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a", encoding="utf-8") as log:
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, check=False, preexec_fn=end_with_parent
        ).returncode
    if code or not run.finished:
        raise ValueError(f"--suite: the run {run.folder} failed ({code}), see {run.log}; the same command continues it")
    print(f"{position}: finished in {time.monotonic() - begin:.0f} s", flush=True)


def nested(tree: Mapping[str, Any]) -> Tree:
    """The same settings with dotted keys as groups: {"a.b": 1} is {"a": {"b": 1}}."""
    result: Tree = {}
    for key, value in tree.items():
        value = nested(value) if isinstance(value, dict) else value
        for part in reversed(str(key).split(".")):
            value = {part: value}
        result = merged(result, value, keep_null=True)
    return result


def merged(base: Mapping[str, Any], change: Mapping[str, Any], keep_null: bool = False) -> Tree:
    """``base`` with the values of ``change``, group by group; null removes a key (JSON Merge Patch, RFC 7396)."""
    result = dict(base)
    for key, value in change.items():
        if isinstance(value, dict):
            group = result.get(key)
            result[key] = merged(group if isinstance(group, dict) else {}, value, keep_null)
        elif value is None and not keep_null:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def _refused(value: Any, name: str = "") -> Iterator[str]:
    """Problems of settings that hold an API key or an address with a password, anywhere in the file."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _refused(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _refused(item, name)
    elif problem := keys.refused(name, value):
        yield f"{name} {problem}"


def _suite_problems(tree: Any) -> Iterator[str]:
    if not isinstance(tree, dict) or not isinstance(tree.get("algorithms"), list):
        yield f"expected a mapping with {', '.join(_KEYS)}, where algorithms is a list"
        return
    yield from (f"{key} is unknown, use {', '.join(_KEYS)}" for key in tree if key not in _KEYS)
    yield from (
        f"{key}: expected settings" for key in ("common", "compare") if not isinstance(tree.get(key) or {}, dict)
    )
    if not isinstance(tree.get("out"), str):
        yield "out: missing, give a folder"
    seeds = tree.get("seeds")
    if not isinstance(seeds, list) or {type(seed) for seed in seeds} != {int} or len(set(seeds)) < len(seeds):
        yield "seeds: give a list of different integers"
    names: list[str] = []
    for number, item in enumerate(tree["algorithms"], start=1):
        name = item.get("name") if isinstance(item, dict) else None
        # A name becomes a folder beside the suite's own files.
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in {*map(str.lower, names), *_TAKEN}:
            yield (
                f"algorithm {number}: give a unique name of at most 100 letters, digits, '_', '.' and '-', which begins with a "
                f"letter or digit and is none of {', '.join(_TAKEN)}"
            )
            continue
        yield from (
            f"{name}: {key} is unknown, use {', '.join(_ALGORITHM_KEYS)}" for key in item if key not in _ALGORITHM_KEYS
        )
        if not isinstance(item.get("settings") or {}, dict):
            yield f"{name}: expected settings under settings"
        if type(item.get("trials", 1)) is not int or item.get("trials", 1) < 1:
            yield f"{name}: trials {item['trials']!r} is not an integer of at least 1"
        if item.get("fork_from", name) not in [*names, name] or item.get("fork_from") == name:
            yield f"{name}: fork_from {item['fork_from']} is not an algorithm before it in the list"
        names.append(name)


def _resolved(words: list[str], folder: Path) -> Tree:
    """The complete settings of the run. Raises flags.SettingsError, also if the folder holds a run with other settings."""
    settings, options = run_settings.load(words)
    resolved = flags.to_dict({"": replace(settings, resume=False), algorithms.get(settings.algo).name: options})
    stored = folder / "resolved_config.yaml"
    if stored.exists():
        changed = differences(read_configuration(stored), resolved)
        listed = [f"--{key} {old!r}, now {new!r}" for key, (old, new) in changed.items() if key not in ADDRESS]
        if listed:
            raise flags.SettingsError(
                f"{folder} holds a run with {'; '.join(listed)}; choose another out, or remove that folder"
            )
    return resolved


def _compare_words(suite: Suite, argv: Sequence[str]) -> list[str]:
    """Arguments of ``compare``: the file's settings, then ``argv`` without ``--suite``."""
    groups = [
        f"{entry.name}={','.join(str(suite.folder(entry.name, seed)) for seed in suite.seeds)}"
        for entry in suite.entries
    ]
    trials = [f"{entry.name}={entry.trials}" for entry in suite.entries]
    tree = {"out": str(suite.out / "comparison"), **suite.compare, "runs": groups, "trials": trials}
    file = suite.out / "compare.yaml"
    write_text(file, yaml.safe_dump(tree, sort_keys=False))
    index = next(index for index, word in enumerate(argv) if word.partition("=")[0] == "--suite")
    overrides = [*argv[:index], *argv[index + (1 if "=" in argv[index] else 2) :]]
    words = ["--config", str(file), *overrides]
    out = flags.peek(words, "out") or ""
    stored = os.path.exists(os.path.join(out, "resolved_config.yaml"))
    return [*words, "--resume"] if stored and "--resume" not in overrides else words
