"""Counts the work of a run in this process: models loaded, tokens of each forward pass, and bytes written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from openrlhf_sgpo import algorithms, run_settings


class Work(NamedTuple):
    """loaded: models, by folder. tokens: of each forward pass, with gradient (True) and without. written: bytes, without pages,
    which have the scripts of their plots in them."""

    loaded: Counter[str]
    tokens: dict[bool, list[int]]
    written: int


def written() -> int:
    """Bytes that this process has written so far."""
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def counted(argv: list[str]) -> Work:
    """The work of ``train``."""
    from transformers import AutoModelForCausalLM

    from openrlhf_sgpo.loop import execute
    from openrlhf_sgpo.report import live
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
        patch.setattr(live, "write_report", lambda folder, *_: folder / "report.html")
        config, options = run_settings.load(argv)
        before = written()
        execute(config, algorithms.get(config.algo), options)
    return Work(loaded, tokens, written() - before)
