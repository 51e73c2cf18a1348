"""Small folders of runs, a comparison and a leaderboard, as the commands write them; and pages read back."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import torch

from openrlhf_sgpo import algorithms, flags
from openrlhf_sgpo.algorithms.base import Stage
from openrlhf_sgpo.benchmarks.task import Result
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.dro import worst_case_curve
from openrlhf_sgpo.integrity import signed
from openrlhf_sgpo.intervals import scores, share_error, standard_error
from openrlhf_sgpo.ledger import write_ledger
from openrlhf_sgpo.run_folder import RunFolder, write_json, write_jsonl, write_text

# Written by a model, this must be read as what it is.
EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> a & b <b>c"
CATEGORIES = ["writing", "roleplay", "reasoning", "math"]
JUDGE = {"model": "judge-a", "logprobs": True}


def write_settings(folder: Path, algo: str, options: object, rounds: int) -> None:
    config = Config(algo=algo)
    config.model.model_name_or_path, config.rounds.count = "models/tiny", rounds
    write_text(folder / "resolved_config.yaml", signed(flags.dump({"": config, algo: options})))


def write_moment(path: Path, name: str, seed: int, answers: dict[str, str], **more: float) -> None:
    """Evaluation, held-out margins and samples of the start or a round."""
    draw = random.Random(seed)
    margins = [draw.gauss(0.1, 0.5) if seed else 0.0 for _ in range(20)]
    row = {
        "name": name,
        "accuracy": fmean(scores(margins)),
        "accuracy_error": share_error(scores(margins)),
        "margin": sum(margins) / 20,
        "margin_error": standard_error(margins),
        "pairs": 20,
        "response_length": 20.0,
    }
    write_json(path / "evaluation.json", row | {"kl": 1.5 * seed, "kl_error": 0.1 * seed} | more)
    write_jsonl(path / "held_out.jsonl", [{"id": f"h{i}", "margin": margin} for i, margin in enumerate(margins)])
    prompt = [{"role": "user", "content": f"Why? {EVIL}"}]
    rows = [{"id": key, "prompt": prompt, "text": text, "truncated": False} for key, text in answers.items()]
    write_jsonl(path / "samples.jsonl", [row | {"tokens": 7, "kl": 0.25 * seed} for row in rows])
    number = None if name == "start" else int(name.removeprefix("round "))
    files = ("evaluation.json", "held_out.jsonl", "samples.jsonl")
    RunFolder(str(path.parent)).finish(number, "evaluate", {}, files)


def metrics_row(stage: str, step: int, draw: random.Random) -> dict:
    figures = {"train/loss": draw.random(), "train/rewards/margins": draw.gauss(0, 1), "train/learning_rate": 1e-6}
    return {"stage": stage, "step": step} | figures


def make_run(folder: Path, steps: int = 6, algo: str = "sgpo", **options) -> Path:
    """SSAPO of a seed stage and two rounds, with the certificates of the follower itself."""
    algorithm = algorithms.get(algo)
    settings = algorithm.settings(**options)
    write_settings(folder, algo, settings, rounds=2)
    write_moment(folder / "initial", "start", 0, {"q1": "At the start.", "q2": "Well."})
    ledger = {"initial/evaluate": {"samples": 2, "seconds": 1.5, "peak_memory_gib": 1.0}}
    draw, rows = random.Random(0), []
    for number in range(3):
        path, name = folder / f"round_{number}", f"round {number}"
        write_moment(path, name, number + 1, {"q1": f"{EVIL} in {name}", "q2": "Well."})
        pairs = {"pairs": 40} | ({"label_accuracy": 0.6} if number else {})
        RunFolder(str(folder)).finish(number, "pairs", pairs)
        ledger[f"round_{number}/train"] = {
            "pairs": 40,
            "tokens_trained": 1234,
            "seconds": 10.0 + number,
            "peak_memory_gib": 2.0,
        }
        rows += [metrics_row(name, step, draw) for step in range(1, steps + 1)]
        if number:
            margins = torch.tensor([draw.gauss(0.2, 0.6) for _ in range(40)])
            certificate = algorithm(settings, beta=0.1).begin_stage(Stage(margins))
            after = {"pairs": list(range(0, 40, 2)), "margins": (margins[::2] + 0.3).tolist()}
            write_json(path / "worst_case.json", certificate | {"margins": margins.tolist(), "after": after})
            RunFolder(str(folder)).finish(number, "train", {}, ["worst_case.json"])
    write_jsonl(folder / "metrics.jsonl", rows)
    write_ledger(folder / "ledger.json", ledger)
    write_text(folder / "table.txt", "the table\n")
    return folder


def make_play_run(folder: Path) -> Path:
    """SLHF of two rounds of four steps, not ended."""
    write_settings(folder, "slhf", algorithms.get("slhf").settings(), rounds=2)
    write_moment(folder / "initial", "start", 0, {"q1": "At the start."})
    rows, ledger = [], {}
    for number in (1, 2):
        path = folder / f"round_{number}"
        write_moment(path, f"round {number}", number, {"q1": "Later."}, win_rate=0.5 + number / 10, win_rate_error=0.05)
        steps = range(4 * number - 3, 4 * number + 1)
        for step in steps:
            roles = {f"train/{role}/kl": step * scale for role, scale in (("policy", 0.5), ("follower", 1.0))}
            rows.append({"stage": f"round {number}", "step": step, "train/loss": -step, "train/wins": 0.4} | roles)
        answers = [{"role": role, "text": f"{role}: {EVIL}", "tokens": 5} for role in ("policy", "follower")]
        plays = [{"id": f"p{step}", "answers": answers, "preferences": [[0.5, 0.25], [0.75, 0.5]]} for step in steps]
        write_jsonl(path / "plays.jsonl", [{"step": step} | play for step, play in zip(steps, plays, strict=True)])
        parts = {"seconds_generate": 3.0, "seconds_train": 6.0, "seconds": 9.5, "peak_memory_gib": 1.0}
        ledger[f"round_{number}/play"] = {"steps": 4} | parts
    write_jsonl(folder / "metrics.jsonl", rows)
    write_ledger(folder / "ledger.json", ledger)
    return folder


def make_comparison(folder: Path) -> Path:
    def figure(*values: float) -> dict:
        return {"mean": sum(values) / len(values), "error": 0.01, "values": list(values)}

    groups = [
        {
            "name": name,
            "runs": [{"folder": f"runs/{name}/{seed}", "seed": seed} for seed in (1, 2)],
            "figures": {"accuracy": figure(0.6, 0.64), "response_length": figure(20.0, 22.0)},
            "ledger": {"samples": 100.0 + place, "judge_calls": 50.0},
        }
        for place, name in enumerate(["sgpo", "spa", "dpo"])
    ]
    interval = {"low": 0.5, "high": 0.7, "p_value": 0.01, "comparisons": 100}
    cross_play = [
        {"first": "sgpo", "second": "spa", "win_rate": 0.6, **interval, "p_holm": 0.03},
        {"first": "spa", "second": "dpo", "win_rate": 0.55, **interval, "p_holm": 0.05},
        {
            "first": "dpo",
            "second": "sgpo",
            "win_rate": 0.3,
            "low": 0.2,
            "high": 0.4,
            "p_value": 1e-6,
            "p_holm": 3e-6,
            "comparisons": 100,
        },
    ]
    start = [
        {"name": "sgpo", "win_rate": 0.7, "low": 0.6, "high": 0.75, "kl": 3.0, "kl_error": 0.2},
        {"name": "spa", "win_rate": 0.65, "low": 0.6, "high": 0.7, "kl": None, "kl_error": None},
    ]
    samples = [{"id": "q", "prompt": [{"role": "user", "content": "Why?"}], "answers": {"sgpo": EVIL, "spa": "So."}}]
    rest = {"warnings": ["judge_calls differ"], "prompts": 100, "oracle": {"name": "judge", "model": "judge-a"}}
    radii = [0.0, 0.05, 0.1]
    margins = 0.3 + torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    worst_case = {
        "pairs": 50,
        "edge": -4.0,
        "radii": radii,
        "curves": {
            name: worst_case_curve(scale * margins, radii, window=(-4.0, 6.0)).tolist()
            for name, scale in (("sgpo", 0.9), ("spa", 1.0), ("dpo", 1.1))
        },
        "differences": [
            {
                "first": name,
                "second": "sgpo",
                "radius": radius,
                "difference": mean,
                "low": mean - 0.01,
                "high": mean + 0.01,
            }
            for name, means in (("spa", (-0.002, 0.003)), ("dpo", (-0.02, 0.025)))
            for radius, mean in zip((0.0, 0.05), means, strict=True)
        ],
    }
    comparison = {"groups": groups, "cross_play": cross_play, "versus_start": start, "samples": samples} | rest
    write_json(folder / "comparison.json", comparison | {"worst_case": worst_case})
    return folder


def make_leaderboard(folder: Path) -> Path:
    rows = []
    for place, model in enumerate(["before", "after"]):
        decoding = {"temperature": 0.7}
        rows += [
            Result(
                *("alpaca_eval", model, 40 - place, 40, {"win_rate": 12.5 + place, "length_controlled_winrate": None}),
                errors={"win_rate": 2.0},
                average_length=800.0,
                parse_failures=place,
                notes=["no length control"],
                judge=JUDGE,
                decoding=decoding,
            ),
            Result(
                *("mt_bench", model, 16, 16, {"average": 4.0 + place}),
                intervals={"average": (3.5 + place, 4.25 + place)},
                categories={name: float(index + place) for index, name in enumerate(CATEGORIES)},
                judge=JUDGE,
                decoding=decoding,
            ),
        ]
    rows.append(Result("ifeval", "before", 3, 4, {"strict": 0.5}))
    rows.append(Result("mt_bench", "before", 16, 16, {"average": 6.0}, judge={"model": "judge-b"}))
    write_json(folder / "leaderboard.json", {"rows": [asdict(row) for row in rows]})
    write_jsonl(folder / "items" / "ifeval.jsonl", [{"id": str(key), "turns": ["Why?"]} for key in range(4)])
    write_jsonl(folder / "items" / "mt_bench.jsonl", [{"id": "81", "turns": ["Why?", "And?"], "category": "writing"}])
    for model, score in (("before", 3), ("after", 4)):
        judgement = {"question_id": 81, "turn": 1, "score": score}
        write_jsonl(
            folder / model / "mt_bench" / "judge-a" / "judgments.jsonl",
            [judgement, judgement | {"turn": 2, "score": -1}],
        )
        write_jsonl(folder / model / "answers" / "mt_bench.jsonl", [{"id": "81", "turns": [f"{model} {EVIL}", "So."]}])
    return folder


class Page(HTMLParser):
    """A page as a parser sees it. figures: by title. tables: rows of cells. paragraphs: their texts. scripts: how many there
    are that run. addresses: all that an element would fetch or lead to."""

    def __init__(self, path: Path):
        super().__init__()
        self.figures: dict[str, dict] = {}
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.paragraphs: list[str] = []
        self.scripts = 0
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self._data = self._title = ""
        self._is_figure = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.add(tag)
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        self._data = ""
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag == "script":
            self._is_figure = given.get("type") == "application/json"
            self.scripts += not self._is_figure

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.tables[-1][-1].append(self._data)
        elif tag == "h2":
            self.headings.append(self._data)
        elif tag == "h3":
            self._title = self._data
        elif tag == "p":
            self.paragraphs.append(self._data)
        elif tag == "script" and self._is_figure:
            self.figures[self._title] = json.loads(self._data)

    def handle_data(self, data):
        self._data += data
