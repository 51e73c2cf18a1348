"""Seconds and bytes of a sync: weights from the trainer's memory into the engines', checked with checksums.

    python measurements/weight_sync.py MODEL [ENGINE] [ENGINES]

MODEL: a Hugging Face folder. ENGINE: vllm or hf. ENGINES: how many of vLLM. The first sync opens the way, the others are those
of training.
"""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.tokens import load_chat
from openrlhf_sgpo.openrlhf import PolicyWeights, build_strategy, load_actor
from openrlhf_sgpo.rollout import start_rollout

SYNCS = 6


def main(folder: str, engine: Any = "vllm", engines: str = "1") -> None:
    config = Config()
    config.model.model_name_or_path, config.rollout.engine = folder, engine
    config.vllm.num_engines, config.data.max_len = int(engines), 256
    config.train.batch_size = config.train.micro_batch_size = 1
    strategy = build_strategy(config)
    chat, _ = load_chat(folder, False, "model", config.data.max_len)
    rollout: Any = start_rollout(config, chat, folder)
    actor = strategy.prepare(load_actor(folder, config, strategy, trainable=False))
    for number in range(SYNCS):
        start = perf_counter()
        rollout.load(PolicyWeights(actor))
        seconds = perf_counter() - start
        figures = f", {rollout.sent / 2**20:.0f} MiB, {rollout.compared:.0%} compared" if engine == "vllm" else ""
        print(f"sync {number + 1}: {seconds:.2f} s{figures}", flush=True)
    rollout.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
