"""The pair trainer against OpenRLHF's own DPOTrainer, and policies that survive being saved."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from openrlhf_sgpo.algorithms.base import NoSettings, Stage
from openrlhf_sgpo.algorithms.dpo import DPO
from openrlhf_sgpo.algorithms.sgpo import SGPO, SGPOSettings
from openrlhf_sgpo.algorithms.w_dpo import WDPO, WDPOSettings


def upstream_losses(config, tiny_data, tokenizer):
    """Losses of the installed, unmodified DPOTrainer.fit on its own dataset, per micro-step; and the final weights."""
    from datasets import load_dataset

    from openrlhf_sgpo.openrlhf import DPOTrainer, RewardDataset, build_strategy, load_actor

    strategy = build_strategy(config)
    strategy.args.data = SimpleNamespace(
        prompt_key="prompt", chosen_key="chosen", rejected_key="rejected", apply_chat_template=True
    )

    def conversation(row):
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }

    pairs = load_dataset("json", data_files=str(tiny_data["pairs"]), split="train").map(conversation)
    dataset = RewardDataset(pairs, tokenizer, 256, strategy, is_dpo=True, num_processors=1)
    loader = strategy.setup_dataloader(dataset, config.train.micro_batch_size, collate_fn=dataset.collate_fn)
    model = load_actor(config.model.model_name_or_path, config, strategy, trainable=True)
    reference = load_actor(config.model.model_name_or_path, config, strategy, trainable=False)
    settings = optimizer_settings(config, len(dataset))
    (model, optimizer, scheduler), reference = strategy.prepare((model, settings), reference)
    trainer = DPOTrainer(
        model, reference, strategy, tokenizer, optimizer, loader, None, scheduler, beta=config.model.beta, max_epochs=2
    )
    steps = []
    trainer.save_logs_and_checkpoints = lambda args, step, bar, logs, states: steps.append(logs["loss_mean"])
    trainer.fit(strategy.args)
    return steps, weights(model)


def optimizer_settings(config, pairs):
    return {
        "optim": "adam",
        "adam": vars(config.adam),
        "lr_scheduler": config.lr_scheduler,
        "lr_warmup_ratio": config.lr_warmup_ratio,
        "min_lr_ratio": config.min_lr_ratio,
        "max_norm": config.max_norm,
        "scheduler_steps": 2 * (pairs // config.train.batch_size),
    }


def weights(actor):
    return {name: weight.clone() for name, weight in actor.model.module.state_dict().items()}


def our_losses(config, groups, tokenizer, tmp_path, algorithm, look=lambda step, metrics: None, labels=None):
    """Losses per optimiser step of our trainer, and the saved weights; two epochs, or --train.max_steps. labels: as
    ``label_columns`` has them."""
    from safetensors.torch import load_file
    from trainers import make_trainer, train_on_pairs

    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.training.pairs import PairBatches
    from openrlhf_sgpo.training.scoring import Scorer
    from openrlhf_sgpo.training.sizes import optimiser_steps

    strategy = build_strategy(config)
    reference = Scorer(config, strategy, 0).score(config.model.model_name_or_path, groups, "reference")
    steps = optimiser_steps(len(groups), 2, config.train, strategy.world_size)
    algorithm.begin_stage(Stage(torch.zeros(len(groups)), 1, steps))
    trainer = make_trainer(algorithm, config, strategy, tokenizer, tmp_path, steps)
    losses = train_on_pairs(trainer, PairBatches(groups, reference, strategy, labels), look)
    return losses, load_file(tmp_path / "policy" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "auto"])
def test_dpo_follows_openrlhf_step_by_step(make_config, groups, tokenizer, tiny_data, tmp_path, layout):
    config = make_config(train__layout=layout)
    assert config.rollout.temperature != 1, "log-probabilities of pairs are those at temperature 1, as OpenRLHF's are"
    expected, expected_weights = upstream_losses(config, tiny_data, tokenizer)
    losses, weights = our_losses(config, groups, tokenizer, tmp_path, DPO(NoSettings(), config.model.beta))
    assert len(losses) == len(expected) == 2 * 24 // 4
    assert abs(expected[-1] - expected[0]) > 0.01, "nothing was learned, so equality would prove nothing"
    assert losses == pytest.approx(expected, abs=2e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=2e-4)


@pytest.mark.slow
def test_sgpo_with_radius_0_is_dpo_exactly(make_config, groups, tokenizer, tmp_path):
    config = make_config()
    dpo, dpo_weights = our_losses(config, groups, tokenizer, tmp_path / "dpo", DPO(NoSettings(), 0.1))
    sgpo, sgpo_weights = our_losses(config, groups, tokenizer, tmp_path / "sgpo", SGPO(SGPOSettings(radius=0.0), 0.1))
    assert sgpo == dpo
    assert all(torch.equal(sgpo_weights[name], weight) for name, weight in dpo_weights.items())
    other, _ = our_losses(config, groups, tokenizer, tmp_path / "other", SGPO(SGPOSettings(radius=0.3), 0.1))
    assert other != dpo


@pytest.mark.slow
def test_gradient_accumulation_equals_one_large_batch(make_config, groups, tokenizer, tmp_path):
    small = make_config(train__micro_batch_size=1, train__layout="padded")
    large = make_config(train__micro_batch_size=4, train__layout="padded")
    losses, weights = our_losses(small, groups, tokenizer, tmp_path / "1", DPO(NoSettings(), 0.1))
    four, four_weights = our_losses(large, groups, tokenizer, tmp_path / "4", DPO(NoSettings(), 0.1))
    assert losses == pytest.approx(four, abs=2e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, four_weights[name], rtol=0, atol=2e-4)


@pytest.mark.slow
def test_weights_soft_labels_and_likelihood_in_both_layouts_and_any_micro_batch(
    make_config, groups, tokenizer, tmp_path
):
    """One pair at a time, padded, or four together behind shared prefixes: the same losses and weights."""
    generator = torch.Generator().manual_seed(0)
    labels = {name: torch.rand(len(groups), generator=generator) for name in ("weight", "chosen_probability")}
    small = make_config(train__micro_batch_size=1, train__nll_coef=0.5)
    large = make_config(train__micro_batch_size=4, train__nll_coef=0.5, train__layout="shared_prefix")
    dpo = DPO(NoSettings(), 0.1)
    losses, weights = our_losses(small, groups, tokenizer, tmp_path / "1", dpo, labels=labels)
    same_losses, same_weights = our_losses(large, groups, tokenizer, tmp_path / "4", dpo, labels=labels)
    assert losses == pytest.approx(same_losses, abs=2e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, same_weights[name], rtol=0, atol=2e-4)
    for changed in ({}, {"weight": labels["weight"]}, {"chosen_probability": labels["chosen_probability"]}):
        other, _ = our_losses(large, groups, tokenizer, tmp_path / "other", dpo, labels=changed)
        assert abs(other[0] - losses[0]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 15])
def test_max_steps_ends_a_stage_with_a_schedule_of_its_own(make_config, groups, tokenizer, tmp_path, steps):
    """Two epochs are 12 steps: fewer, and more, which go on into further epochs. Warm-up and decay are over those steps."""
    config = make_config(train__max_steps=steps, lr_scheduler="linear", lr_warmup_ratio=0.0)
    rates = []
    dpo = DPO(NoSettings(), config.model.beta)
    losses, _ = our_losses(
        config, groups, tokenizer, tmp_path, dpo, lambda step, metrics: rates.append(metrics.get("train/learning_rate"))
    )
    assert len(losses) == steps
    assert rates[:-1] == pytest.approx([1e-3 * (1 - step / steps) for step in range(steps)], abs=1e-9)
    whole, _ = our_losses(make_config(), groups, tokenizer, tmp_path / "whole", DPO(NoSettings(), config.model.beta))
    assert losses[0] == whole[0] and len(whole) == 12


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("moment", [8, None], ids=["in the last step", "before the policy is written"])
def test_max_steps_survives_a_kill(make_config, groups, tokenizer, tmp_path, moment, dtype):
    """Killed in its last step, and killed when all steps are done and the policy is not yet written: the same bytes."""
    config = make_config(train__max_steps=8, ckpt__save_steps=4, ds__param_dtype=dtype)

    def train(folder, look=lambda step, metrics: None):
        return our_losses(config, groups, tokenizer, tmp_path / folder, DPO(NoSettings(), config.model.beta), look)

    def die(step, metrics):
        if step == moment:
            raise KeyboardInterrupt

    losses, weights = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("killed", die)
    resumed, again = train("killed")
    assert resumed == (losses[4:] if moment else [])
    assert all(torch.equal(again[key], weight) for key, weight in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype", "rank"), [(0, "fp32", 0), (1, "bf16", 0), (2, "fp32", 4), (3, "fp32", 0), (3, "fp32", 4)]
)
def test_a_saved_policy_has_the_trained_log_probabilities(make_config, groups, tokenizer, tmp_path, stage, dtype, rank):
    """For every ZeRO stage, with and without LoRA: the folder read by plain transformers equals the trained actor."""
    from transformers import AutoModelForCausalLM

    from openrlhf_sgpo.openrlhf import build_strategy, load_actor, save_policy
    from openrlhf_sgpo.training.log_probs import response_log_probs

    config = make_config(ds__zero_stage=stage, ds__param_dtype=dtype, ds__lora__rank=rank, train__batch_size=2)
    strategy = build_strategy(config)
    actor = load_actor(config.model.model_name_or_path, config, strategy, trainable=True)
    actor, optimizer, scheduler = strategy.prepare(
        (actor, optimizer_settings(config, 24) | {"lr_scheduler": "constant"})
    )
    before = response_log_probs(actor, groups[:2], 0).detach()
    for _ in range(3):
        loss = -response_log_probs(actor, groups[:2], 0)[::2].mean()
        strategy.backward(loss, actor, optimizer)
        strategy.optimizer_step(optimizer, actor, scheduler)
    trained = response_log_probs(actor, groups[:2], 0).detach()
    assert (trained - before).abs().max() > 0.1
    save_policy(actor, tokenizer, str(tmp_path / "policy"), strategy)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert model.config.use_cache
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    expected = []
    for group in groups[:2]:
        for response in group.responses:
            tokens = torch.tensor([group.prompt + response])
            log_probs = model(tokens).logits[0, :-1].float().log_softmax(-1).gather(-1, tokens[0, 1:, None])
            expected.append(log_probs[len(group.prompt) - 1 :].sum())
    tolerance = 1e-3 if dtype == "fp32" else 0.5
    torch.testing.assert_close(trained, torch.stack(expected), rtol=0, atol=tolerance)


@pytest.mark.slow
def test_w_dpo_trains_the_same_however_it_is_cut_and_sharded(make_config, groups, tokenizer, tmp_path):
    """Micro-batches of one and of four, ZeRO 0 and 2, recomputed activations; with adapters it trains too."""

    def losses(name, **changes):
        config = make_config(ds__attn_implementation="eager", train__max_steps=4, **changes)
        return our_losses(config, groups, tokenizer, tmp_path / name, WDPO(WDPOSettings(0.05), 0.1))[0]

    expected = losses("whole", train__micro_batch_size=4)
    assert losses("single", train__micro_batch_size=1) == pytest.approx(expected, abs=1e-4)
    assert losses("sharded", ds__zero_stage=2) == pytest.approx(expected, abs=1e-4)
    assert losses("recomputed", model__gradient_checkpointing_enable=True) == pytest.approx(expected, abs=1e-4)
    config = make_config(ds__attn_implementation="eager", train__max_steps=4)
    without = our_losses(config, groups, tokenizer, tmp_path / "dpo", WDPO(WDPOSettings(0.0), 0.1))[0]
    assert expected[0] > without[0] + 0.01
    adapted = losses("adapted", ds__lora__rank=4)
    assert adapted[0] == pytest.approx(expected[0], abs=1e-4) and adapted != expected


@pytest.mark.slow
def test_weights_are_gathered_in_turn_on_a_cpu(make_config, groups, tokenizer, tmp_path, monkeypatch):
    """DeepSpeed's other way starts them all, and waits for one."""
    from deepspeed.runtime.zero.partition_parameters import Init

    gathered = []
    in_turn = Init._allgather_params_sequential
    monkeypatch.setattr(Init, "_allgather_params_coalesced", lambda *_, **__: pytest.fail("all at once"))
    monkeypatch.setattr(
        Init,
        "_allgather_params_sequential",
        lambda self, weights, **more: gathered.append(len(weights)) or in_turn(self, weights, **more),
    )
    our_losses(make_config(ds__zero_stage=3), groups, tokenizer, tmp_path, DPO(NoSettings(), 0.1))
    assert max(gathered) > 1, "several at a time were asked for"
