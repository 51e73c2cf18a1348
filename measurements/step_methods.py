"""The methods of ``steps.py``: optimiser steps of DPO on the same pairs by this package, OpenRLHF and TRL."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "build/peers"))

import torch
from deepspeed.utils import safe_get_full_grad
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from openrlhf_sgpo.algorithms.base import NoSettings
from openrlhf_sgpo.algorithms.dpo import DPO
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.openrlhf import DEFAULT_ADAPTER, DPOTrainer, build_strategy, load_actor
from openrlhf_sgpo.training.log_probs import response_log_probs
from openrlhf_sgpo.training.packing import padded_rows
from openrlhf_sgpo.training.pairs import PairForward, PairSamples
from openrlhf_sgpo.training.trainer import Trainer, TrainingStage

PAIRS, MICRO_BATCH = 4, 2
MIXED = [(34, 98, 212), (180, 332, 150), (61, 441, 405), (257, 120, 255)]  # prompt, chosen and rejected
SMALLEST_VOCABULARY = 1_500  # of a replica with one layer


def make_models(folder: Path, source: str, layers: int) -> tuple[str, str]:
    """Policy and reference: replicas of the model in ``source``, with random weights and the same share of the vocabulary as of
    the layers."""
    config = AutoConfig.from_pretrained(source)
    config.vocab_size = config.vocab_size * layers // config.num_hidden_layers
    config.num_hidden_layers = layers
    config.layer_types, config.pad_token_id, config.bos_token_id, config.eos_token_id = None, 0, 1, 2
    names = []
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
        names.append(str(folder / name))
    return names[0], names[1]


def make_pairs(shape: str) -> list[Group]:
    lengths = MIXED
    if shape != "mixed":
        prompt, response = map(int, shape.split(","))
        lengths = [(prompt, response, response)] * PAIRS
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, SMALLEST_VOCABULARY, (length,), generator=generator).tolist())

    return [Group(draw(prompt), (draw(chosen), draw(rejected))) for prompt, chosen, rejected in lengths]


def settings(policy: str, reference: str, groups: list[Group], layout: str, zero_stage: int = 2) -> Config:
    config = Config()
    config.model.model_name_or_path, config.ref.model_name_or_path = policy, reference
    config.train.batch_size, config.train.micro_batch_size = PAIRS, MICRO_BATCH
    config.train.layout = layout  # type: ignore[assignment]
    config.data.max_len = max(len(group.prompt) + max(map(len, group.responses)) for group in groups)
    config.ds.param_dtype, config.lr_scheduler, config.lr_warmup_ratio = "fp32", "constant", 0.0
    config.ds.zero_stage = zero_stage  # type: ignore[assignment]
    config.adam.lr = 1e-9  # so that every step is the first one again
    return config


class Method:
    """step: takes one step, and returns its loss. gradient: of the latest step that was asked to keep it, by parameter."""

    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] | None = None
        self.step: Callable[[], float]

    def watch(self, strategy: Any) -> None:
        """Keep the gradient before the next optimiser step of a strategy."""
        step = strategy.optimizer_step

        def keeping(optimizer: Any, model: Any, *rest: Any, **more: Any) -> None:
            if self.gradient == {} and model.model.is_gradient_accumulation_boundary():
                self.gradient = {
                    name: safe_get_full_grad(p).clone() for name, p in model.model.module.named_parameters()
                }
            step(optimizer, model, *rest, **more)

        strategy.optimizer_step = keeping


class ThisPackage(Method):
    def __init__(
        self, layout: str, policy: str, reference: str, groups: list[Group], zero_stage: int = 2, max_tokens: int = 0
    ):
        super().__init__()
        config = settings(policy, reference, groups, layout, zero_stage)
        config.train.max_tokens = max_tokens
        strategy = build_strategy(config)
        self.watch(strategy)
        frozen = strategy.prepare(load_actor(reference, config, strategy, trainable=False))
        with torch.no_grad():
            scores = response_log_probs(frozen, groups, 0).view(-1, 2)
        frozen.model.destroy()
        algorithm = DPO(NoSettings(), 0.1)
        stage = TrainingStage(
            1,
            algorithm,
            partial(PairForward, algorithm, 0),
            policy,
            config.adam.lr,
            first=0,
            last=10**6,
            scheduled=10**6,
            policies={DEFAULT_ADAPTER: Path()},
            checkpoints=Path("none"),
            generator="steps",
        )
        trainer = Trainer(stage, config, strategy, AutoTokenizer.from_pretrained(policy)).__enter__()
        samples = PairSamples(torch.arange(len(groups)), groups, scores)
        self.step = lambda: trainer.step(1, samples)[0]["train/loss"]


class OpenRLHF(Method):
    def __init__(self, policy: str, reference: str, groups: list[Group], zero_stage: int = 2):
        super().__init__()
        config = settings(policy, reference, groups, "padded", zero_stage)
        strategy = build_strategy(config)
        self.watch(strategy)
        strategy.args.eval.steps = strategy.args.ckpt.save_steps = 10**9
        adam = vars(config.adam)
        optimiser = {"optim": "adam", "adam": adam, "lr_scheduler": "constant", "lr_warmup_ratio": 0.0}
        optimiser |= {"min_lr_ratio": 0.1, "max_norm": config.max_norm, "scheduler_steps": 10**6}
        actor = load_actor(policy, config, strategy, trainable=True)
        (actor, optimizer, scheduler), frozen = strategy.prepare(
            (actor, optimiser), load_actor(reference, config, strategy, trainable=False)
        )
        batches = []
        for start in range(0, PAIRS, MICRO_BATCH):
            part = groups[start : start + MICRO_BATCH]
            rows = [padded_rows([Group(g.prompt, (g.responses[side],)) for g in part], 0)[:2] for side in (0, 1)]
            (chosen, c_mask), (rejected, r_mask) = rows
            batches.append((chosen, c_mask, rejected, r_mask, [len(group.prompt) for group in part]))

        class Loader(list):
            sampler = None

        trainer = DPOTrainer(
            actor,
            frozen,
            strategy,
            SimpleNamespace(pad_token_id=0),
            optimizer,
            Loader(batches),
            None,
            scheduler,
            beta=0.1,
            max_epochs=1,
        )
        losses: list[float] = []
        trainer.save_logs_and_checkpoints = lambda args, step, bar, logs, states: losses.append(logs["loss_mean"])

        def step() -> float:
            with redirect_stderr(io.StringIO()):  # where it draws bars, in the midst of the tables
                trainer.fit(strategy.args)
            return losses[-1]

        self.step = step


class TRL(Method):
    def __init__(self, policy: str, reference: str, groups: list[Group]):
        super().__init__()
        from datasets import Dataset
        from trl import DPOConfig
        from trl import DPOTrainer as TRLTrainer

        class Tokenized(TRLTrainer):
            """On tokens, which need no preparation."""

            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

        rows = [
            {"prompt_ids": list(g.prompt), "chosen_ids": list(g.responses[0]), "rejected_ids": list(g.responses[1])}
            for g in groups
        ]
        folder = tempfile.mkdtemp()
        arguments = DPOConfig(
            folder, beta=0.1, per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=PAIRS // MICRO_BATCH,
            precompute_ref_log_probs=True, learning_rate=1e-9, max_length=None, use_cpu=True, bf16=False, report_to=[],
            gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"}, disable_tqdm=True,
        )  # fmt: skip
        models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (policy, reference)]
        trainer = Tokenized(
            models[0], models[1], args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(policy),
        )  # fmt: skip
        dataset = [trainer.train_dataset[number] for number in range(PAIRS)]
        batches = [
            trainer.data_collator(dataset[start : start + MICRO_BATCH]) for start in range(0, PAIRS, MICRO_BATCH)
        ]
        optimizer = trainer.create_optimizer()
        model = trainer.model
        trainer.current_gradient_accumulation_steps = len(batches)

        def step() -> float:
            model.train()
            loss = sum(float(trainer.training_step(model, batch)) for batch in batches)
            if self.gradient == {}:
                self.gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()
            return loss

        self.step = step


def without_onednn(*arguments: Any) -> Method:
    """This package with torch's own matrix products, as the others have them."""
    method = ThisPackage("auto", *arguments)
    step = method.step

    def plain() -> float:
        with torch.backends.mkldnn.flags(enabled=False):
            return step()

    method.step = plain
    return method


METHODS: dict[str, Callable[..., Method]] = {
    "packed": partial(ThisPackage, "auto"),
    "packed, torch's products": without_onednn,
    "packed, ZeRO 0": partial(ThisPackage, "auto", zero_stage=0),
    "packed, single pairs": partial(ThisPackage, "auto", max_tokens=1),
    "padded": partial(ThisPackage, "padded"),
    "openrlhf": OpenRLHF,
    "openrlhf, ZeRO 0": partial(OpenRLHF, zero_stage=0),
    "trl": TRL,
}
