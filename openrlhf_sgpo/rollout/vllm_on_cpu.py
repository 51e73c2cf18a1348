"""vLLM on a machine without a GPU: the environment of its engines, and weights that can be replaced."""

from __future__ import annotations

import os
import sys

PLAIN_WEIGHTS = "OPENRLHF_SGPO_PLAIN_WEIGHTS"

CPU_ENVIRONMENT = {
    PLAIN_WEIGHTS: "1",
    # Otherwise a CPU engine gets a worker process of its own, and both poll for each other while the policy trains.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",  # compiling for a CPU takes longer than small runs do
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
}

# Eager for the same reason. vLLM 0.29 cannot rewind a CPU random generator, which it does for a request that has its own
# seed and whose prompt is prefilled in chunks.
CPU_ENGINE_ARGUMENTS = {"enforce_eager": True, "enable_chunked_prefill": False}


def keep_plain_weights() -> None:
    """vLLM plugin (entry point ``vllm.general_plugins``), active in this package's engines only.

    On CPU vLLM packs every linear weight when a model is loaded and drops the parameter, so that a later
    ``load_weights`` fails. Here the layer keeps its parameter and calls the plain product.
    """
    if os.environ.get(PLAIN_WEIGHTS) != "1":
        return
    import torch
    import vllm.model_executor.layers.utils as utils

    name = "dispatch_cpu_unquantized_gemm"
    packed = getattr(utils, name)

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is packed:
            setattr(module, name, plain)
