"""Where a packed optimiser step on preference pairs spends its time.

    python measurements/step_profile.py [--model FOLDER] [--layers 4] [--repeats 3] [--shapes 256,128 512,128 mixed 128,256]

The step is that of ``steps.py``: DPO on 4 pairs in float32 on one thread. Shares are of the whole step under torch's profiler,
of the quickest of the repeats.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from step_methods import ThisPackage, make_models, make_pairs
from steps import print_table
from torch.profiler import ProfilerActivity, profile, record_function

STEP, DEEPSPEED = "the whole step", "DeepSpeed's part"
PRODUCTS = {"mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::bmm"}
HEAD = {"_LogProbs", "_LogProbsBackward"}
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
}
ADAM = {"aten::_fused_adamw_"}


def within(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(*arguments: Any, **more: Any) -> Any:
        with record_function(name):
            return function(*arguments, **more)

    return recorded


def names(event: Any) -> Iterator[str]:
    """Of an event and what it is within, from the inside."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def part(event: Any) -> str:
    around = set(names(event))
    if around & HEAD:
        return "products of the head" if around & PRODUCTS else "softmax of the head"
    if around & PRODUCTS:
        return "products of the layers"
    if around & ATTENTION:
        return "attention"
    if around & ADAM:
        return "Adam"
    if DEEPSPEED in around:
        return "DeepSpeed: gradients copied, flattened, their norm"
    if event.name.startswith("aten::"):
        return "norms, positions, activations, embeddings, copies"
    return "Python and autograd"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/smollm2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=["256,128", "512,128", "mixed", "128,256"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("reduce_ready_partitions_and_remove_grads", "independent_gradient_partition_epilogue", "step"):
        setattr(DeepSpeedZeroOptimizer, name, within(DEEPSPEED, getattr(DeepSpeedZeroOptimizer, name)))
    shares: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder), arguments.model, arguments.layers)
        for shape in arguments.shapes:
            method = ThisPackage("auto", *models, make_pairs(shape))
            method.step()
            best: Counter[str] = Counter()
            for _ in range(arguments.repeats):
                with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(STEP):
                    method.step()
                times: Counter[str] = Counter()
                for event in profiler.events():
                    if STEP in names(event):
                        times[part(event)] += event.self_cpu_time_total
                if not best or times.total() < best.total():
                    best = times
            shares[shape] = {name: time / best.total() for name, time in best.items()}
    largest = sorted(shares[arguments.shapes[0]], key=lambda name: -shares[arguments.shapes[0]][name])
    print_table(
        [{"part of a step": name} | {shape: f"{of[name]:.1%}" for shape, of in shares.items()} for name in largest]
    )


if __name__ == "__main__":
    main()
