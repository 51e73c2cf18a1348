"""Steps on packed rows are those on padded ones: loss, gradient and figures, however pairs are packed."""

from __future__ import annotations

import pytest
import torch

from openrlhf_sgpo.algorithms.base import NoSettings
from openrlhf_sgpo.algorithms.dpo import DPO


@pytest.fixture
def two_steps(make_config, groups, tokenizer, tmp_path):
    """Losses and gradient norms of two steps of DPO on 4 pairs each, the gradient of the first, and its forward passes."""
    from deepspeed.utils import safe_get_full_grad
    from trainers import make_trainer

    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.training.pairs import PairBatches

    def run(**changes):
        # At constant rate from the start, because warm-up would leave the first step without effect.
        config = make_config(lr_scheduler="constant", **changes)
        strategy = build_strategy(config)
        gradients, tokens = {}, []

        def step(optimizer, model, *arguments, **more):
            if model.model.is_gradient_accumulation_boundary() and not gradients:
                weights = {name: safe_get_full_grad(weight) for name, weight in model.model.module.named_parameters()}
                gradients.update({name: weight.clone() for name, weight in weights.items() if weight is not None})
            taken(optimizer, model, *arguments, **more)

        taken, strategy.optimizer_step = strategy.optimizer_step, step
        batches = PairBatches(groups[:8], [(-20.0, -21.0)] * 8, strategy)
        trainer = make_trainer(DPO(NoSettings(), 0.1), config, strategy, tokenizer, tmp_path / "policy", 2)
        with trainer:
            trainer.actor.model.register_forward_pre_hook(lambda *_: tokens.append(1))
            results = [trainer.step(number, batches.step(number)) for number in (1, 2)]
            packed = trainer.actor.head is not None
        assert packed == (config.train.layout == "auto")
        figures = [(metrics["train/loss"], metrics["train/grad_norm"]) for metrics, _ in results]
        return figures, torch.cat([recorded for _, recorded in results]), gradients, len(tokens)

    return run


def check_equal(actual, expected, tolerance=1e-4):
    (figures, recorded, gradients, _), (wanted, right, reference, _) = actual, expected
    assert [pytest.approx(row, rel=tolerance, abs=1e-5) for row in wanted] == figures
    torch.testing.assert_close(recorded, right, rtol=tolerance, atol=1e-3)
    assert gradients.keys() == reference.keys() and len(reference) > 4
    scale = max(gradient.abs().max() for gradient in reference.values()).item()
    for name, gradient in reference.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=10 * tolerance, atol=tolerance * scale, msg=name)


SETTINGS = {
    "ZeRO 0": {},
    "ZeRO 1": {"ds__zero_stage": 1},
    "ZeRO 2": {"ds__zero_stage": 2},
    "ZeRO 3": {"ds__zero_stage": 3},
    "LoRA": {"ds__lora__rank": 4},
    "LoRA, ZeRO 3": {"ds__lora__rank": 4, "ds__zero_stage": 3},
    "LoRA on the head": {"ds__lora__rank": 4, "ds__lora__target_modules": ["lm_head", "q_proj"]},
    "checkpointing": {"model__gradient_checkpointing_enable": True, "ds__zero_stage": 2},
    "checkpointing, ZeRO 3": {"model__gradient_checkpointing_enable": True, "ds__zero_stage": 3},
    "checkpointing, LoRA": {"model__gradient_checkpointing_enable": True, "ds__lora__rank": 4},
    "bf16": {"ds__param_dtype": "bf16", "ds__zero_stage": 2},
}
FAST = {"ZeRO 0"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SETTINGS]
)
def test_packed_steps_are_padded_steps(two_steps, name):
    padded = two_steps(train__layout="padded", **SETTINGS[name])
    packed = two_steps(**SETTINGS[name])
    tolerance = 0.05 if name == "bf16" else 1e-4
    check_equal(packed, padded, tolerance)
    assert padded[3] == 2 * 2 and packed[3] == 2 + 2, "one forward a step for all pairs, and two of the check"


def test_results_do_not_depend_on_how_pairs_are_packed(two_steps):
    """One pair in each forward, all four, and two and a half pairs' worth of tokens, with 1, 2 and 3 pairs in them."""
    single, whole, mixed = (two_steps(train__max_tokens=tokens, ds__zero_stage=2) for tokens in (1, 10_000, 110))
    assert single[3] == 2 * 4 + 2 and whole[3] == 2 + 2 < mixed[3] < single[3]
    check_equal(single, whole)
    check_equal(mixed, whole)


def test_a_model_that_does_more_is_refused(make_config, groups):
    """Whatever a model does to its logits that the head does not know: here it scales them."""
    from openrlhf_sgpo.openrlhf import build_strategy, load_actor
    from openrlhf_sgpo.training.log_probs import response_log_probs

    config = make_config()
    actor = load_actor(config.model.model_name_or_path, config, build_strategy(config), trainable=False)
    actor.head.scaling = actor.head.scaling._replace(scale=0.5)
    with pytest.raises(ValueError, match="--train.layout auto does not fit this model.*use padded"):
        response_log_probs(actor, groups, 0)
