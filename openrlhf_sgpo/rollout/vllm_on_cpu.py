"""vLLM on machines without a GPU: the environment of its engines, and weights that can be replaced."""

from __future__ import annotations

import copy
import os
import sys

PLAIN_WEIGHTS = "OPENRLHF_SGPO_PLAIN_WEIGHTS"

CPU_ENVIRONMENT = {
    PLAIN_WEIGHTS: "1",
    # Otherwise a CPU engine has a separate worker process, and the two poll each other while the policy trains.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",  # compiling for a CPU takes longer than small runs
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
}


def threads_of(engines: int) -> str:
    """OMP_NUM_THREADS of each of so many engines: the user's, or an equal share of the cores, because the policy does not train
    while engines sample, unless they are one step behind. Ray would give an actor that reserves no core a single thread."""
    share = max(1, len(os.sched_getaffinity(0)) // engines)
    return os.environ.get("OMP_NUM_THREADS", str(share))


# Eager for the same reason. No chunked prefill, because vLLM 0.29 rewinds the random generator of a seeded request whose prompt
# is prefilled in chunks, which is impossible on a CPU.
CPU_ENGINE_ARGUMENTS = {"enforce_eager": True, "enable_chunked_prefill": False}


def keep_plain_weights() -> None:
    """vLLM plugin (entry point ``vllm.general_plugins``), active in this package's engines only.

    On a CPU vLLM packs weights when it loads a model. It drops those of linear layers, so a later ``load_weights`` fails, and
    it puts packed experts in the place of plain ones, where a later ``load_weights`` would write plain ones again. With this
    plugin layers keep their parameters, and pack them at the first product after ``layer.forget_packed``. Convolutions, which
    vLLM packs in place too, are refused.
    """
    if os.environ.get(PLAIN_WEIGHTS) == "1":
        _keep_linear()
        _keep_experts()


def _keep_linear() -> None:
    import vllm.model_executor.layers.utils as utils

    name = "dispatch_cpu_unquantized_gemm"
    pack = getattr(utils, name)

    def keep(layer, remove_weight):
        if layer.weight.ndim != 2:
            raise NotImplementedError(
                "engines on a CPU cannot replace weights of convolutions: use --rollout.engine hf"
            )

        def pack_first(states, weight, bias):
            pack(layer, remove_weight=False)
            return layer.cpu_linear(states, weight, bias)

        def forget_packed():
            layer.cpu_linear = pack_first

        layer.forget_packed = forget_packed
        forget_packed()

    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is pack:
            setattr(module, name, keep)


def _keep_experts() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts as Experts

    pack, multiply = Experts.process_weights_after_loading, Experts.apply

    def keep(experts, layer):
        def pack_first():
            packed = copy.copy(layer)
            packed._parameters = dict(layer._parameters)
            pack(experts, packed)
            experts.packed = lambda: (packed.w13_weight, packed.w2_weight)
            return experts.packed()

        def forget_packed():
            experts.packed = pack_first

        layer.forget_packed = forget_packed
        forget_packed()

    def multiply_packed(experts, hidden_states, w1, w2, *rest, **settings):
        return multiply(experts, hidden_states, *experts.packed(), *rest, **settings)

    Experts.process_weights_after_loading, Experts.apply = keep, multiply_packed
