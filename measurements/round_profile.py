"""Where a whole round of SSAPO spends its CPU time: answers, scores, follower, training, evaluation, files.

    python measurements/round_profile.py [--config examples/configs/quickstart.yaml] [--prompts 32] [flags of train ...]

One round after the seed stage, in a process of its own with one thread and the transformers engine; what happens before and
between is not counted. Calls into torch are the model's arithmetic; everything else is grouped by the package whose Python
it is, or named. Times are CPU seconds under cProfile, which makes Python look slower than it is.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import sys
import tempfile
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from openrlhf_sgpo.cli.main import main as command

NAMED = {
    "gc.collect": "garbage collection",
    "run_backward": "torch: backward passes",
    "_fused_adamw": "torch: Adam",
    "scaled_dot_product_attention": "torch: attention",
    "linear": "torch: matrix products",
    "_linear_pointwise": "torch: matrix products",
    "safe": "safetensors",
    "okenizer": "tokenizer",
    "fsync": "files",
    "io.": "files",
    "posix.": "files",
}


def kind(code: Any) -> str:
    if isinstance(code, str):
        for part, name in NAMED.items():
            if part in code:
                return name
        return "torch: everything else" if "torch" in code or "Tensor" in code else "Python: builtins"
    place = code.co_filename
    if "site-packages/" in place:
        return f"Python: {place.split('site-packages/')[1].split('/')[0]}"
    return "Python: openrlhf_sgpo" if "openrlhf_sgpo" in place else "Python: standard library"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/configs/quickstart.yaml")
    parser.add_argument("--prompts", default="32")
    arguments, flags = parser.parse_known_args()
    profiler = cProfile.Profile(time.process_time)
    from openrlhf_sgpo.sources.stored_pairs import StoredPairs

    prepare = StoredPairs.prepare

    @wraps(prepare)
    def counted(self: StoredPairs, number: int) -> None:
        if number == 1:
            profiler.enable()
        prepare(self, number)

    StoredPairs.prepare = counted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        train = ["train", "--config", arguments.config, "--rollout.engine", "hf", "--rounds.count", "1"]
        train += ["--rounds.prompts", arguments.prompts, "--ckpt.output_dir", str(Path(folder) / "run"), *flags]
        status = command(train)
        profiler.disable()
    if status:
        sys.exit(status)
    times: defaultdict[str, float] = defaultdict(float)
    for entry in profiler.getstats():
        times[kind(entry.code)] += entry.inlinetime
    print("| part of a round | CPU seconds | share |\n|---|---|---|")
    total = sum(times.values())
    for name, seconds in sorted(times.items(), key=lambda item: -item[1])[:16]:
        print(f"| {name} | {seconds:.2f} | {seconds / total:.1%} |")


if __name__ == "__main__":
    main()
