"""The robustness study: its gold reward and recipe, its analysis on simulated results with known effects, and a miniature of it
that is stopped and taken up again."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import subprocess
import sys
import time
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import yaml
from running import ROOT, forked

from openrlhf_sgpo import algorithms, run_settings

FOLDER = ROOT / "examples" / "robustness_study"
sys.path.insert(0, str(FOLDER))

from analysis import ACCURACY, OUTCOMES, REWARD, contrasts, table  # noqa: E402
from task import COPIES, SCALE, gold, write_pairs, write_prompts  # noqa: E402

RECIPE = yaml.safe_load((FOLDER / "recipe.yaml").read_text())


def arms_of(contrast: dict) -> set[str]:
    return {contrast["arm"], contrast["minus"], *contrast.get("controls", ())}


def test_gold_counts_what_it_says():
    assert gold("llllll", "aaaa") == SCALE and gold("llllll", "eeee") == -SCALE and gold("ffffff", "llll") == 0
    assert gold("llllll", "llll") - gold("aaaaaa", "llll") == pytest.approx(SCALE * COPIES)
    assert gold("llllll", "ijij") > gold("llllll", "jiji") and gold("llllll", "?!") == gold("llllll", "") == 0


def test_pairs_are_labelled_by_gold():
    random = np.random.default_rng(0)
    prompts = write_prompts(400, random)
    assert len(set(prompts)) == 400

    def differences(pairs: list[dict]) -> np.ndarray:
        return np.array([gold(row["prompt"], row["chosen"]) - gold(row["prompt"], row["rejected"]) for row in pairs])

    assert (differences(write_pairs(prompts, random, clean=True)) >= 0).all()
    drawn = differences(write_pairs(prompts, random, clean=False))
    # Under Bradley and Terry, the better answer is chosen with probability sigmoid(|difference|).
    expected = 1 / (1 + np.exp(-np.abs(drawn)))
    error = np.sqrt((expected * (1 - expected)).sum()) / len(drawn)
    assert abs((drawn > 0).mean() - expected.mean()) < 4 * error


def test_every_arm_of_the_recipe_resolves(monkeypatch):
    # Every look for algorithms of other packages reads the metadata of all packages.
    monkeypatch.setattr(importlib.metadata, "entry_points", cache(importlib.metadata.entry_points))
    arms = RECIPE["arms"]
    common = {f"{group}.{name}": value for group, part in RECIPE["common"].items() for name, value in part.items()}
    given = ["--model.model_name_or_path=m", "--data.dataset=d", "--eval.dataset=e", "--ckpt.output_dir=o"]
    for name, arm in arms.items():
        assert arm.get("of", name) in arms and "flags" in arms[arm.get("of", name)]
        earlier = list(arms)[: list(arms).index(name)]
        assert {arm[key] for key in ("start", "fork") if key in arm} <= set(earlier), (
            "it takes over what is made only later"
        )
        if "of" in arm:
            continue
        if arm["flags"].get("rounds.count") == 0:  # the file's settings of rounds are reset, see run_settings.check
            config, _ = run_settings.load([*given, *(f"--{key}={value}" for key, value in arm["flags"].items())])
            steps = RECIPE["sizes"]["seed"] * RECIPE["common"]["seed"]["max_epochs"] + RECIPE["sizes"]["prompts"]
            assert config.train.max_epochs * RECIPE["sizes"]["seed"] == steps, "as many steps as seed and round"
            assert config.adam.lr == RECIPE["common"]["seed"]["lr"]
            continue
        words = [f"--{key}={value}" for key, value in (common | arm["flags"]).items()]
        config, _ = run_settings.load([*given, "--data.prompt_dataset=p", *words])
        assert config.rounds.count == 1
        if "fork" in arm:
            assert algorithms.get(config.algo).needs.rounds, "its seed stage is DPO, as the base's"
    contrasts = [contrast for family in RECIPE["contrasts"].values() for contrast in family]
    assert {*chain(*map(arms_of, contrasts)), *RECIPE["controls"], RECIPE["base"]} <= arms.keys()


STUDY = {
    "flip_rates": [0.25, 0.0],
    "base": "dpo",
    "controls": ["dpo", "slow", "slower"],
    "arms": {name: {"title": name} for name in ("dpo", "slow", "slower", "better", "further")},
    "contrasts": {
        "family": [
            {"name": "better minus DPO", "arm": "better", "minus": "dpo"},
            {"name": "further minus DPO", "arm": "further", "minus": "dpo"},
        ],
        "alone": [{"name": "slower minus DPO", "arm": "slower", "minus": "dpo", "raw": True}],
    },
}
STEP = {"dpo": 1.0, "slow": 0.8, "slower": 0.6, "better": 0.9, "further": 1.4}
EFFECT = 0.02


def simulate(seeds: int, noise: float, random: np.random.Generator) -> list[dict]:
    """Seeds differ in quality and in what divergence costs them; ``better`` gains EFFECT, ``further`` only diverges more."""
    rows = []
    for rate in STUDY["flip_rates"]:
        for seed in range(seeds):
            quality, slope, divergence = random.normal(0.8, 0.05), random.normal(-0.05, 0.02), random.normal(1.5, 0.2)
            for arm, step in STEP.items():
                kl = step * divergence
                value = quality + slope * kl + EFFECT * (arm == "better") + noise * random.normal()
                row = {"arm": arm, "flip_rate": rate, "seed": seed, "kl": kl, "labels": 0.8}
                rows.append(row | {ACCURACY: value, REWARD: 10 * value})
    return rows


def test_differences_are_paired_and_matched():
    """Without noise, quality and divergence of each seed cancel exactly."""
    rows = simulate(4, 0.0, np.random.default_rng(0))
    effects = {(e.name, e.flip_rate, e.outcome): e for e in contrasts(STUDY, rows)}
    for (name, _, outcome), effect in effects.items():
        scale = 1 if outcome == ACCURACY else 10
        if name == "better minus DPO":
            assert effect.mean == pytest.approx(scale * EFFECT) and effect.error < 1e-9 and effect.p_value < 1e-9
            assert effect.unmatched > effect.mean, "its smaller step helps it too"
        elif name == "further minus DPO":
            assert effect.mean == pytest.approx(0, abs=1e-9) and effect.unmatched < 0
        else:
            assert effect.mean == effect.unmatched > 0
    assert len(effects) == 3 * len(OUTCOMES) * 2


def test_intervals_cover_and_only_what_is_there_is_significant():
    """With five seeds: about 95% coverage, and Holm's family-wise error at most 5%."""
    random, covered, wrong, detected = np.random.default_rng(1), [], [], []
    for _ in range(100):
        effects = contrasts(STUDY, simulate(5, 0.004, random))
        for effect in effects:
            truth = EFFECT if effect.name == "better minus DPO" else 0.0
            truth *= 1 if effect.outcome == ACCURACY else 10
            if effect.family == "family":
                covered.append(abs(effect.mean - truth) <= effect.half)
                (wrong if truth == 0 else detected).append(effect.p_value < 0.05)
    assert 0.92 < np.mean(covered) < 0.98
    assert np.mean(wrong) < 0.04 and np.mean(detected) > 0.5


