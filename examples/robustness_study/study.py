"""Which losses help when labels are flipped, and why: many small runs of ``openrlhf-sgpo train`` in a world with a gold reward.

    python examples/robustness_study/study.py --out FOLDER

The same command goes on where it was stopped. Runs are ordered by flip rate, then by seed, so the first two seeds make a table.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from analysis import ACCURACY, REWARD, contrasts, draw, table
from task import gold, write_pairs, write_policy, write_prompts

import openrlhf_sgpo.loop  # noqa: F401  the runs are forks of this process: what it imports, they need not
from openrlhf_sgpo import yaml_files
from openrlhf_sgpo.cli.main import main as openrlhf_sgpo_command
from openrlhf_sgpo.launch import end_with_parent
from openrlhf_sgpo.run_folder import json_text, parse_json, read_json, read_jsonl, write_json, write_jsonl, write_text

Study = dict[str, Any]
Messages = list[dict[str, str]]


def prepare(study: Study, out: Path) -> None:
    """Write the recipe, the initial policy, and every seed's pairs, prompts and held-out pairs, which share no prompt.

    Raises ValueError if the folder has runs of another recipe."""
    recipe, stored = parse_json(json_text(study)), out / "study.json"
    if stored.exists() and read_json(stored) != recipe:
        raise ValueError(f"{out} holds a study with another recipe: choose another --out")
    write_json(stored, recipe)
    write_text(out / "common.yaml", yaml.safe_dump(study["common"]))
    if not (out / "policy").exists():
        write_policy(out / "policy", study["policy_steps"])
    for seed in study["pilot_seeds"] + study["seeds"]:
        folder, random = out / f"data/seed_{seed}", np.random.default_rng(seed)
        if (folder / "prompts.jsonl").exists():
            continue
        sizes = study["sizes"]
        prompts = write_prompts(sum(sizes.values()), random)
        ends = sizes["seed"], sizes["seed"] + sizes["held_out"]
        write_jsonl(folder / "seed.jsonl", write_pairs(prompts[: ends[0]], random, clean=False))
        write_jsonl(folder / "held_out.jsonl", write_pairs(prompts[ends[0] : ends[1]], random, clean=True))
        write_jsonl(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts[ends[1] :]))


def run_folder(out: Path, arm: str, rate: float, seed: int) -> Path:
    return out / f"seed_{seed}/flip_{rate:g}/{arm}"


def train(study: Study, out: Path, arm: str, rate: float, seed: int, position: str) -> None:
    """Finish one run in a process of its own. Raises ValueError if it fails."""
    folder, data = run_folder(out, arm, rate, seed), out / f"data/seed_{seed}"
    if (folder / "table.txt").exists():
        return
    settings = study["arms"][arm]
    flags = {
        "config": out / "common.yaml",
        "model.model_name_or_path": out / "policy",
        "data.dataset": data / "seed.jsonl",
        "eval.dataset": data / "held_out.jsonl",
        "train.seed": seed,
        "seed.flip_rate": rate,
        "ckpt.output_dir": folder,
        **settings["flags"],
    }
    if "start" in settings:
        flags["model.model_name_or_path"] = run_folder(out, settings["start"], rate, seed) / "round_0/policy"
        flags["ref.model_name_or_path"] = out / "policy"
    if flags.get("rounds.count") != 0:
        flags["data.prompt_dataset"] = data / "prompts.jsonl"
    if "fork" in settings:
        flags["ckpt.fork_from"] = run_folder(out, settings["fork"], rate, seed)
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    words += ["--resume"] if (folder / "resolved_config.yaml").exists() else []
    log, begin = folder.with_name(f"{arm}.log"), time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=become, args=(["train", *words], log))
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"{folder} failed ({process.exitcode}), see {log}; the same command continues it")
    print(
        f"{time.strftime('%H:%M:%S')}  {position}  {folder.relative_to(out)}  {time.monotonic() - begin:.0f} s",
        flush=True,
    )


def become(words: list[str], log: Path) -> None:
    """What a forked process does: the command, with its output in a file."""
    end_with_parent()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.exit(openrlhf_sgpo_command(words))


def figures(folder: Path, number: int) -> dict[str, float]:
    """Outcomes after round ``number``: gold accuracy on the held-out pairs; mean gold reward of samples, their length and their
    divergence from the initial policy; agreement of the round's self-made labels with gold."""
    path = folder / f"round_{number}"
    row = read_json(path / "evaluation.json")
    samples = read_jsonl(path / "samples.jsonl")
    agreement = {}
    if number:
        pairs = read_jsonl(path / "pairs.jsonl")
        rewards = [[gold_of(pair["prompt"], pair[side]) for side in ("chosen", "rejected")] for pair in pairs]
        agreement["labels"] = fmean((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in rewards)
    return {
        ACCURACY: row["accuracy"],
        REWARD: fmean(gold_of(sample["prompt"], sample["text"]) for sample in samples),
        "kl": row["kl"],
        "length": row["response_length"],
        **agreement,
    }


def gold_of(prompt: Messages, answer: str | Messages) -> float:
    """The gold reward of texts as a run folder has them."""
    return gold(prompt[-1]["content"], answer if isinstance(answer, str) else answer[-1]["content"])


def collect(study: Study, out: Path) -> list[dict[str, Any]]:
    """A row per arm, flip rate and seed, of the seeds of which all runs at that rate are finished."""
    rows = []
    for rate, seed in product(study["flip_rates"], study["seeds"]):
        cells = [
            (arm, run_folder(out, settings.get("of", arm), rate, seed), settings.get("round", 1))
            for arm, settings in study["arms"].items()
        ]
        if all((folder / "table.txt").exists() for _, folder, _ in cells):
            rows += [
                {"arm": arm, "flip_rate": rate, "seed": seed, **figures(folder, number)}
                for arm, folder, number in cells
            ]
    return rows


def check_gate(study: Study, out: Path) -> None:
    """Run the base on the pilot's seeds. Raises ValueError if its self-made labels are too weak to mean anything."""
    for rate in study["flip_rates"]:
        for number, seed in enumerate(study["pilot_seeds"], start=1):
            train(study, out, study["base"], rate, seed, f"pilot {number} of {len(study['pilot_seeds'])}")
        folders = [run_folder(out, study["base"], rate, seed) for seed in study["pilot_seeds"]]
        agreement = fmean(figures(folder, 1)["labels"] for folder in folders)
        print(f"pilot, {rate:.0%} flipped: self-made labels agree with gold on {agreement:.3f}", flush=True)
        if agreement < study["gate"]:
            raise ValueError(f"that is below the gate of {study['gate']}: no loss could learn from such labels")


def report(study: Study, out: Path) -> str:
    """Write results.jsonl, table.md and the figures of the seeds that are complete; returns the table."""
    rows = collect(study, out)
    write_jsonl(out / "results.jsonl", rows)
    effects = contrasts(study, rows)
    if not effects:
        return "fewer than two seeds are complete\n"
    text = table(study, rows, effects)
    write_text(out / "table.md", text)
    draw(study, rows, effects, out)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.yaml"))
    parser.add_argument(
        "--report_only", action="store_true", help="only table and figures, from the seeds that are complete"
    )
    arguments = parser.parse_args()
    study, out = yaml_files.load(arguments.recipe), arguments.out.absolute()
    try:
        if not arguments.report_only:
            prepare(study, out)
            gc.freeze()  # the runs' collections then pass over the objects of the imports
            check_gate(study, out)
            runs = [
                (arm, rate, seed)
                for rate, seed in product(study["flip_rates"], study["seeds"])
                for arm in study["arms"]
                if "of" not in study["arms"][arm]
            ]
            for number, (arm, rate, seed) in enumerate(runs, start=1):
                train(study, out, arm, rate, seed, f"{number} of {len(runs)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(study, out), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
