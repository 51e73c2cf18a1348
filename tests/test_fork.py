"""``--ckpt.fork_from``: what one run takes over from another, and when it refuses to."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from running import arguments, losses, read_jsonl, train

from openrlhf_sgpo import algorithms, flags
from openrlhf_sgpo.fork import check_source, take_over
from openrlhf_sgpo.integrity import signed
from openrlhf_sgpo.ledger import read_ledger, write_ledger
from openrlhf_sgpo.run_check import metrics_digest
from openrlhf_sgpo.run_folder import RunFolder, write_json, write_jsonl, write_sealed, write_text
from openrlhf_sgpo.run_settings import load

pytestmark = pytest.mark.slow

DATA = {"--data.dataset": "a", "--eval.dataset": "b", "--data.prompt_dataset": "c"}
STAGES = {
    "initial/evaluate": {"seconds": 1.0, "samples": 8},
    "round_0/pairs": {"seconds": 0.5},
    "round_0/score": {"seconds": 2.0, "tokens_scored": 500},
    "round_0/train": {"seconds": 3.0, "tokens_trained": 1000},
    "round_0/evaluate": {"seconds": 1.5},
    "round_1/generate": {"seconds": 4.0, "samples": 24},
    "round_1/annotate": {"seconds": 2.5},
    "round_1/score": {"seconds": 0.5},
    "round_1/train": {"seconds": 3.5},
    "round_1/evaluate": {"seconds": 1.5},
    "round_10/generate": {"seconds": 9.0},
}
# Of the source's three rounds, what every fork of it is to have.
TAKEN = [
    *(
        "initial/evaluation.json",
        "initial/manifest.json",
        "ledger.json",
        "log_probs/0123.jsonl",
        "log_probs/4567.jsonl",
        "metrics.jsonl",
    ),
    *("round_0/evaluation.json", "round_0/held_out.jsonl", "round_0/manifest.json", "round_0/pairs.jsonl"),
    *("round_0/policy/config.json", "round_0/policy/model.safetensors"),
    *("round_1/manifest.json", "round_1/pairs.jsonl", "round_1/prompts.jsonl", "round_1/responses.jsonl"),
]


def settings(folder: Path, *more: str, algo: str = "sgpo") -> dict:
    """The tree of settings of a run, as the loop stores it, and hands it to ``check_source``."""
    argv = [
        *("--algo", algo, "--model.model_name_or_path", "m", "--data.dataset", "d", "--eval.dataset", "e"),
        *("--ckpt.output_dir", str(folder), *more),
    ]
    argv += [] if "--rounds.count" in more else ["--rounds.count", "2"]
    if algo != "dpo" or argv[argv.index("--rounds.count") + 1] != "0":  # otherwise it would not be read
        argv += ["--data.prompt_dataset", "p"]
    config, options = load(argv)
    return {"": replace(config, resume=False), algorithms.get(algo).name: options}


@pytest.fixture
def source(tmp_path) -> RunFolder:
    """A finished run of SSAPO, made by hand: seed, round 1 and round 2."""
    return make_source(tmp_path / "source")


def make_source(path: Path, *more: str, algo: str = "sgpo") -> RunFolder:
    run = RunFolder(str(path))
    write_text(path / "resolved_config.yaml", signed(flags.dump(settings(path, *more, algo=algo))))
    write_sealed(path / "data.json", DATA)
    write_json(path / "initial/evaluation.json", {"name": "start"})
    run.finish(None, "evaluate", {}, ["evaluation.json"])
    write_jsonl(
        path / "metrics.jsonl",
        [{"stage": f"round {number}", "step": step, "train/loss": 0.5} for number in (0, 1, 2, 10) for step in (1, 2)],
    )
    for number in range(3):
        folder = run.round(number)
        write_jsonl(folder / "pairs.jsonl", [{"id": f"pair of {number}"}])
        for name in ("config.json", "model.safetensors"):
            write_text(folder / "policy" / name, f"{name} of {number}")
        write_json(folder / "evaluation.json", {"name": f"round {number}"})
        write_jsonl(folder / "held_out.jsonl", [{"id": "a", "margin": number}])
        if number:
            write_jsonl(folder / "prompts.jsonl", [{"id": f"prompt of {number}"}])
            write_jsonl(folder / "responses.jsonl", [{"id": f"responses of {number}"}])
            write_json(folder / "worst_case.json", {"value": number})
            run.finish(number, "generate", {"prompts": 12}, ["prompts.jsonl", "responses.jsonl"])
        run.finish(number, "pairs", {"pairs": 1, "oracle": "implicit"}, ["pairs.jsonl"])
        run.finish(number, "train", {"epochs": 1, "metrics": metrics_digest(run, number)}, ["policy"])
        run.finish(number, "evaluate", {}, ["evaluation.json", "held_out.jsonl"])
    for name in ("0123", "4567"):
        write_text(path / f"log_probs/{name}.jsonl", f'\n{{"{name}": -1.5}}\n')
    write_ledger(path / "ledger.json", STAGES)
    write_text(path / "table.txt", "the table of the source")
    return run


def fork(source: RunFolder, path: Path, *more: str, algo: str = "dpo", data: dict[str, str] = DATA) -> RunFolder:
    folder = RunFolder(str(path))
    path.mkdir(exist_ok=True)
    check_source(source, folder, flags.to_dict(settings(path, *more, algo=algo)), data)
    take_over(source, folder)
    return folder


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


def test_seed_stage_and_first_labels_come_along(source, tmp_path):
    before = contents(source.path)
    folder = fork(source, tmp_path / "fork")
    files = contents(folder.path)
    assert sorted(files) == TAKEN
    changed = {"ledger.json", "metrics.jsonl", "round_1/manifest.json"}
    assert {name: files[name] for name in TAKEN if name not in changed} == {
        name: before[name] for name in TAKEN if name not in changed
    }
    # The first round goes on behind its labels: no policy, no certificate, no stage of training.
    assert list(folder.manifest(0)["stages"]) == ["pairs", "train", "evaluate"]
    assert folder.manifest(1)["stages"] == {name: source.manifest(1)["stages"][name] for name in ("generate", "pairs")}
    paid = [name for name in STAGES if name.startswith(("initial/", "round_0/"))]
    paid += ["round_1/generate", "round_1/annotate"]
    assert read_ledger(folder.path / "ledger.json")["stages"] == {name: STAGES[name] for name in paid}
    rows = read_jsonl(folder.path / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("round 0", 1), ("round 0", 2)]
    assert contents(source.path) == before


def test_policies_are_links_and_what_is_appended_to_is_not(source, tmp_path):
    folder = fork(source, tmp_path / "fork")
    for name in ("round_0/policy/model.safetensors", "round_0/pairs.jsonl", "round_1/pairs.jsonl"):
        assert (folder.path / name).samefile(source.path / name), name
    for name in ("log_probs/0123.jsonl", "metrics.jsonl", "ledger.json", "round_1/manifest.json"):
        assert not (folder.path / name).samefile(source.path / name), name
    # A linked file that the fork writes again is another file from then on.
    before = contents(source.path)
    folder.finish(0, "pairs", {"pairs": 7})
    folder.finish(1, "train", {"epochs": 3})
    write_json(folder.round(0) / "evaluation.json", {"name": "other"})
    with open(folder.path / "log_probs/0123.jsonl", "a") as file:
        file.write("more")
    assert contents(source.path) == before


def test_without_links_files_are_copied(source, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("this file system has no links")

    monkeypatch.setattr("os.link", refuse)
    folder = fork(source, tmp_path / "fork")
    assert sorted(contents(folder.path)) == TAKEN
    weights = "round_0/policy/model.safetensors"
    assert not (folder.path / weights).samefile(source.path / weights)
    assert (folder.path / weights).read_text() == (source.path / weights).read_text()


def test_rewards_come_along_where_a_reward_model_ranks(source, tmp_path):
    more = ("--oracle", "reward_model", "--reward.model_name_or_path", "r")
    source = make_source(tmp_path / "judged", *more, algo="iter_dpo")
    write_text(source.path / "rewards/89ab.jsonl", '\n{"x": 2.0}\n')
    folder = fork(source, tmp_path / "fork", *more, "--rounds.loss_reference", "previous")
    assert sorted(contents(folder.path)) == sorted([*TAKEN, "rewards/89ab.jsonl"])


def test_from_a_run_whose_first_round_has_no_labels_yet_only_the_seed_comes(source, tmp_path):
    manifest = source.manifest(1)
    del manifest["stages"]["pairs"], manifest["stages"]["train"], manifest["stages"]["evaluate"]
    write_sealed(source.round(1) / "manifest.json", manifest)
    (source.round(1) / "pairs.jsonl").unlink()
    (source.path / "table.txt").unlink()
    folder = fork(source, tmp_path / "fork")
    assert sorted(contents(folder.path)) == [name for name in TAKEN if not name.startswith("round_1/")]
    stages = read_ledger(folder.path / "ledger.json")["stages"]
    assert stages == {name: STAGES[name] for name in STAGES if name.startswith(("initial/", "round_0/"))}


def test_interrupted_at_any_write_and_repeated(source, tmp_path, monkeypatch):
    """Every file or folder gets its final name by one renaming; the process ends at the first, then at the second, ..."""
    expected = contents(fork(source, tmp_path / "undisturbed").path)
    interruptions = 0
    while True:
        path = tmp_path / f"fork_{interruptions}"
        left = interruptions

        def stop(rename):
            def stopped(self, target):
                nonlocal left
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
                return rename(self, target)

            return stopped

        with monkeypatch.context() as patch:
            for name in ("rename", "replace"):
                patch.setattr(Path, name, stop(getattr(Path, name)))
            try:
                fork(source, path)
                break
            except KeyboardInterrupt:
                interruptions += 1
        fork(source, path)
        assert contents(path) == expected, f"interrupted at write {interruptions}"
    assert interruptions == 7  # round_1 and its manifest, log_probs, ledger, metrics, initial, round_0


def test_what_is_there_stays(source, tmp_path):
    """A fork that went on is called again when it is resumed, by then perhaps without the source."""
    folder = fork(source, tmp_path / "fork")
    write_text(folder.policy(1) / "model.safetensors", "trained here")
    folder.finish(1, "train", {"epochs": 1})
    write_text(folder.path / "metrics.jsonl", "rows of round 0 and 1")
    write_text(folder.path / "ledger.json", "costs of round 0 and 1")
    write_text(folder.path / "log_probs/0123.jsonl", "more scores")
    before = contents(folder.path)
    fork(source, folder.path)
    assert contents(folder.path) == before
    shutil.rmtree(source.path)
    fork(source, folder.path)
    assert contents(folder.path) == before


def refusal(*arguments, **options) -> str:
    path = arguments[1]
    with pytest.raises(ValueError, match="--ckpt.fork_from ") as caught:
        fork(*arguments, **options)
    assert contents(path) == {}, "a refused fork must leave nothing behind"
    return str(caught.value)


def test_no_such_run(tmp_path):
    nowhere = RunFolder(str(tmp_path / "nowhere"))
    assert refusal(nowhere, tmp_path / "fork") == (
        f"--ckpt.fork_from {nowhere.path} is not a run with a finished seed stage"
    )
    assert not nowhere.path.exists()


@pytest.mark.parametrize("unfinished", ["manifest", "configuration"])
def test_unfinished_seed_stage(source, tmp_path, unfinished):
    if unfinished == "configuration":
        (source.path / "resolved_config.yaml").unlink()
    else:
        write_sealed(source.round(0) / "manifest.json", {"round": 0, "stages": {"pairs": {}}})
    assert "is not a run with a finished seed stage" in refusal(source, tmp_path / "fork")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--train.seed", "7"], ["--train.seed: 42 there, 7 here"]),
        (["--model.beta", "0.5"], ["--model.beta: 0.1 there, 0.5 here"]),
        (["--seed.flip_rate", "0.25"], ["--seed.flip_rate: 0.0 there, 0.25 here"]),
        (["--rounds.count", "1"], ["--rounds.count: 2 there, 1 here"]),
        (["--rollout.temperature", "0.9"], ["--rollout.temperature: 0.7 there, 0.9 here"]),
        (["--adam.lr", "1e-3"], ["--seed.lr: 5e-07 there, 0.001 here"]),  # where --seed.lr is not given, it follows
        (["--adam.eps", "1e-4", "--max_norm", "2"], ["--adam.eps: 1e-08 there, 0.0001 here", "--max_norm: 1.0 there"]),
        (
            ["--oracle", "reward_model", "--reward.model_name_or_path", "r"],
            ["--oracle: 'implicit' there, 'reward_model' here", "--reward.model_name_or_path: '' there, 'r' here"],
        ),
    ],
)
@pytest.mark.parametrize("algo", ["sgpo", "dpo"])
def test_other_settings_are_named(source, tmp_path, more, said, algo):
    message = refusal(source, tmp_path / "fork", *more, algo=algo)
    assert "has other settings" in message
    listed = [line.strip() for line in message.splitlines()[1:]]
    assert len(listed) == len(said)
    assert all(line.startswith(start) for line, start in zip(sorted(listed), sorted(said), strict=True)), listed


@pytest.mark.parametrize("name", DATA)
def test_other_data(source, tmp_path, name):
    message = refusal(source, tmp_path / "fork", data=DATA | {name: "x"})
    assert message == f"--ckpt.fork_from {source.path}: {name} had another content in that run"


@pytest.mark.parametrize(("there", "here"), [("rdpo", "dpo"), ("sgpo", "rdpo"), ("rdpo", "rdpo"), ("ipo", "sgpo")])
def test_seed_stages_with_a_loss_of_their_own_are_not_shared(tmp_path, there, here):
    source = make_source(tmp_path / "source", algo=there)
    message = refusal(source, tmp_path / "fork", algo=here)
    alone = there if there != "sgpo" else here
    assert message.endswith(f"the seed stage of --algo {alone} has its own loss, so it cannot be shared")


def test_a_stage_on_human_pairs_alone_is_no_seed_stage(tmp_path):
    """It has other settings than a seed stage, --train.max_epochs and --adam.lr, which forks may change."""
    source = make_source(tmp_path / "source", "--rounds.count", "0", algo="dpo")
    assert "--seed.lr: 0.0 there, 5e-07 here" in refusal(source, tmp_path / "fork", algo="sgpo")


@pytest.mark.parametrize(
    ("algo", "more"),
    [
        ("sgpo", ["--sgpo.radius", "0.5", "--sgpo.refresh_steps", "4"]),
        ("spa", ["--spa.smoothing", "0.2"]),
        ("dpo", ["--rounds.loss_reference", "previous"]),
        ("dpo", ["--adam.lr", "1e-3", "--seed.lr", "5e-7"]),
        ("dpo", ["--train.max_epochs", "3"]),
        ("sgpo", ["--ckpt.save_steps", "5", "--ckpt.max_num", "2", "--logger.logging_steps", "3"]),
        ("sgpo", ["--ckpt.fork_from", "source"]),
    ],
)
def test_what_only_the_leader_reads_may_differ(source, tmp_path, algo, more):
    assert sorted(contents(fork(source, tmp_path / "fork", *more, algo=algo).path)) == TAKEN


def test_a_forked_run_is_the_run_that_made_everything_itself(tiny_model, tiny_data, tmp_path):
    """DPO with a round of its own, DPO forked from SSAPO, and forked SSAPO of radius 0: the same policy to the last bit."""

    def run(name, algo, *more):
        argv = arguments(tiny_model, tiny_data, tmp_path / name)
        for flag, value in (("--algo", algo), ("--rounds.count", "1")):
            argv[argv.index(flag) + 1] = value
        process = train(*argv, *more)
        assert process.returncode == 0, process.stderr[-3000:]
        return tmp_path / name

    ssapo = run("ssapo", "sgpo", "--sgpo.radius", "0.5")
    source = ("--ckpt.fork_from", str(ssapo))
    forked, zero = run("fork", "dpo", *source), run("zero", "sgpo", *source, "--sgpo.radius", "0")
    alone = run("dpo", "dpo")
    policy = "round_1/policy/model.safetensors"
    for folder in (forked, zero):
        assert (folder / "round_0/policy/model.safetensors").samefile(ssapo / "round_0/policy/model.safetensors")
        for name in (policy, "round_0/policy/model.safetensors", "round_1/responses.jsonl", "round_1/pairs.jsonl"):
            assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
        assert losses(folder) == losses(alone)
        for name in ("initial", "round_0", "round_1"):
            figures = json.loads((folder / name / "evaluation.json").read_text())
            assert ("worst_case" in figures) == (folder == zero and name == "round_1")
            figures.pop("worst_case", None)
            assert figures == json.loads((alone / name / "evaluation.json").read_text())
        # Every log-probability that the round's training needs had been taken for the labels and the seed before.
        stages = json.loads((folder / "ledger.json").read_text())["stages"]
        assert stages["round_1/score"]["tokens_scored"] == 0 < stages["round_1/train"]["tokens_trained"]
    assert (ssapo / policy).read_bytes() != (alone / policy).read_bytes(), "the radius made no difference"
    # Rounds of --algo dpo annotate themselves.
    assert {pair["source"] for pair in read_jsonl(alone / "round_1/pairs.jsonl")} == {"implicit"}
    assert not (alone / "round_1/worst_case.json").exists() and (zero / "round_1/worst_case.json").exists()
