"""What the trainer computes between the answers of a round and its training, with and without --rollout.reuse_log_probs.

    python measurements/engine_log_probs.py [--config examples/configs/quickstart.yaml] [flags of train ...]

Two runs with vLLM's engine and one thread, each up to the training of round 1, after a seed stage on 32 pairs. CPU seconds are
those of the trainer's process in the stages annotate and score; the policy and the reference are in memory by then.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

os.environ["OMP_NUM_THREADS"] = "1"

from openrlhf_sgpo import algorithms, run_settings
from openrlhf_sgpo.loop import execute
from openrlhf_sgpo.run import Run


class Reached(Exception):
    """The stages that are measured are done."""


def measure(argv: list[str]) -> tuple[float, float]:
    """CPU seconds and tokens scored."""
    seconds, tokens, stage = 0.0, 0.0, Run.stage

    @contextmanager
    def timed(self: Run, name: str) -> Iterator[dict[str, float]]:
        nonlocal seconds, tokens
        if name == "round_1/train":
            raise Reached
        began = time.process_time()
        with stage(self, name) as cost:
            yield cost
        if name in ("round_1/annotate", "round_1/score"):
            seconds += time.process_time() - began
            tokens += cost["tokens_scored"]

    Run.stage = timed  # type: ignore[method-assign]
    config, options = run_settings.load(argv)
    try:
        execute(config, algorithms.get(config.algo), options)
    except Reached:
        return seconds, tokens
    finally:
        Run.stage = stage  # type: ignore[method-assign]
    raise RuntimeError("there is no round 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/configs/quickstart.yaml")
    arguments, flags = parser.parse_known_args()
    rows = []
    for reuse in ("false", "true"):
        with tempfile.TemporaryDirectory() as folder:
            argv = ["--config", arguments.config, "--rounds.count", "1", "--rounds.prompts", "32", "--seed.size", "32"]
            argv += ["--eval.max_samples", "8", "--eval.max_prompts", "2", "--ckpt.output_dir", f"{folder}/run"]
            rows.append((reuse, *measure([*argv, "--rollout.reuse_log_probs", reuse, *flags])))
    print("| `--rollout.reuse_log_probs` | tokens scored | CPU seconds |\n|---|---|---|")
    for reuse, seconds, tokens in rows:
        print(f"| {reuse} | {tokens:.0f} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
