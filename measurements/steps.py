"""A whole optimiser step on preference pairs, and the scoring of several responses to a prompt, side by side with others.

    python measurements/steps.py [--model FOLDER] [--layers 4] [--repeats 3] [--shapes 128,256 512,128 mixed] [--out steps.json]

Steps of DPO on 4 pairs in float32 on one thread: this package in both layouts, and packed with torch's matrix products,
without ZeRO, or one pair at a time; OpenRLHF's ``DPOTrainer``; and TRL's where it is installed (``make benchmark`` puts it into
build/peers), with the reference's log-probabilities computed before, as this package does. OpenRLHF computes them in every
step. The model is a replica of the one in FOLDER with --layers of its layers and the same share of its vocabulary, so that its
parts keep their proportions. All take turns; losses and gradients must agree to 1e-4 before anything is timed. Times are CPU
seconds. Memory is the peak of a step of the first shape above what is held between steps, from a process for each method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "build/peers"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TQDM_DISABLE"] = "1"  # the others draw bars in the midst of the tables

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
AGREEMENT = 1e-4
SCORED = ((256, 128, 2), (256, 128, 4), (256, 128, 8), (128, 256, 8))


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
        return tuple(torch.randint(3, 5_000, (length,), generator=generator).tolist())

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


def check(methods: dict[str, Method]) -> float:
    """Takes a step of each. Returns the largest distance of two gradients, relative to their norm. Raises AssertionError where
    losses or gradients differ."""
    largest, (first, *others) = 0.0, methods
    losses = {}
    for name, method in methods.items():
        method.gradient = {}
        losses[name] = method.step()
    expected = methods[first].gradient or {}
    scale = sum(float(gradient.square().sum()) for gradient in expected.values()) ** 0.5
    for name in others:
        gradients = methods[name].gradient or {}
        assert gradients.keys() == expected.keys() and scale > 0
        apart = sum(float((gradients[key] - expected[key]).square().sum()) for key in expected) ** 0.5 / scale
        largest = max(largest, apart)
        assert apart < AGREEMENT and abs(losses[name] / losses[first] - 1) < AGREEMENT, (name, apart, losses)
    for method in methods.values():
        method.gradient = None
    return largest


def time_steps(shape: str, models: tuple[str, str], repeats: int, names: list[str]) -> list[dict[str, Any]]:
    groups = make_pairs(shape)
    methods = {name: METHODS[name](*models, groups) for name in names}
    agreement = check(methods)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            began = time.process_time()
            method.step()
            seconds[name].append(time.process_time() - began)
    tokens = sum(len(group.prompt) * 2 + sum(map(len, group.responses)) for group in groups)
    best = min(seconds["packed"])
    return [
        {
            "shape": shape,
            "method": name,
            "minimum": min(times),
            "median": statistics.median(times),
            "packed_is_faster": min(times) / best,
            "tokens_per_second": tokens / min(times),
            "gradients_differ": agreement,
        }
        for name, times in seconds.items()
    ]


def time_scoring(models: tuple[str, str], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for prompt, response, count in SCORED:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, 5_000, (prompt + count * response,), generator=generator).tolist()
        responses = tuple(tuple(tokens[prompt + i * response :][:response]) for i in range(count))
        together = [Group(tuple(tokens[:prompt]), responses)]
        single = [Group(tuple(tokens[:prompt]), (each,)) for each in responses]
        actors = {}
        for layout in ("auto", "padded"):
            config = settings(*models, together, layout)
            strategy = build_strategy(config)
            actors[layout] = strategy.prepare(load_actor(models[0], config, strategy, trainable=False)).eval()

        def one_forward(groups: list[Group], actor: Any = actors["auto"]) -> torch.Tensor:
            return response_log_probs(actor, groups, 0)

        def one_each(groups: list[Group], actor: Any = actors["padded"]) -> torch.Tensor:
            return torch.cat([response_log_probs(actor, [group], 0) for group in groups])

        ways = {"together": partial(one_forward, together), "one forward each": partial(one_each, single)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        with torch.no_grad():
            torch.testing.assert_close(ways["together"](), ways["one forward each"](), rtol=AGREEMENT, atol=0)
            for _ in range(repeats):
                for name, way in ways.items():
                    began = time.process_time()
                    way()
                    seconds[name].append(time.process_time() - began)
        best = {name: min(times) for name, times in seconds.items()}
        rows.append(
            {"prompt": prompt, "response": response, "responses": count}
            | best
            | {"ratio": best["one forward each"] / best["together"]}
        )
    return rows


def status(name: str) -> float:
    """GiB of a line of this process's status."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split(f"{name}:")[1].split()[0]) / 2**20


def peak(name: str, shape: str, models: tuple[str, str]) -> float:
    """GiB that a step holds at its peak above what is held between steps."""
    method = METHODS[name](*models, make_pairs(shape))
    method.step()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    method.step()
    return status("VmHWM") - before


def measured_apart(name: str, shape: str, folder: str) -> float:
    """``peak`` in a process of its own, in which freed memory goes back at once, so that what is held can be seen."""
    command = [sys.executable, __file__, "--peak", name, shape, folder]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return float(output.rsplit("peak", 1)[1])


def print_table(rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        if not number:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        print(
            "| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/smollm2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=["256,128", "512,128", "mixed", "128,256"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", default="build/steps.json")
    parser.add_argument("--peak", nargs=3, metavar=("METHOD", "SHAPE", "FOLDER"), help="used by this script itself")
    arguments = parser.parse_args()
    if arguments.peak:
        name, shape, folder = arguments.peak
        print(f"peak {peak(name, shape, (f'{folder}/policy', f'{folder}/reference')):.4f}")
        return
    torch.set_num_threads(1)
    names = [name for name in arguments.methods if name != "trl" or _has_trl()]
    processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    machine = f"{processor.split(':')[1].strip()}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}"
    print(f"{machine}, {platform.system()}")
    result: dict[str, Any] = {"machine": machine, "steps": [], "scoring": [], "memory": []}
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder), arguments.model, arguments.layers)
        for name in names:  # first, because later this process holds many models
            gib = measured_apart(name, arguments.shapes[0], folder)
            result["memory"].append({"shape": arguments.shapes[0], "method": name, "peak_gib": gib})
        print_table(result["memory"])
        for shape in arguments.shapes:
            rows = time_steps(shape, models, arguments.repeats, names)
            print_table(rows)
            result["steps"] += rows
            write(Path(arguments.out), result)
        result["scoring"] = time_scoring(models, arguments.repeats)
        print_table(result["scoring"])
    write(Path(arguments.out), result)
    print(f"written: {arguments.out}")


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2), encoding="utf-8")


def _has_trl() -> bool:
    try:
        import trl
    except ImportError:
        print("TRL is not installed, so it is left out: make benchmark installs it")
        return False
    return bool(trl.__version__)


if __name__ == "__main__":
    main()
