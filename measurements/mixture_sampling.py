"""Milliseconds per sampled token: a policy alone, and its mixture with a reference, on vLLM and with transformers.

    python measurements/mixture_sampling.py MODEL [DTYPE]

MODEL: a Hugging Face folder, which is the reference too, because what a token costs does not depend on the weights. DTYPE: bf16
or fp32. Each figure is that of the fastest of several runs, which take turns in an engine.
"""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.tokens import load_chat
from openrlhf_sgpo.openrlhf import build_strategy
from openrlhf_sgpo.rollout import Sampling, start_rollout

PROMPTS, TOKENS, RUNS = 8, 64, 6
SHARE = 0.125


def main(folder: str, dtype: Any = "bf16") -> None:
    config = Config()
    config.model.model_name_or_path, config.ds.param_dtype = folder, dtype
    config.data.max_len, config.rollout.batch_size = 256, PROMPTS
    config.train.batch_size = config.train.micro_batch_size = 1
    build_strategy(config)
    chat, _ = load_chat(folder, False, "model", config.data.max_len)
    question = "Tell me a long story about number {}."
    prompts = [chat.prompt([{"role": "user", "content": question.format(number)}]) for number in range(PROMPTS)]
    cases: list[tuple[Any, str, list[float]]] = [
        ("vllm", "", [0.0]),
        ("vllm", folder, [0.0, SHARE]),
        ("hf", folder, [0.0, SHARE]),
    ]
    for engine, reference, shares in cases:
        config.rollout.engine = engine
        rollout = start_rollout(config, chat, folder, reference)
        fastest: dict[float, float] = {}
        for number in range(RUNS):
            for share in shares:
                sampling = Sampling(1.0, 1.0, TOKENS, seed=number, share=share)
                rollout.generate(prompts, Sampling(1.0, 1.0, 1, seed=number, share=share), "")  # takes the share up
                start = perf_counter()
                answers = rollout.generate(prompts, sampling, "")
                spent = (perf_counter() - start) / sum(answer.tokens for (answer,) in answers)
                fastest[share] = min(spent, fastest.get(share, spent))
        rollout.close()
        for share, seconds in fastest.items():
            beside = "with a reference" if reference else "without a reference"
            print(f"{engine} {beside}, share {share}: {1000 * seconds:.2f} ms per token", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
