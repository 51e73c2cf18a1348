"""What a run does with its data before a model is loaded: reading, inspecting and tokenising a pair and a prompt.

    python measurements/bookkeeping.py [--model build/smollm2] [--prompts 1000 4000] [--words 40 100]

Pairs and as many prompts of random words are read and inspected as a run of SSAPO does it, each number in a process of its own.
Prints CPU milliseconds for a pair and a prompt together, how much of them the model's own tokenizer takes, and what stays in
memory of each.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from openrlhf_sgpo import run_settings
from openrlhf_sgpo.data.run_data import inspect_run, load_policy_chat, load_run

VOCABULARY = Path(__file__).read_text(encoding="utf-8").split()


def write_rows(path: Path, count: int, lengths: dict[str, int]) -> str:
    """Rows with so many random words in each column."""
    generator = random.Random(path.name)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            row = {column: " ".join(generator.choices(VOCABULARY, k=words)) for column, words in lengths.items()}
            file.write(json.dumps(row) + "\n")
    return str(path)


def measure(model: str, count: int, prompt: int, response: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = write_rows(folder / "pairs.jsonl", count, {"prompt": prompt, "chosen": response, "rejected": response})
        prompts = write_rows(folder / "prompts.jsonl", count, {"prompt": prompt})
        config, _ = run_settings.load(
            [
                *("--algo", "sgpo", "--model.model_name_or_path", model, "--ds.param_dtype", "fp32"),
                *("--data.dataset", pairs, "--data.prompt_dataset", prompts, "--data.max_len", "2048"),
                *("--rollout.engine", "hf", "--rollout.max_new_tokens", "128", "--ckpt.output_dir", f"{name}/run"),
            ]
        )
        chat, _ = load_policy_chat(config, None)
        tokenizer, call = 0.0, type(chat.tokenizer).__call__

        def timed(*arguments: object, **more: object) -> object:
            nonlocal tokenizer
            began = time.process_time()
            try:
                return call(*arguments, **more)
            finally:
                tokenizer += time.process_time() - began

        type(chat.tokenizer).__call__ = timed
        before, began = psutil.Process().memory_info().rss, time.process_time()
        data = inspect_run(load_run(config, with_prompts=True), chat, config, 128)
        seconds = time.process_time() - began
        kept = psutil.Process().memory_info().rss - before
        assert len(data.human.pairs) == len(data.prompts.prompts) == count
    figures = (seconds, tokenizer, kept / 1e6)
    print(f"| {count:,} | " + " | ".join(f"{figure / count * 1000:.2f}" for figure in figures) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/smollm2")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--words", type=int, nargs=2, default=[40, 100], metavar=("PROMPT", "RESPONSE"))
    arguments = parser.parse_args()
    if len(arguments.prompts) == 1:
        measure(arguments.model, *arguments.prompts, *arguments.words)
        return
    print("| pairs and prompts | ms each | of these its tokenizer | kept, kB each |\n|---|---|---|---|", flush=True)
    for count in arguments.prompts:
        words = map(str, arguments.words)
        command = [sys.executable, __file__, "--model", arguments.model, "--prompts", str(count), "--words", *words]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
