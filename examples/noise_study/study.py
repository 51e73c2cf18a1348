"""Compares methods on a seed set with clean and with flipped labels, from the same samples and in the same number of steps.

Every cell (method, flip rate, seed) is an ordinary run of ``openrlhf-sgpo train`` in its own folder. Methods that start from
the same seed policy and samples take them from the cell of the base method (``--ckpt.fork_from``). Writes a table and a figure.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from openrlhf_sgpo import yaml_files
from openrlhf_sgpo.run_folder import json_text, parse_json, read_json, read_jsonl, write_json, write_jsonl

HERE = Path(__file__).parent
ONLY_WITH_ROUNDS = ("rounds", "rollout", "seed", "vllm", "eval")  # groups that a run without rounds does not read


@dataclass(frozen=True)
class Cell:
    """One run. base: method of the cell whose seed stage and samples it reuses."""

    method: str
    flags: dict[str, Any]
    flip_rate: float
    seed: int
    base: str | None

    def folder(self, out: Path, method: str | None = None) -> Path:
        return out / f"flip_{self.flip_rate:g}" / f"seed_{self.seed}" / (method or self.method)


def cells(study: dict[str, Any]) -> list[Cell]:
    """All cells in the order in which they run: first those that others reuse."""
    shared = {method["fork_from"] for method in study["methods"] if "fork_from" in method}
    order = sorted(study["methods"], key=lambda method: method["name"] not in shared)
    return [
        Cell(method["name"], method["flags"], rate, seed, method.get("fork_from"))
        for method in order
        for rate in study["flip_rates"]
        for seed in study["seeds"]
        if "same_run_as" not in method
    ]


def same_study(study: dict[str, Any], sources: list[str], model: str, out: Path) -> None:
    """Exits if the folder has cells of a study with different settings, data or model, which must not be mixed."""
    current = parse_json(json_text({"study": study, "pairs": sources, "model": model}))  # as it is read back
    stored = out / "study.json"
    if stored.exists() and read_json(stored) != current:
        sys.exit(f"{out} holds a different study (settings, --pairs or --model): choose another --out")
    write_json(stored, current)


def prepare_data(study: dict[str, Any], sources: list[str], model: str, out: Path) -> None:
    """Write seed.jsonl, prompts.jsonl (with human pairs, to measure label accuracy) and held_out.jsonl, disjoint in prompts."""
    from transformers import AutoTokenizer

    from openrlhf_sgpo.data import load_pairs
    from openrlhf_sgpo.data.benchmarks import benchmarks_with
    from openrlhf_sgpo.data.tokens import ChatFormat

    sizes = study["sizes"]
    if all((out / f"{name}.jsonl").exists() for name in sizes):
        return
    chat = ChatFormat(AutoTokenizer.from_pretrained(model), study["common"]["data"]["max_len"])
    by_prompt = {}
    for pair in (pair for source in sources for pair in load_pairs(source)):
        if not pair.chosen.strip() or not pair.rejected.strip() or pair.chosen.strip() == pair.rejected.strip():
            continue
        if benchmarks_with(pair.prompt):
            continue
        prompt = chat.prompt(pair.prompt)
        if len(prompt) > study["longest_prompt"]:
            continue
        longest = max(len(chat.response(text, False, chat.max_len)) for text in (pair.chosen, pair.rejected))
        if longest <= study["longest_answer"]:
            by_prompt.setdefault(str(pair.prompt), pair)
    pairs = list(by_prompt.values())
    random.Random(study["data_seed"]).shuffle(pairs)
    if len(pairs) < sum(sizes.values()):
        sys.exit(f"{sources}: {len(pairs)} usable pairs, but the study needs {sum(sizes.values())}")
    out.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        rows, pairs = pairs[:size], pairs[size:]
        write_jsonl(out / f"{name}.jsonl", (pair.to_row() for pair in rows))


def command(cell: Cell, model: str, out: Path) -> list[str]:
    """The run's command line; its shared settings are in OUT/common.yaml."""
    folder = cell.folder(out)
    flags = {
        "model.model_name_or_path": model,
        "data.dataset": out / "data/seed.jsonl",
        "eval.dataset": out / "data/held_out.jsonl",
        "train.seed": cell.seed,
        "seed.flip_rate": cell.flip_rate,
        "ckpt.output_dir": folder,
    } | cell.flags
    if flags.get("rounds.count") != 0:
        flags["data.prompt_dataset"] = out / "data/prompts.jsonl"
    if cell.base:
        flags["ckpt.fork_from"] = cell.folder(out, cell.base)
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    config = "offline.yaml" if flags.get("rounds.count") == 0 else "common.yaml"
    resume = ["--resume"] if (folder / "resolved_config.yaml").exists() else []
    return [sys.executable, "-m", "openrlhf_sgpo.cli.main", "train", "--config", str(out / config), *words, *resume]


