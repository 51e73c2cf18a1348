"""Steps of a run whose engines sample while the policy trains, beside the same run in which they take turns.

    python measurements/steps_behind.py MODEL [STEPS]

RLOO with four answers of up to 32 tokens to each of 4 prompts, on the prompts of the quickstart, with LoRA in float32; short
answers are better. For each run it prints the seconds of a step, how long an engine sampled, how long the policy trained, in
which share of the time both did, and the mean ratio of training to sampling probabilities. On a CPU, give each its core:
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from openrlhf_sgpo.ledger import read_ledger
from openrlhf_sgpo.oracle import RewardOracle

HERE = Path(__file__).parent


class Short(RewardOracle):
    """An oracle that costs nothing."""

    name = "short"

    def score(self, prompt, answer):
        return -len(answer) / 100


def main(model: str, steps: str = "8") -> None:
    for behind in ("0", "1"):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            flags = {
                "algo": "rloo", "rloo.answers": "4", "oracle": "steps_behind:Short", "model.model_name_or_path": model,
                "data.prompt_dataset": str(HERE.parent / "examples/quickstart/prompts.jsonl"), "data.max_len": "256",
                "rollout.max_new_tokens": "32", "rollout.steps_behind": behind, "rollout.temperature": "1",
                "rounds.count": "1", "rounds.steps": steps, "train.batch_size": "4", "adam.lr": "1e-4",
                "ds.param_dtype": "fp32", "ds.lora.rank": "16", "vllm.num_engines": "1", "ckpt.output_dir": str(run),
            }  # fmt: skip
            argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
            command = [sys.executable, "-m", "openrlhf_sgpo", "train", *argv]
            subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.DEVNULL)
            cost = read_ledger(run / "ledger.json")["stages"]["round_1/play"]
            ratios = [json.loads(line)["train/ratio/mean"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        total = sum(
            value for name, value in cost.items() if name.startswith("seconds_")
        )  # of the steps, without loading
        engine = cost.get("engine_seconds", cost["seconds_generate"])
        trainer = cost["seconds_train"] + cost["seconds_log_probs"]
        whole, sampled, trained = (seconds / int(steps) for seconds in (total, engine, trainer))
        print(
            f"steps_behind {behind}: {whole:.2f} s per step; an engine sampled for {sampled:.2f} s, the policy trained for "
            f"{trained:.2f} s, both at once in {cost.get('overlapped_seconds', 0.0) / total:.0%} of the time; "
            f"ratio {mean(ratios):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
