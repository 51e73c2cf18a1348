"""What a stage of training or scoring leaves in memory: nothing of its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import forked

SCRIPT = Path(__file__).parent / "freed_memory.py"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_models_are_freed_after_every_stage(ranks, tiny_model):
    """At ZeRO 0, 2 and 3, with LoRA too. DeepSpeed refers to models of ZeRO 3 from two places of its own after their end."""
    process = forked(SCRIPT, str(tiny_model), ranks=ranks)
    assert process.returncode == 0, process.stderr[-3000:]
    reports = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 4 * ranks
    for report in reports:
        assert report["models"] == 6 and report["alive"] == 0, report
        first, *later = report["left"]
        # A model has 0.4 MB, in fp32 with Adam's moments four times that.
        # What stages leave would add up. Now and then a thread of gloo holds one stage's gradients until the next.
        assert report["inside"] > min(later) + 100_000 and min(later) <= first + 1000, report
