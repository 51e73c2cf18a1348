"""A whole optimiser step on preference pairs, and the scoring of several responses to a prompt, side by side with others.

    python measurements/steps.py [--model FOLDER] [--layers 4] [--repeats 3] [--shapes 128,256 512,128 mixed] [--out steps.json]

Steps of DPO on 4 pairs in float32 on one thread: this package in both layouts, and packed with torch's matrix products,
without ZeRO, or one pair at a time; OpenRLHF's ``DPOTrainer``; and TRL's where it is installed (``make benchmark`` puts it into
build/peers), with the reference's log-probabilities computed before, as this package does. OpenRLHF computes them in every
step. The model is a replica of the one in FOLDER with --layers of its layers and the same share of its vocabulary, so that its
parts keep their proportions. All take turns; losses and gradients must agree to 1e-4 before anything is timed. Times are CPU
seconds. Memory is the peak of a step of the first shape above what is held between steps, from a process for each method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from step_methods import METHODS, SMALLEST_VOCABULARY, Method, make_models, make_pairs, settings
from transformers.utils import logging as transformers_logging

from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.openrlhf import build_strategy, load_actor
from openrlhf_sgpo.training.log_probs import response_log_probs

AGREEMENT = 1e-4
SCORED = ((256, 128, 2), (256, 128, 4), (256, 128, 8), (128, 256, 8))


def check(methods: dict[str, Method]) -> float:
    """Takes a step of each. Returns the largest distance of two gradients, relative to their norm. Raises AssertionError where
    losses or gradients differ."""
    largest, (first, *others) = 0.0, methods
    losses = {}
    for name, method in methods.items():
        method.gradient = {}
        losses[name] = method.step()
    expected = methods[first].gradient or {}
    scale = sum(float(gradient.square().sum()) for gradient in expected.values()) ** 0.5
    for name in others:
        gradients = methods[name].gradient or {}
        assert gradients.keys() == expected.keys() and scale > 0
        apart = sum(float((gradients[key] - expected[key]).square().sum()) for key in expected) ** 0.5 / scale
        largest = max(largest, apart)
        assert apart < AGREEMENT and abs(losses[name] / losses[first] - 1) < AGREEMENT, (name, apart, losses)
    for method in methods.values():
        method.gradient = None
    return largest


def time_steps(shape: str, models: tuple[str, str], repeats: int, names: list[str]) -> list[dict[str, Any]]:
    groups = make_pairs(shape)
    methods = {name: METHODS[name](*models, groups) for name in names}
    agreement = check(methods)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            began = time.process_time()
            method.step()
            seconds[name].append(time.process_time() - began)
    tokens = sum(len(group.prompt) * 2 + sum(map(len, group.responses)) for group in groups)
    best = min(seconds["packed"])
    return [
        {
            "shape": shape,
            "method": name,
            "minimum": min(times),
            "median": statistics.median(times),
            "packed_is_faster": min(times) / best,
            "tokens_per_second": tokens / min(times),
            "gradients_differ": agreement,
        }
        for name, times in seconds.items()
    ]


def time_scoring(models: tuple[str, str], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for prompt, response, count in SCORED:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, SMALLEST_VOCABULARY, (prompt + count * response,), generator=generator).tolist()
        responses = tuple(tuple(tokens[prompt + i * response :][:response]) for i in range(count))
        together = [Group(tuple(tokens[:prompt]), responses)]
        single = [Group(tuple(tokens[:prompt]), (each,)) for each in responses]
        actors = {}
        for layout in ("auto", "padded"):
            config = settings(*models, together, layout)
            strategy = build_strategy(config)
            actors[layout] = strategy.prepare(load_actor(models[0], config, strategy, trainable=False)).eval()

        def one_forward(groups: list[Group], actor: Any = actors["auto"]) -> torch.Tensor:
            return response_log_probs(actor, groups, 0)

        def one_each(groups: list[Group], actor: Any = actors["padded"]) -> torch.Tensor:
            return torch.cat([response_log_probs(actor, [group], 0) for group in groups])

        ways = {"together": partial(one_forward, together), "one forward each": partial(one_each, single)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        with torch.no_grad():
            torch.testing.assert_close(ways["together"](), ways["one forward each"](), rtol=AGREEMENT, atol=0)
            for _ in range(repeats):
                for name, way in ways.items():
                    began = time.process_time()
                    way()
                    seconds[name].append(time.process_time() - began)
        best = {name: min(times) for name, times in seconds.items()}
        rows.append(
            {"prompt": prompt, "response": response, "responses": count}
            | best
            | {"ratio": best["one forward each"] / best["together"]}
        )
    return rows


def status(name: str) -> float:
    """GiB of a line of this process's status."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split(f"{name}:")[1].split()[0]) / 2**20


def peak(name: str, shape: str, models: tuple[str, str]) -> float:
    """GiB that a step holds at its peak above what is held between steps."""
    method = METHODS[name](*models, make_pairs(shape))
    method.step()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    method.step()
    return status("VmHWM") - before


def measured_apart(name: str, shape: str, folder: str) -> float:
    """``peak`` in a process of its own, in which freed memory goes back at once, so that what is held can be seen."""
    command = [sys.executable, __file__, "--peak", name, shape, folder]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return float(output.rsplit("peak", 1)[1])


def print_table(rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        if not number:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        print(
            "| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/smollm2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=["256,128", "512,128", "mixed", "128,256"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", default="build/steps.json")
    parser.add_argument("--peak", nargs=3, metavar=("METHOD", "SHAPE", "FOLDER"), help="used by this script itself")
    arguments = parser.parse_args()
    if arguments.peak:
        name, shape, folder = arguments.peak
        print(f"peak {peak(name, shape, (f'{folder}/policy', f'{folder}/reference')):.4f}")
        return
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    names = [name for name in arguments.methods if name != "trl" or _has_trl()]
    processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    machine = f"{processor.split(':')[1].strip()}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}"
    print(f"{machine}, {platform.system()}")
    result: dict[str, Any] = {"machine": machine, "steps": [], "scoring": [], "memory": []}
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder), arguments.model, arguments.layers)
        for name in names:  # first, because later this process holds many models
            gib = measured_apart(name, arguments.shapes[0], folder)
            result["memory"].append({"shape": arguments.shapes[0], "method": name, "peak_gib": gib})
        print_table(result["memory"])
        for shape in arguments.shapes:
            rows = time_steps(shape, models, arguments.repeats, names)
            print_table(rows)
            result["steps"] += rows
            write(Path(arguments.out), result)
        result["scoring"] = time_scoring(models, arguments.repeats)
        print_table(result["scoring"])
    write(Path(arguments.out), result)
    print(f"written: {arguments.out}")


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2), encoding="utf-8")


def _has_trl() -> bool:
    try:
        import trl
    except ImportError:
        print("TRL is not installed, so it is left out: make benchmark installs it")
        return False
    return bool(trl.__version__)


if __name__ == "__main__":
    main()
