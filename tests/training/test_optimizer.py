"""The optimiser that DeepSpeed makes of torch's Adam, at every ZeRO stage."""

from __future__ import annotations

import pytest
import torch
from trainers import make_trainer

from openrlhf_sgpo.algorithms.base import NoSettings
from openrlhf_sgpo.algorithms.dpo import DPO


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_step_of_adam_is_the_learning_rate(make_config, groups, tokenizer, tmp_path, stage, dtype):
    """With m = (1 - b1) g and v = (1 - b2) g^2, m / (1 - b1) / sqrt(v / (1 - b2)) is the sign of g, whatever g is; and nothing
    decays before that step."""
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.training.pairs import PairBatches

    config = make_config(
        lr_scheduler="constant", ds__zero_stage=stage, ds__param_dtype=dtype, adam__lr=1e-3, adam__eps=1e-30
    )
    strategy = build_strategy(config)
    batches = PairBatches(groups[:8], [(-20.0, -21.0)] * 8, strategy)
    with make_trainer(DPO(NoSettings(), 0.1), config, strategy, tokenizer, tmp_path / "policy", 2) as trainer:
        engine = trainer.actor.model
        if stage == 3:
            weights = engine.optimizer.fp32_partitioned_groups_flat
        else:
            weights = [weight for group in engine.basic_optimizer.param_groups for weight in group["params"]]
        before = [weight.detach().clone() for weight in weights]
        trainer.step(1, batches.step(1))
        changes = torch.cat([(new.detach() - old).flatten() for new, old in zip(weights, before, strict=True)])
    changes = changes[changes != 0].abs()
    assert len(changes) > 1000
    torch.testing.assert_close(changes, torch.full_like(changes, 1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_rank_alone_trains_the_same_at_zero_0_to_2(make_config, groups, tokenizer, tmp_path, dtype):
    """Steps of four micro-batches each, with gradients that are clipped."""
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.training.pairs import PairBatches

    def figures(stage):
        config = make_config(
            lr_scheduler="constant", ds__zero_stage=stage, ds__param_dtype=dtype, adam__lr=1e-3, train__max_tokens=1
        )
        strategy = build_strategy(config)
        batches = PairBatches(groups[:8], [(-20.0, -21.0)] * 8, strategy)
        with make_trainer(DPO(NoSettings(), 0.1), config, strategy, tokenizer, tmp_path / str(stage), 4) as trainer:
            steps = [trainer.step(number, batches.step(1 + number % 2))[0] for number in (1, 2, 3, 4)]
        return [(step["train/loss"], step["train/grad_norm"]) for step in steps]

    expected = figures(0)
    assert expected[0][1] > 2, "more than --max_norm"
    for stage in (1, 2):
        assert [pytest.approx(row, rel=1e-4) for row in expected] == figures(stage)