def run(cell: Cell, model: str, out: Path, threads: int) -> bool:
    """Run the cell unless it is finished; returns whether it is finished now."""
    folder = cell.folder(out)
    if (folder / "table.txt").exists():
        return True
    begin = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.run(
            command(cell, model, out), stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        )
    state = "finished" if process.returncode == 0 else f"failed, see {folder.with_suffix('.log')}"
    print(
        f"{time.strftime('%H:%M:%S')}  {folder.relative_to(out)}: {state}, {time.monotonic() - begin:.0f} s", flush=True
    )
    return process.returncode == 0


def figures_of(folder: Path, number: int) -> dict[str, float] | None:
    """Measurements of a cell after round ``number``; None if it is not finished."""
    if not (folder / "table.txt").exists():
        return None
    row = read_json(folder / f"round_{number}/evaluation.json")
    ledger = read_json(folder / "ledger.json")["stages"]
    stages = read_json(folder / f"round_{number}/manifest.json")["stages"]
    spent = [cost for name, cost in ledger.items() if name.startswith("round_") and int(name[6]) <= number]
    steps = [row["stage"] for row in read_jsonl(folder / "metrics.jsonl")]
    figures = {
        "accuracy": row["accuracy"],
        "margin": row["margin"],
        "labels": stages["pairs"].get("label_accuracy"),
        "length": row.get("response_length"),
        "kl": row.get("kl"),
        "steps": sum(int(stage.rpartition(" ")[2]) <= number for stage in steps),
        "samples": sum(cost.get("samples", 0) for name, cost in ledger.items() if name.endswith("/generate"))
        if number
        else 0,
        "trained": sum(cost.get("tokens_trained", 0) for cost in spent) / 1000,
        "scored": sum(cost.get("tokens_scored", 0) for cost in spent) / 1000,
    }
    return {name: value for name, value in figures.items() if value is not None}


def collect(study: dict[str, Any], out: Path) -> dict[tuple[str, float], list[dict[str, float]]]:
    """Figures of every finished cell, by method and flip rate, one entry per seed.

    ``against`` is the accuracy minus that of the base method on the same held-out pairs and seed.
    """
    by_method: dict[tuple[str, float], list[dict[str, float]]] = {}
    for method in study["methods"]:
        for rate in study["flip_rates"]:
            for seed in study["seeds"]:
                cell = Cell(method.get("same_run_as", method["name"]), {}, rate, seed, None)
                figures = figures_of(cell.folder(out), method["round"])
                base = figures_of(cell.folder(out, study["base"]), study["base_round"])
                if figures and base:
                    figures["against"] = figures["accuracy"] - base["accuracy"]
                    by_method.setdefault((method["name"], rate), []).append(figures)
    return by_method


COLUMNS = {  # key: title, digits
    "accuracy": ("accuracy", 3),
    "against": ("minus base", 3),
    "margin": ("margin", 3),
    "labels": ("labels", 3),
    "length": ("length", 1),
    "kl": ("KL", 2),
    "steps": ("steps", 0),
    "samples": ("samples", 0),
    "trained": ("k tokens trained", 1),
    "scored": ("k tokens scored", 1),
}
WITH_ERROR = ("accuracy", "against", "margin", "kl")


