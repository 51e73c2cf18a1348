"""Where a packed optimiser step on preference pairs spends its time, by kind of operation.

    python measurements/step_profile.py [--model FOLDER] [--layers 8] [--shape 256,128]

The step is that of ``steps.py``: DPO on 4 pairs in float32 on one thread. Shares are of the time of all operators.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import torch
from steps import ThisPackage, make_models, make_pairs
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "Adam": ("aten::_fused_adamw_", "aten::_fused_adam_", "Optimizer.step#AdamW.step"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::clone"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/smollm2")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shape", default="256,128")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder), arguments.model, arguments.layers)
        method = ThisPackage("auto", *models, make_pairs(arguments.shape))
        method.step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            method.step()
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[kind_of.get(event.key, event.key)] += event.self_cpu_time_total
    print("| part of a step | share |\n|---|---|")
    for name, time in times.most_common(12):
        print(f"| {name} | {time / times.total():.1%} |")


if __name__ == "__main__":
    main()
