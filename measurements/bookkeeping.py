"""What a run does with its data before a model is loaded: reading, inspecting and tokenising a pair or a prompt.

    python measurements/bookkeeping.py [--model build/smollm2] [--rows 1000 10000] [--words 40 100]

Rows of random words are read and inspected as a run of SSAPO does it, pairs and prompts each in a process of their own.
Prints tokens, CPU milliseconds, how much of them the model's own tokenizer takes, and what stays in memory of each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil

from openrlhf_sgpo import run_settings
from openrlhf_sgpo.data.records import Records
from openrlhf_sgpo.data.run_data import inspect_run, load_policy_chat, load_run
from openrlhf_sgpo.data.tokens import ChatFormat

VOCABULARY = Path(__file__).read_text(encoding="utf-8").split()


def write_rows(path: Path, count: int, lengths: dict[str, int]) -> str:
    """Rows with so many random words in each column."""
    generator = random.Random(path.name)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            row = {column: " ".join(generator.choices(VOCABULARY, k=words)) for column, words in lengths.items()}
            file.write(json.dumps(row) + "\n")
    return str(path)


def measure(model: str, kind: str, count: int, prompt: int, response: int) -> tuple[float, ...]:
    """Of a row: tokens, milliseconds, those of the tokenizer, and kilobytes that stay."""
    rows = {"pairs": 1, "prompts": 1} | {kind: count}
    with tempfile.TemporaryDirectory() as name:
        pair = {"prompt": prompt, "chosen": response, "rejected": response}
        pairs = write_rows(Path(name) / "pairs.jsonl", rows["pairs"], pair)
        prompts = write_rows(Path(name) / "prompts.jsonl", rows["prompts"], {"prompt": prompt})
        config, _ = run_settings.load(
            [
                *("--algo", "sgpo", "--model.model_name_or_path", model, "--ds.param_dtype", "fp32"),
                *("--data.dataset", pairs, "--data.prompt_dataset", prompts, "--data.max_len", "2048"),
                *("--rollout.engine", "hf", "--rollout.max_new_tokens", "128", "--ckpt.output_dir", f"{name}/run"),
            ]
        )
        chat, _ = load_policy_chat(config, None)
        tokenizer, token_ids = 0.0, ChatFormat._token_ids

        def timed(self: ChatFormat, texts: list[str]) -> list[list[int]]:
            nonlocal tokenizer
            began = time.process_time()
            ids = token_ids(self, texts)
            tokenizer += time.process_time() - began
            return ids

        ChatFormat._token_ids = timed  # type: ignore[method-assign]
        before, began = psutil.Process().memory_info().rss, time.process_time()
        records = load_run(config, with_prompts=True)
        counted = replace(records, prompts=Records()) if kind == "pairs" else replace(records, human=Records())
        data = inspect_run(counted, chat, config, 128)
        seconds = time.process_time() - began
        kept = psutil.Process().memory_info().rss - before
        tokens = sum(map(len, data.human.groups if kind == "pairs" else data.prompts.tokens))
        assert len(data.human.pairs) + len(data.prompts.prompts) == count
    return tokens / count, seconds / count * 1e3, tokenizer / count * 1e3, kept / count / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/smollm2")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--words", type=int, nargs=2, default=[40, 100], metavar=("PROMPT", "RESPONSE"))
    arguments = parser.parse_args()
    print(
        "| rows | tokens each | ms each | of these its tokenizer | kept, kB each |\n|---|---|---|---|---|", flush=True
    )
    for kind in ("pairs", "prompts"):
        for count in arguments.rows:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                figures = process.submit(measure, arguments.model, kind, count, *arguments.words).result()
            print(
                f"| {count:,} {kind} | {figures[0]:.0f} | "
                + " | ".join(f"{figure:.2f}" for figure in figures[1:])
                + " |"
            )


if __name__ == "__main__":
    main()