def table(study: dict[str, Any], by_method: dict[tuple[str, float], list[dict[str, float]]]) -> str:
    """Markdown: a row per method and flip rate, means over seeds, some with standard errors."""
    lines = []
    for rate in study["flip_rates"]:
        lines += [f"**{rate:.0%} of the seed's labels flipped**", ""]
        lines += ["| method | seeds | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"]
        lines += ["|---" * (2 + len(COLUMNS)) + "|"]
        for method in study["methods"]:
            rows = by_method.get((method["name"], rate), [])
            cells = [_cell([row[key] for row in rows if key in row], key) for key in COLUMNS]
            lines.append(f"| {method['title']} | {len(rows)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: list[float], key: str) -> str:
    if not values:
        return "-"
    digits = COLUMNS[key][1]
    text = f"{mean(values):.{digits}f}"
    if key in WITH_ERROR and len(values) > 1:
        text += f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}"
    return text


def figure(study: dict[str, Any], by_method: dict[tuple[str, float], list[dict[str, float]]], path: Path) -> None:
    """Held-out accuracy of every method, a panel per flip rate: a dot per seed, a bar at the mean."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "noise study"
    from matplotlib import pyplot

    methods = study["methods"]
    height = 1.2 + 0.28 * len(methods)
    drawing, panels = pyplot.subplots(1, len(study["flip_rates"]), figsize=(9.5, height), sharey=True, squeeze=False)
    names = [method["name"] for method in methods]
    for panel, rate in zip(panels[0], study["flip_rates"], strict=True):
        for place, name in enumerate(names):
            values = [row["accuracy"] for row in by_method.get((name, rate), [])]
            if values:
                panel.plot(values, [place] * len(values), "o", color="#4477aa", alpha=0.6, markersize=5)
                panel.plot([mean(values)] * 2, [place - 0.3, place + 0.3], color="#222222", linewidth=2)
        base = [row["accuracy"] for row in by_method.get((study["base"], rate), [])]
        if base:
            panel.axvline(mean(base), color="#cc6677", linewidth=1, linestyle="--", zorder=0)
        panel.axvline(0.5, color="#bbbbbb", linewidth=1, zorder=0)
        panel.set_title(f"{rate:.0%} of the seed's labels flipped", fontsize=10)
        panel.set_xlabel("accuracy on clean held-out pairs", fontsize=9)
        panel.grid(axis="x", color="#eeeeee")
        panel.set_axisbelow(True)
    panels[0][0].set_yticks(range(len(names)), [method["title"] for method in methods], fontsize=8)
    panels[0][0].invert_yaxis()
    drawing.tight_layout()
    drawing.savefig(path, metadata={"Date": None})
    pyplot.close(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=[], help="human pairs: files or hub names")
    parser.add_argument("--model", default="", help="policy to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--study", type=Path, default=HERE / "cpu.yaml", help="methods, sizes and shared settings")
    parser.add_argument("--jobs", type=int, default=1, help="cells to run in parallel; they share the CPU's threads")
    parser.add_argument("--report_only", action="store_true", help="only table and figure, from the finished cells")
    arguments = parser.parse_args()
    study, out = yaml_files.load(arguments.study), arguments.out.absolute()
    if not arguments.report_only:
        if not (arguments.pairs and arguments.model):
            parser.error("--pairs and --model are needed to run the study")
        same_study(study, arguments.pairs, arguments.model, out)
        prepare_data(study, arguments.pairs, arguments.model, out / "data")
        (out / "common.yaml").write_text(yaml.safe_dump(study["common"]))
        offline = {name: value for name, value in study["common"].items() if name not in ONLY_WITH_ROUNDS}
        (out / "offline.yaml").write_text(yaml.safe_dump(offline))
        threads = max(1, len(os.sched_getaffinity(0)) // arguments.jobs)
        todo = cells(study)
        shared = {cell.base for cell in todo}
        finished: list[bool] = []
        for wave in (
            [cell for cell in todo if cell.method in shared],
            [cell for cell in todo if cell.method not in shared],
        ):
            with ThreadPoolExecutor(arguments.jobs) as pool:
                finished += pool.map(lambda cell: run(cell, arguments.model, out, threads), wave)
    by_method = collect(study, out)
    text = table(study, by_method)
    (out / "table.md").write_text(text)
    figure(study, by_method, out / "figure.svg")
    print(text)
    if not arguments.report_only and not all(finished):
        sys.exit(f"{finished.count(False)} cells failed; their logs are beside their folders in {out}")


if __name__ == "__main__":
    main()
