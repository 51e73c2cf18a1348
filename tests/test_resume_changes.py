"""Runs that are resumed with other settings: what nothing depends on goes on, what changes results is refused by name."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from running import ROOT, arguments, contents, killed, read_jsonl, train
from test_plays import flags as plays
from toy_oracles import Letters

from openrlhf_sgpo import algorithms, flags, resume
from openrlhf_sgpo.resume import accepted_changes
from openrlhf_sgpo.run_folder import FREE, RunFolder
from openrlhf_sgpo.run_settings import load

pytestmark = pytest.mark.slow

SEED = {None: ("evaluate",), 0: ("pairs", "train", "evaluate")}  # stages that are finished, by round
FIRST = SEED | {1: ("generate", "pairs", "train", "evaluate")}
STOPPED = SEED | {1: ("generate", "pairs")}  # 12 prompts, of which 6 gave pairs
PLAYED = {None: ("evaluate",), 1: ("play",)}
SETTINGS = {
    "model.model_name_or_path": "m",
    "data.dataset": "d",
    "data.prompt_dataset": "p",
    "eval.dataset": "e",
    "rounds.count": "2",
    "train.batch_size": "8",
}


def configuration(folder: Path, algo: str, changes: dict[str, str]) -> tuple[Any, str]:
    """Settings, and the text by which they are stored."""
    given = SETTINGS | {"algo": algo, "ckpt.output_dir": str(folder)} | changes
    if algo == "slhf":
        given |= {"oracle": "toy_oracles:Letters", "ds.lora.rank": "4"}
        del given["data.dataset"]
    if given["rounds.count"] == "0":
        del given["data.prompt_dataset"]
    config, options = load([word for key, value in given.items() for word in (f"--{key}", *value.split())])
    resolved = {"": replace(config, resume=False), algorithms.get(algo).name: options}
    return replace(config, resume=True), flags.dump(resolved)


def begun(path: Path, stages: dict[int | None, tuple[str, ...]], algo: str = "sgpo", **before: str) -> RunFolder:
    """A run that has come so far. before: its settings, with __ for the dot."""
    folder = RunFolder(str(path))
    _, stored = configuration(path, algo, {name.replace("__", "."): value for name, value in before.items()})
    folder.prepare(stored, resume=False)
    for number, names in stages.items():
        for name in names:
            folder.finish(number, name, {"generate": {"prompts": 12}, "pairs": {"pairs": 6}}.get(name, {}))
    return folder


def accepted(folder: RunFolder, changes: dict[str, str], algo: str = "sgpo") -> set[str]:
    config, resolved = configuration(folder.path, algo, changes)
    return set(accepted_changes(folder, config, algorithms.get(algo), resolved))


@pytest.mark.parametrize(
    "changes",
    [
        {"eval.max_samples": "4", "eval.max_prompts": "2"},
        {"logger.logging_steps": "5", "logger.tensorboard_dir": "elsewhere"},
        {"vllm.num_engines": "4", "vllm.gpu_memory_utilization": "0.3"},
        {"ckpt.save_steps": "10", "ckpt.max_num": "2", "data.limits.too_long": "0.9"},
    ],
)
def test_what_nothing_depends_on_may_always_change(tmp_path, changes):
    folder = begun(tmp_path / "run", FIRST)
    before = (folder.path / "resolved_config.yaml").read_text()
    accepted(folder, changes)
    _, resolved = configuration(folder.path, "sgpo", changes)
    folder.prepare(resolved, resume=True)
    assert (folder.path / "resolved_config.yaml").read_text() != before  # the run goes on with them


@pytest.mark.parametrize(
    ("stages", "changes"),
    [
        (
            {None: ("evaluate",), 0: ("pairs",)},
            {"seed.lr": "1e-5", "train.batch_size": "4", "lr_scheduler": "constant"},
        ),
        (SEED, {"sgpo.radius": "0.5", "train.max_epochs": "2"}),
        (SEED, {"rounds.count": "3"}),  # no round has got its share of the prompts yet
        (FIRST, {"rounds.count": "4", "rounds.prompts": "12 20 20 20"}),
        (FIRST, {"rounds.count": "1", "rounds.prompts": "12"}),
        (STOPPED, {"train.batch_size": "4"}),  # with which 6 pairs are enough for a step
    ],
)
def test_what_only_stages_to_come_read_may_change(tmp_path, stages, changes):
    assert accepted(begun(tmp_path / "run", stages), changes) == changes.keys()


@pytest.mark.parametrize(
    ("stages", "changes", "said"),
    [
        (FIRST, {"adam.lr": "1e-5"}, "--adam.lr: was 5e-07, now 1e-05"),
        (FIRST, {"sgpo.radius": "0.5"}, "--sgpo.radius: was 0.01, now 0.5"),
        (FIRST, {"train.batch_size": "4"}, "--train.batch_size: was 8, now 4"),
        (SEED, {"seed.lr": "1e-5"}, "--seed.lr: was 5e-07, now 1e-05"),
        (SEED, {"adam.betas": "0.8 0.9"}, "--adam.betas: was [0.9, 0.999], now [0.8, 0.9]"),
        # Nothing is trained yet, but the start was measured and the seed chosen with them.
        ({None: ("evaluate",), 0: ("pairs",)}, {"train.seed": "7"}, "--train.seed: was 42, now 7"),
        ({None: ("evaluate",)}, {"model.model_name_or_path": "n"}, "--model.model_name_or_path: was 'm', now 'n'"),
        (SEED, {"rollout.temperature": "0.9"}, "--rollout.temperature: was 0.7, now 0.9"),
    ],
)
def test_what_changes_results_is_refused_by_name(tmp_path, stages, changes, said):
    with pytest.raises(ValueError, match="--resume with another configuration than the run in") as caught:
        accepted(begun(tmp_path / "run", stages), changes | {"eval.max_prompts": "2"})
    assert said in str(caught.value) and "eval.max_prompts" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"rounds.count": "3"}, {"rounds.count": "3", "rounds.prompts": "6 6 6"}])
def test_an_even_split_over_another_number_of_rounds_is_refused_with_the_remedy(tmp_path, changes):
    """The first round had 12 of the prompts, and would now have had others."""
    folder = begun(tmp_path / "run", FIRST)
    with pytest.raises(ValueError, match="--rounds.count: was 2, now 3") as caught:
        accepted(folder, changes)
    assert "The rounds so far had 12 prompts" in str(caught.value) and "give --rounds.prompts 12, " in str(caught.value)
    accepted(folder, {"rounds.count": "3", "rounds.prompts": "12 6 6"})


def test_the_learning_rate_of_later_rounds_may_change_where_that_of_the_seed_stays(tmp_path):
    """--seed.lr is --adam.lr where it is not given."""
    folder = begun(tmp_path / "run", SEED)
    with pytest.raises(ValueError, match="--seed.lr: was 5e-07, now 1e-05") as caught:
        accepted(folder, {"adam.lr": "1e-5"})
    assert "--adam.lr: was" not in str(caught.value) and str(caught.value).endswith(
        "add --seed.lr 5e-07 to keep its value"
    )
    assert accepted(folder, {"adam.lr": "1e-5", "seed.lr": "5e-07"}) == {"adam.lr"}


def test_human_pairs_alone_do_not_become_a_seed_stage(tmp_path):
    folder = begun(tmp_path / "run", SEED, "dpo", rounds__count="0")
    with pytest.raises(ValueError, match="--rounds.count: was 0, now 2") as caught:
        accepted(folder, {"rounds.count": "2"}, "dpo")
    assert "Without rounds the human pairs are trained on with other settings" in str(caught.value)


def test_the_page_of_runs_lists_what_may_change():
    section = (ROOT / "docs/runs.md").read_text(encoding="utf-8").split("## Other settings")[1].split("\n## ")[0]
    settings = (*FREE, *resume.TRAINING, *resume.COUNT)
    assert [
        name for name in settings if f"--{name}" not in section and name != "out"
    ] == []  # --out is of other commands


def test_plays_go_on_while_their_optimiser_is_there(tmp_path):
    """With a schedule that does not know how many rounds there are."""
    for scheduler, checkpoints, goes_on in (
        ("constant", True, True),
        ("constant", False, False),
        ("linear", True, False),
    ):
        folder = begun(tmp_path / f"{scheduler}{checkpoints}", PLAYED, "slhf", lr_scheduler=scheduler)
        if checkpoints:
            folder.path.joinpath("checkpoints").mkdir()
        more = {"rounds.count": "4", "lr_scheduler": scheduler}
        if goes_on:
            assert accepted(folder, more, "slhf") == {"rounds.count"}
        else:
            with pytest.raises(ValueError, match="follows one schedule over all rounds"):
                accepted(folder, more, "slhf")


def begin(tiny_model, tiny_data, folder: Path, **changes: str) -> list[str]:
    """One round of 12 prompts, evaluated with 4 pairs and 3 prompts, unless ``changes`` says otherwise."""
    argv = arguments(tiny_model, tiny_data, folder)
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    given |= {"--rounds.count": "1", "--rounds.prompts": "12", "--eval.max_samples": "4", "--eval.max_prompts": "3"}
    given |= {f"--{name}": value for name, value in changes.items()}
    return [word for pair in given.items() for word in pair[:1] + tuple(pair[1].split())]


def test_other_evaluation_sizes_are_compared_where_both_were_measured(tiny_model, tiny_data, tmp_path):
    """Wins are those over the answers of the start, which are fewer; table and page say so."""
    oracle = {"oracle": "toy_oracles:Letters"}
    argv = begin(tiny_model, tiny_data, tmp_path / "run", **oracle)
    dead = killed("1 round_0/held_out.jsonl.partial", tmp_path / "run", "train", *argv)
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-3000:]
    more = oracle | {"eval.max_samples": "8", "eval.max_prompts": "6"}
    argv = begin(tiny_model, tiny_data, tmp_path / "run", **more)
    process = train(*argv, "--resume", PYTHONPATH=str(ROOT / "tests"))
    assert process.returncode == 0, process.stderr[-3000:]
    start, now = (read_jsonl(tmp_path / "run" / name / "samples.jsonl") for name in ("initial", "round_1"))
    assert (len(start), len(now)) == (3, 6) and [row["id"] for row in start] == [row["id"] for row in now[:3]]
    scores = [[Letters().score(None, row["text"]) for row in rows] for rows in (now[:3], start)]
    wins = fmean(1 / (1 + math.exp(start_reward - reward)) for reward, start_reward in zip(*scores, strict=True))
    row = json.loads((tmp_path / "run/round_1/evaluation.json").read_text())
    assert (row["pairs"], row["prompts"], row["win_rate"]) == (8, 6, pytest.approx(wins))
    note = "of held-out pairs: 4 (start), 8 (round 0, round 1); of prompts: 3 (start), 6 (round 0, round 1); wins"
    assert note in (tmp_path / "run/table.txt").read_text() and note in (tmp_path / "run/report.html").read_text()


def test_a_round_more_is_the_round_of_a_longer_run(tiny_model, tiny_data, tmp_path):
    """A run of one round that has ended goes on to two, with checkpoints and curves that it did not have: the files of a run
    that was to have two from the start."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    assert train(*begin(model, tiny_data, tmp_path / "short")).returncode == 0
    two = {"rounds.count": "2", "rounds.prompts": "12 12"}
    assert train(*begin(model, tiny_data, tmp_path / "long", **two)).returncode == 0
    more = two | {"ckpt.save_steps": "2", "logger.tensorboard_dir": str(tmp_path / "curves")}
    process = train(*begin(model, tiny_data, tmp_path / "short", **more), "--resume")
    assert process.returncode == 0, process.stderr[-3000:]
    assert "--rounds.count: was 1, from now on 2\n--rounds.prompts: was [12], from now on [12, 12]" in process.stdout
    expected = contents(tmp_path / "long")
    assert {
        f"round_2/{name}" for name in ("pairs.jsonl", "worst_case.json", "policy/model.safetensors")
    } <= expected.keys()
    assert contents(tmp_path / "short") == expected
    # Its model is another one by now, under the same name.
    template = Path(model, "chat_template.jinja")
    template.write_text(template.read_text().replace("assistant", "ASSISTANT"))
    process = train(*begin(model, tiny_data, tmp_path / "short", **more), "--resume")
    assert process.returncode == 2
    assert "--model.model_name_or_path and --ref.model_name_or_path changed since the run" in process.stderr


def test_a_round_of_plays_more_is_the_round_of_a_longer_run(tiny_model, tiny_data, tmp_path):
    where, constant = {"PYTHONPATH": str(ROOT / "tests")}, ("--lr_scheduler", "constant")
    three = (*constant, "--rounds.count", "3")
    whole = train(*plays(tiny_model, tiny_data, tmp_path / "long", "online_ipo", *three), **where)
    assert whole.returncode == 0, whole.stderr[-3000:]
    argv = plays(tiny_model, tiny_data, tmp_path / "short", "online_ipo", *constant)
    dead = killed("1 round_2/manifest.json.partial", tmp_path / "short", "train", *argv)
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-3000:]
    process = train(*plays(tiny_model, tiny_data, tmp_path / "short", "online_ipo", *three), "--resume", **where)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "--rounds.count: was 2, from now on 3" in process.stdout
    assert contents(tmp_path / "short") == contents(tmp_path / "long")
