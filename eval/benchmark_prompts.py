"""Writes openrlhf_sgpo/data/benchmark_prompts.json, from which the data report recognises benchmark prompts.

    python eval/benchmark_prompts.py ALPACA_EVAL MT_BENCH

ALPACA_EVAL: alpaca_eval.json of tatsu-lab/alpaca_eval (rows with ``instruction``). MT_BENCH: question.jsonl of FastChat
(rows with ``turns``, of which the first is used). Only hashes are written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from openrlhf_sgpo.data.benchmarks import prompt_hash
from openrlhf_sgpo.data.files import read_rows
from openrlhf_sgpo.run_folder import json_text, write_text

TARGET = Path(__file__).parent.parent / "openrlhf_sgpo" / "data" / "benchmark_prompts.json"


def hashes(alpaca_eval: str, mt_bench: str) -> dict[str, list[str]]:
    """Sorted hashes of each benchmark's first prompts."""
    texts = {
        "alpaca_eval": [row["instruction"] for _, row in read_rows(alpaca_eval).entries],
        "mt_bench": [row["turns"][0] for _, row in read_rows(mt_bench).entries],
    }
    return {name: sorted(set(map(prompt_hash, prompts))) for name, prompts in texts.items()}


def main(alpaca_eval: str, mt_bench: str, target: Path = TARGET) -> None:
    write_text(target, json_text(hashes(alpaca_eval, mt_bench), indent=0) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
