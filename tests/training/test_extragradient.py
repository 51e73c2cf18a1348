"""Extragradient steps of the real trainer: where each begins, at every ZeRO stage, and that a killed run goes on."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from test_plays import flags, play
from trainers import make_trainer

from openrlhf_sgpo import run_settings
from openrlhf_sgpo.algorithms.base import NoSettings
from openrlhf_sgpo.algorithms.egpo import EGPO
from openrlhf_sgpo.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class OneStepAtATime(EGPO):
    """The same loss without half steps."""

    extragradient = False


def plays():
    """Three answers of random tokens to each of four prompts."""
    from openrlhf_sgpo.data.records import Answer, Prompt
    from openrlhf_sgpo.training.plays import Play

    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 250, (size,), generator=generator).tolist())

    matrix = [[0.5, 0.4, 0.9], [0.6, 0.5, 0.2], [0.1, 0.8, 0.5]]
    prompt = Prompt("p", [{"role": "user", "content": "?"}])
    return [Play(prompt, [(draw(6), Answer("", True, draw(5))) for _ in range(3)], matrix) for _ in range(4)]


@pytest.mark.parametrize(
    "more",
    [("--ds.zero_stage", "0"), ("--ds.zero_stage", "2"), ("--ds.zero_stage", "3", "--ds.adam_offload", "true")],
    ids=["0", "2", "3"],
)
def test_the_second_step_begins_where_the_first_began(more, tiny_model, tiny_data, tmp_path):
    """Until the second update both kinds of steps see the same weights, gradients and moments of Adam. So they end apart by
    what the first step moved."""
    from transformers import AutoTokenizer

    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.openrlhf.actor import _whole_state

    tokenizer, batches = AutoTokenizer.from_pretrained(tiny_model), plays()
    shared = ("--lr_scheduler", "constant", "--rounds.steps", "4", *more)
    settings, _ = run_settings.load(flags(tiny_model, tiny_data, tmp_path, "egpo", *shared))
    paths = []
    for kind in (EGPO, OneStepAtATime):
        strategy = build_strategy(settings)
        trainer = make_trainer(kind(NoSettings(), 0.1), settings, strategy, tokenizer, tmp_path, 20, str(tiny_model))
        with contextlib.ExitStack() as opened:
            opened.enter_context(trainer)
            points = []
            for step in range(5):
                if step:
                    trainer.step(step, batches)
                state = _whole_state(trainer.actor, strategy._unwrap_model(trainer.actor))
                points.append(torch.cat([state[name].flatten().clone() for name in sorted(state)]))
            paths.append(points)
    (start, half, whole, next_half, _), (_, first, second, _, _) = paths
    assert torch.equal(half, first)
    moved = half - start
    assert moved.abs().max() > 5e-4
    assert torch.allclose(second - whole, moved, atol=2e-7)
    assert (next_half - whole).abs().max() > 1e-4


def test_a_run_that_is_stopped_between_the_halves_goes_on(tiny_model, tiny_data, tmp_path, monkeypatch):
    """It resumes from the last whole step, and ends with the same weights."""
    more = ("--rounds.count", "1", "--rounds.steps", "6", "--ckpt.save_steps", "2")
    play(*flags(tiny_model, tiny_data, tmp_path / "whole", "egpo", *more))
    stopped = flags(tiny_model, tiny_data, tmp_path / "stopped", "egpo", *more)
    end_step = Trainer.end_step

    def stop(trainer: Trainer, number: int, *more: Any) -> None:
        if number == 5:
            raise RuntimeError("stopped")
        end_step(trainer, number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "end_step", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            play(*stopped)
    play(*stopped, "--resume", "true")
    policies = [tmp_path / name / "round_1/policy/model.safetensors" for name in ("whole", "stopped")]
    assert policies[0].read_bytes() == policies[1].read_bytes()