def test_the_table_marks_what_is_there():
    rows = simulate(6, 0.001, np.random.default_rng(2))
    effects = contrasts(STUDY, rows)
    text = table(STUDY, rows, effects)
    lines = {line.split(" minus")[0]: line for line in text.splitlines()}
    better, further = lines["| better"], lines["| further"]
    assert better.count("*") == 4 and "*" not in further
    assert text.count("flipped: 6 seeds, 5 degrees of freedom") == 2
    # A rate with a single seed has no errors, and is left out.
    rows = [row for row in rows if row["flip_rate"] == 0.25 or row["seed"] == 0]
    effects = contrasts(STUDY, rows)
    assert {effect.flip_rate for effect in effects} == {0.25} and "0% flipped" not in table(STUDY, rows, effects)


@pytest.fixture
def miniature(tmp_path) -> Path:
    recipe = RECIPE | {
        "seeds": [1, 2],
        "pilot_seeds": [3],
        "flip_rates": [0.25],
        "gate": 0.0,
        "policy_steps": 2,
        "sizes": {"seed": 16, "prompts": 24, "held_out": 12},
    }
    recipe["common"] = recipe["common"] | {"eval": {"max_prompts": 8}}
    names = ("seed_only", "dpo", "lr_0.6", "exact_0.05", "rdpo", "rdpo_then_dpo", "longer")
    recipe["controls"] = ["dpo", "lr_0.6"]
    recipe["arms"] = {name: RECIPE["arms"][name] for name in names}
    recipe["contrasts"] = {
        family: [contrast for contrast in members if arms_of(contrast) <= set(names)]
        for family, members in RECIPE["contrasts"].items()
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def study(*argv: str) -> subprocess.CompletedProcess:
    return forked(FOLDER / "study.py", *argv, PYTHONPATH=str(FOLDER))


@pytest.mark.slow
def test_a_miniature_is_stopped_and_goes_on(miniature, tmp_path):
    out = tmp_path / "out"
    argv = ["--out", str(out), "--recipe", str(miniature)]
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / "study.py"), *argv],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    begun = out / "seed_1/flip_0.25/dpo/round_0/manifest.json"
    while process.poll() is None and not begun.exists():
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert begun.exists() and not (out / "seed_2").exists()

    completed = study(*argv)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert "12 of 12  seed_2/flip_0.25/longer" in completed.stdout and "seed_3" not in completed.stdout.split("gold")[1]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 7
    assert all((out / f"{name}.svg").read_text().startswith("<?xml") for name in ("effects", "divergence"))
    folder = out / "seed_1/flip_0.25"
    evaluation = json.loads((folder / "lr_0.6/round_1/evaluation.json").read_text())
    (row,) = (row for row in rows if (row["arm"], row["seed"]) == ("lr_0.6", 1))
    assert row[ACCURACY] == evaluation["accuracy"] and row["kl"] == evaluation["kl"] > 0
    assert (folder / "dpo/round_1/pairs.jsonl").read_bytes() == (folder / "lr_0.6/round_1/pairs.jsonl").read_bytes()
    # Its seed stage leaves the policy of the other run as it was.
    weights = [(folder / f"{name}/round_0/policy/model.safetensors").read_bytes() for name in ("rdpo", "rdpo_then_dpo")]
    assert weights[0] == weights[1]

    again = study(*argv, "--report_only")
    assert again.returncode == 0 and again.stdout.endswith((out / "table.md").read_text())
    miniature.write_text(miniature.read_text().replace("gate: 0.0", "gate: 0.99"))
    other = study(*argv)
    assert other.returncode == 2 and "holds a study with another recipe" in other.stderr


@pytest.mark.slow
def test_weak_labels_stop_the_study(miniature, tmp_path):
    miniature.write_text(miniature.read_text().replace("gate: 0.0", "gate: 1.0"))
    process = study("--out", str(tmp_path / "out"), "--recipe", str(miniature))
    assert process.returncode == 2 and "below the gate of 1.0" in process.stderr
    assert not (tmp_path / "out/seed_1").exists()
