"""``openrlhf-sgpo compare``: real small runs head to head, what is refused, and resume after a kill."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import yaml
from comparing import arguments
from running import ROOT, forked, killed_at, read_jsonl, train
from tiny import write_jsonl
from toy_oracles import Letters

from openrlhf_sgpo.comparison.compare import _records
from openrlhf_sgpo.comparison.compared_runs import group_warnings, oracle_warnings, read_groups
from openrlhf_sgpo.comparison.settings import load
from openrlhf_sgpo.flags import SettingsError, dump
from openrlhf_sgpo.integrity import signed
from openrlhf_sgpo.ledger import write_ledger
from openrlhf_sgpo.run_folder import RunFolder, write_json, write_sealed, write_text
from openrlhf_sgpo.run_settings import load as load_run

ORACLE = ("--oracle", "toy_oracles:Letters")
PATH = {"PYTHONPATH": str(ROOT / "tests")}


def finished(
    folder: Path, *more: str, algo: str = "sgpo", seed: int = 1, model: str = "model", pairs: int = 8, **data: str
) -> Path:
    """What a run of ``algo`` leaves, as far as settings and folders are looked at."""
    needed = ORACLE if algo == "nash_md" else ("--data.dataset", "pairs.jsonl")
    words = [
        "--algo",
        algo,
        *arguments(Path(model), {"held_out": "h.jsonl", "prompts": "p.jsonl"}, folder, seed),
        *needed,
    ]
    config, options = load_run([*words, *more])
    run = RunFolder(str(folder))
    stage = "play" if algo == "nash_md" else "train"
    for number in (1,) if stage == "play" else (0, 1):
        write_text(run.policy(number) / "config.json", "{}")
        run.finish(number, stage, {}, ["policy"])
        run.finish(number, "evaluate", {})
    run.finish(None, "evaluate", {})
    write_json(run.round(1) / "evaluation.json", {"name": "round 1", "pairs": pairs})
    (folder / "resolved_config.yaml").write_text(signed(dump({"": config, algo: options})))
    write_sealed(folder / "data.json", {"--data.dataset": "1", "--eval.dataset": "2"} | data)
    names = [f"round_{number}/{name}" for number in (0, 1) for name in ("train", "play", "evaluate")]
    write_ledger(folder / "ledger.json", {name: {"seconds": 1.0} for name in names})
    (folder / "table.txt").write_text("")
    return folder


def refused(*argv: object) -> str:
    with pytest.raises(ValueError) as caught:
        load([*map(str, argv)])
    return str(caught.value)


def test_folders_of_one_algorithm_are_its_seeds(tmp_path):
    runs = [finished(tmp_path / f"s{seed}", seed=seed) for seed in (1, 2)]
    nash = finished(tmp_path / "n", algo="nash_md")
    groups = read_groups([*map(str, runs), str(nash)], ["nash_md=4"])
    assert [(group.name, [run.seed for run in group.runs], group.trials) for group in groups] == [
        ("sgpo", [1, 2], 1),
        ("nash_md", [1], 4),
    ]
    assert groups[0].runs[0].policy.folder == str(runs[0] / "round_1/policy")
    named = read_groups([f"one={runs[0]}", f"two={runs[1]},{nash}"], [])
    assert [(group.name, len(group.runs)) for group in named] == [("one", 1), ("two", 2)]


def test_other_settings_need_a_name(tmp_path):
    first, second = finished(tmp_path / "a"), finished(tmp_path / "b", "--sgpo.radius", "0", seed=2)
    message = refused("--runs", first, second, "--out", tmp_path / "out", *ORACLE)
    assert "differ in --sgpo.radius; name them NAME=FOLDER" in message
    both = read_groups([f"mine={first},{second}", f"x={finished(tmp_path / 'c')}"], [])
    assert "the runs of mine differ in --sgpo.radius" in group_warnings(both)


def test_how_answers_are_drawn_is_the_first_run_s(tmp_path):
    first, second = finished(tmp_path / "a"), finished(tmp_path / "b", "--sgpo.radius", "0")
    settings, _ = load(["--runs", f"a={first}", f"b={second}", "--out", "o", *ORACLE, "--rollout.temperature", "0.5"])
    rollout = settings.rollout
    assert (rollout.engine, rollout.max_new_tokens, rollout.temperature) == ("hf", 8, 0.5)
    assert (settings.data.max_len, settings.ds.param_dtype, settings.train.seed) == (128, "fp32", 1)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda run: shutil.rmtree(run), "is not a run folder: it has no resolved_config.yaml"),
        (lambda run: (run / "resolved_config.yaml").write_text(signed("out: x\n")), "is not a run folder"),
        (lambda run: (run / "table.txt").unlink(), "is unfinished; finish it with train --resume"),
    ],
)
def test_what_is_no_finished_run(tmp_path, spoil, expected):
    first, second = finished(tmp_path / "a"), finished(tmp_path / "b", algo="nash_md")
    spoil(second)
    assert expected in refused("--runs", first, second, "--out", tmp_path / "out", *ORACLE)
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_compared(tmp_path):
    first = finished(tmp_path / "a")
    second = finished(tmp_path / "b", "--ref.model_name_or_path", "model", algo="nash_md", model="larger")
    words = ("--out", tmp_path / "out", *ORACLE)
    message = refused("--runs", first, second, *words)
    assert f"the initial model of {second} is larger, of {first} model; compare runs of one model" in message
    assert "initial reference" not in message
    assert "at least two algorithms" in refused("--runs", first, *words)
    assert f"{first} is given twice" in refused("--runs", first, f"x={first},{first}", *words)
    again = finished(tmp_path / "c")
    assert "have the same --train.seed 1" in refused("--runs", first, again, *words)
    assert "one name" in refused("--runs", f"start={first}", f"b={again}", *words)
    message = refused("--runs", f"a={first}", f"b={again}", *words, "--trials", "a=2", "a=3", "c=1", "b=0")
    assert [line.split(":")[0] for line in message.splitlines()] == ["--trials a=3", "--trials c=1", "--trials b=0"]


def test_settings_that_are_missing_or_that_nothing_reads(tmp_path):
    lines = refused().splitlines()
    assert [line.split(":")[0] for line in lines] == ["--runs", "--out", "--oracle"]
    runs = ("--runs", f"a={finished(tmp_path / 'a')}", f"b={finished(tmp_path / 'b')}", "--out", tmp_path / "out")
    message = refused(*runs, *ORACLE, "--judge.model", "m", "--beta", "2", "--vllm.num_engines", "2", "--split", "x")
    assert [line.split(":")[0] for line in message.splitlines()] == [
        *("--split", "--vllm.num_engines", "--judge.model", "--beta")
    ]
    assert "--judge.base_url: missing" in refused(*runs, "--oracle", "judge")
    assert "--oracle: " in refused(*runs, "--oracle", "nobody")
    message = refused(*runs, *ORACLE, "--rollout.max_new_tokens", "128", "--max_prompts", "-1")
    assert "--rollout.max_new_tokens: 128 leaves no room" in message
    assert "--max_prompts: -1" in message
    with pytest.raises(SettingsError, match="did you mean --runs"):
        load(["--run", "a"])


def test_warnings_where_the_conditions_were_not_equal(tmp_path):
    data = {"--data.dataset": "other"}
    texts = [
        *(str(finished(tmp_path / f"s{seed}", seed=seed)) for seed in (1, 2)),
        str(finished(tmp_path / "n", algo="nash_md", pairs=4, **data)),
    ]
    groups = read_groups(texts, [])
    assert group_warnings(groups) == [
        "the numbers of seeds differ: sgpo 2, nash_md 1",
        "nash_md has one seed: its intervals say nothing about other seeds",
        "the runs were trained on different human pairs",
        "the runs were measured on different numbers of held-out pairs (4, 8), so accuracy and margin cannot be compared",
        "--model.beta, the unit of margins, differs: sgpo 0.1, nash_md 0.008",
    ]
    assert oracle_warnings(groups, ORACLE[1], "", "") == [
        "--oracle toy_oracles:Letters, which compares them, also trained nash_md, but not sgpo"
    ]
    assert (
        oracle_warnings(groups, ORACLE[1], "another model", "") == oracle_warnings(groups[1:], ORACLE[1], "", "") == []
    )


def test_without_prompts_they_are_those_that_all_runs_saw(tiny_data, capsys):
    def run(size: int) -> SimpleNamespace:
        held_out = {"dataset": str(tiny_data["held_out"]), "split": "", "max_samples": size}
        return SimpleNamespace(settings={"eval": held_out}, digests=lambda: {"--eval.dataset": "the same"})

    def records(sizes: list[int], count: int = 0) -> int:
        settings = SimpleNamespace(prompts="", max_prompts=count)
        return len(_records(settings, [run(size) for size in sizes]))

    assert records([6, 6]) == 6 and records([0, 0]) == 8 and capsys.readouterr().out == ""
    assert records([6, 4, 0]) == records([0, 4]) == 4 and records([6, 4], 3) == 3
    assert "differ in --eval.max_samples: all are compared on the first 4 held-out prompts" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_data, tmp_path_factory) -> list[str]:
    """SGPO with two seeds, and Nash-MD."""
    folder = tmp_path_factory.mktemp("runs")
    sgpo = ("--algo", "sgpo", "--data.dataset", str(tiny_data["pairs"]))
    folders = []
    for name, seed, more in (
        ("sgpo_1", 1, sgpo),
        ("sgpo_2", 2, sgpo),
        ("nash", 1, ("--algo", "nash_md", *ORACLE, "--rounds.steps", "3", "--logger.logging_steps", "2")),
    ):
        process = train(*arguments(tiny_model, tiny_data, folder / name, seed, *more), **PATH)
        assert process.returncode == 0, process.stderr[-3000:]
        folders.append(str(folder / name))
    return folders


def words(runs: list[str], out: Path, *more: str) -> list[str]:
    return ["compare", *runs, "--out", str(out), *ORACLE, "--max_prompts", "6", *more]


def compare(runs: list[str], out: Path, *more: str) -> str:
    process = forked(None, *words(runs, out, *more), **PATH)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "out"
    said = compare(runs, out, "--trials", "sgpo=5")
    assert (out / "table.txt").read_text() in said
    return out


def rows(out: Path, stage: str) -> list[dict]:
    return read_jsonl(out / f"stages/{stage}.jsonl")


def wins(first: list[list[dict]], second: list[list[dict]]) -> list[float]:
    """sigmoid(letters of the first - letters of the second) for all pairs of seeds and prompts."""
    score = Letters().score
    return [
        1 / (1 + math.exp(score(None, b["text"]) - score(None, a["text"])))
        for left in first
        for right in second
        for a, b in zip(left, right, strict=True)
    ]


@pytest.mark.slow
def test_every_policy_meets_every_other(compared, runs):
    comparison = json.loads((compared / "comparison.json").read_text())
    sgpo, nash = [rows(compared, f"answers_sgpo_{seed}") for seed in (1, 2)], [rows(compared, "answers_nash_md_1")]
    start = [rows(compared, "answers_start")]
    assert comparison["prompts"] == 6 and comparison["oracle"] == {"name": ORACLE[1]}
    (pair,) = comparison["cross_play"]
    assert (pair["first"], pair["second"], pair["comparisons"]) == ("sgpo", "nash_md", 2 * 6)
    assert pair["win_rate"] == pytest.approx(mean(wins(sgpo, nash)))
    assert pair["low"] <= pair["win_rate"] <= pair["high"] and pair["p_holm"] == pair["p_value"]
    for row, answers in zip(comparison["versus_start"], (sgpo, nash), strict=True):
        assert row["win_rate"] == pytest.approx(mean(wins(answers, start)))

    first, second = comparison["groups"]
    assert [run["seed"] for run in first["runs"]] == [1, 2]
    evaluations = [json.loads(Path(run, "round_1/evaluation.json").read_text()) for run in runs]
    for name in ("accuracy", "margin"):
        assert first["figures"][name]["values"] == [evaluation[name] for evaluation in evaluations[:2]]
        assert second["figures"][name]["mean"] == evaluations[2][name]
    lengths = [mean(row["tokens"] for row in answers) for answers in sgpo]
    assert first["figures"]["response_length"]["values"] == pytest.approx(lengths)
    assert 0 < first["figures"]["kl"]["mean"] == pytest.approx(comparison["versus_start"][0]["kl"])
    shown = comparison["samples"][0]
    assert shown["answers"] == {"start": start[0][0]["text"], "sgpo": sgpo[0][0]["text"], "nash_md": nash[0][0]["text"]}
    assert comparison["worst_case"] is None, "beta, the unit of margins, differs"
    assert (compared / "report.html").exists()


@pytest.mark.slow
def test_the_costs_are_those_of_training(compared, runs):
    comparison = json.loads((compared / "comparison.json").read_text())
    first, second = (group["ledger"] for group in comparison["groups"])
    # A seed stage of 24 pairs and a round of 24 prompts, two samples each, in steps of four; three steps of four prompts.
    pairs = [len(read_jsonl(Path(run, "round_1/pairs.jsonl"))) for run in runs[:2]]
    assert first["steps"] == 24 // 4 + mean(count // 4 for count in pairs)
    assert [len(read_jsonl(Path(run, "metrics.jsonl"))) for run in runs] == [6 + pairs[0] // 4, 6 + pairs[1] // 4, 1]
    assert (first["samples"], second["samples"], second["steps"]) == (48, 3 * 4 * 2, 3)
    for run, ledger in ((runs[0], None), (runs[2], second)):
        stages = json.loads(Path(run, "ledger.json").read_text())["stages"]
        trained = sum(cost.get("tokens_trained", 0) for cost in stages.values())
        assert trained > 0 and (ledger is None or ledger["tokens_trained"] == trained)
    assert (first["trials"], second["trials"]) == (5, 1)
    words = Counter(warning.split(":")[0] for warning in comparison["warnings"])
    for budget in ("samples", "steps", "trials", "tokens trained"):
        assert words[f"the budgets of {budget} differ"] == 1


@pytest.mark.slow
def test_the_divergence_is_over_the_whole_vocabulary(compared, runs, tiny_model):
    """Again with plain transformers, token by token: sum over the answer of KL(policy || start)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = yaml.safe_load(Path(runs[0], "resolved_config.yaml").read_text())["eval"]["dataset"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (Path(runs[1], "round_1/policy"), tiny_model)
    ]
    answers, divergences = rows(compared, "answers_sgpo_2"), rows(compared, "kl_sgpo_2")
    for question, answer, divergence in zip(read_jsonl(Path(prompts)), answers, divergences, strict=False):
        assert question["id"] == answer["id"] == divergence["id"]
        messages = [{"role": "user", "content": question["prompt"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        context = tokenizer(text, add_special_tokens=False)["input_ids"]
        response = answer["token_ids"]
        with torch.no_grad():
            policy, start = (
                model(torch.tensor([context + response])).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
                for model in models
            )
        assert divergence["kl"] == pytest.approx((policy.exp() * (policy - start)).sum().item(), abs=1e-3)


@pytest.mark.slow
def test_a_killed_comparison_ends_as_if_nothing_had_happened(runs, tmp_path):
    killed_at(
        lambda writes: range(3, writes, writes // 5), tmp_path, lambda out: words(runs, out, "--trials", "sgpo=5")
    )
    for path in tmp_path.glob("write_*/judgements/letters.jsonl"):
        # A line without an end is that of a kill.
        keys = [json.loads(line)["key"] for line in path.open() if line.endswith("}\n")]
        assert len(keys) == len(set(keys)), "no answer is judged twice"


@pytest.mark.slow
def test_prompts_of_its_own_and_what_keeps_a_folder_from_being_taken_up(compared, runs, tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"id": f"q{i}", "prompt": f"Count to {i}"} for i in range(8)])
    out = tmp_path / "out"
    compare(runs, out, "--prompts", str(prompts))
    assert [row["id"] for row in rows(out, "answers_start")] == [f"q{i}" for i in range(6)]

    def fails(*flags: str) -> str:
        process = forked(None, "compare", *runs, *ORACLE, "--max_prompts", "6", *flags, **PATH)
        assert process.returncode == 2
        return process.stderr.splitlines()[-1]

    again = ("--out", str(out), "--prompts", str(prompts))
    assert "already holds a run: add --resume" in fails(*again)
    write_jsonl(prompts, [{"id": f"q{i}", "prompt": f"Count from {i}"} for i in range(8)])
    assert "--prompts changed since" in fails(*again, "--resume")
    assert "no such file" in fails("--out", str(tmp_path / "other"), "--prompts", "nowhere.jsonl").lower()
    assert not (tmp_path / "other").exists()
