"""Counts the work of a run in this process: models loaded, and tokens of each forward pass."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from openrlhf_sgpo import algorithms, run_settings


def counted(argv: list[str]) -> tuple[Counter[str], dict[bool, list[int]]]:
    """Run ``train``; the models loaded, by folder, and the tokens of each forward pass, with gradient (True) and without."""
    from transformers import AutoModelForCausalLM

    from openrlhf_sgpo.loop import execute
    from openrlhf_sgpo.training import log_probs

    loaded: Counter[str] = Counter()
    tokens: dict[bool, list[int]] = {True: [], False: []}
    load, pack = AutoModelForCausalLM.from_pretrained, log_probs.pack

    def counted_load(folder, *rest, **more):
        loaded[str(folder)] += 1
        return load(folder, *rest, **more)

    def counted_pack(groups, device):
        packing = pack(groups, device)
        tokens[torch.is_grad_enabled()].append(packing.tokens.numel())
        return packing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", counted_load)
        patch.setattr(log_probs, "pack", counted_pack)
        config, options = run_settings.load(argv)
        execute(config, algorithms.get(config.algo), options)
    return loaded, tokens
