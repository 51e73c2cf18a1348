"""What only a GPU reaches, for the first person who has one: `make test-gpu`, under ten minutes. Written without a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_runs import measured, model_of, run_flags
from running import ROOT, inherited

pytestmark = pytest.mark.gpu


def train(argv: list[str], folder: Path) -> dict:
    """A whole run in a process of its own; returns the costs of its stages."""
    environment = inherited() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "openrlhf_sgpo", "train", *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    log = (folder / "log.txt").read_text()[-3000:] if (folder / "log.txt").exists() else ""
    assert done.returncode == 0, done.stderr[-3000:] + log
    return json.loads((folder / "ledger.json").read_text())["stages"]


def test_installation(gpu):
    """Half precision works, and what a run imports is there."""
    import torch
    import vllm

    from openrlhf_sgpo.openrlhf.strategy import check_cuda

    check_cuda()
    assert torch.cuda.is_bf16_supported()
    free, total = torch.cuda.mem_get_info()
    measured(f"{gpu}, torch {torch.__version__}, vllm {vllm.__version__}: memory", total / 2**30, "GiB")
    assert free > total / 2, "another process has most of this GPU's memory"


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_packed_rows_are_padded_rows(implementation, gpu, sized_model, tiny_data):
    """Log-probabilities of both layouts in bf16, beside those of the padded layout in fp32; the noise of a margin is what a
    radius of the follower competes with."""
    import torch

    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.data import load_pairs
    from openrlhf_sgpo.data.tokens import load_chat
    from openrlhf_sgpo.openrlhf import build_strategy, destroy, load_actor
    from openrlhf_sgpo.training.log_probs import response_log_probs

    if implementation != "sdpa" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    size, model = sized_model
    chat, _ = load_chat(str(model), False, "model", 256)
    groups = [chat.pair(pair) for pair in load_pairs(str(tiny_data["pairs"]))]
    figures = {}
    for layout, dtype in (("padded", "fp32"), ("padded", "bf16"), ("auto", "bf16")):
        config = Config()
        config.train.layout, config.ds.param_dtype, config.ds.zero_stage = layout, dtype, 0
        config.ds.attn_implementation = "sdpa" if dtype == "fp32" else implementation
        strategy = build_strategy(config)
        actor = strategy.prepare(load_actor(str(model), config, strategy, trainable=False))
        actor.eval()
        assert (actor.head is None) == (layout == "padded")
        with torch.no_grad():
            log_probs = response_log_probs(actor, groups, 0).double().cpu()
        figures[layout, dtype] = 0.1 * (log_probs[::2] - log_probs[1::2])
        destroy(actor)
    exact = figures.pop(("padded", "fp32"))
    for (layout, dtype), margins in figures.items():
        noise = (margins - exact).square().mean().sqrt().item()
        measured(f"{size}, {implementation}, {layout}, {dtype}: noise of a margin at beta 0.1", noise, "")
        assert noise < 0.1 * exact.abs().max().item() + 0.05


def test_models_give_their_memory_back(gpu, sized_model):
    """At ZeRO 3 in bf16, with the fused Adam, two steps and a sweep; a model that fits is scored whole."""
    import torch

    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.data.tokens import Group
    from openrlhf_sgpo.memory import release_memory
    from openrlhf_sgpo.openrlhf import build_strategy, destroy
    from openrlhf_sgpo.training.policies import load_trained
    from openrlhf_sgpo.training.scoring import Scorer

    size, model = sized_model
    config = Config()
    config.model.model_name_or_path = str(model)
    config.train.batch_size = config.train.micro_batch_size = 2
    config.ds.zero_stage = 3
    strategy = build_strategy(config)
    rows = torch.arange(3, 259, device="cuda").repeat(2, 1)
    left = []
    for _ in range(3):
        Scorer(config, strategy, 0).score(str(model), [Group((1, 5), ((7, number),)) for number in range(4)], "")
        actor, optimizer, scheduler = load_trained(str(model), config, strategy, 1e-5, 4, "gpu")
        assert type(actor.model.basic_optimizer).__name__ == "AdamW" and actor.model.basic_optimizer.defaults["fused"]
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(2):
            log_probs = actor(rows, attention_mask=torch.ones_like(rows), return_logprobs=True)
            strategy.backward(-log_probs.mean(), actor, optimizer)
            strategy.optimizer_step(optimizer, actor, scheduler)
        torch.cuda.synchronize()
        seconds, peak = (time.perf_counter() - began) / 2, torch.cuda.max_memory_allocated()
        destroy(actor)
        del actor, optimizer, scheduler, log_probs
        release_memory()
        left.append(torch.cuda.memory_allocated())
    measured(f"{size}: step on 2 rows of 256 tokens at ZeRO 3", seconds, "s")
    measured(f"{size}: peak memory of it", peak / 2**30, "GiB")
    assert left[2] <= left[0] + 2**20, left


def test_engines_sleep_and_wake(gpu, sized_model):
    """An engine that sleeps gives most of its memory back, wakes with its weights, and takes other ones up."""
    import torch

    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.data.tokens import load_chat
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.rollout import Sampling, start_rollout

    size, model = sized_model
    config = Config()
    config.data.max_len, config.vllm.gpu_memory_utilization, config.vllm.num_engines = 256, 0.3, 1
    config.train.batch_size = config.train.micro_batch_size = 1
    build_strategy(config)
    chat, _ = load_chat(str(model), False, "model", 256)
    before = torch.cuda.mem_get_info()[0]
    began = time.perf_counter()
    rollout = start_rollout(config, chat, str(model))
    try:
        measured(f"{size}: start of an engine", time.perf_counter() - began, "s")
        asleep = before - torch.cuda.mem_get_info()[0]
        measured(f"{size}: memory of an engine that sleeps", asleep / 2**30, "GiB")
        assert asleep < 0.15 * torch.cuda.mem_get_info()[1]
        prompts = [(1, 10 + number, 20, 30) for number in range(64)]
        began = time.perf_counter()
        samples = rollout.generate(prompts, Sampling(1.0, 1.0, 64, seed=5, n=2), label="")
        tokens = sum(answer.tokens for group in samples for answer in group)
        measured(f"{size}: tokens sampled, waking and sleeping included", tokens / (time.perf_counter() - began), "1/s")
        assert samples == rollout.generate(prompts, Sampling(1.0, 1.0, 64, seed=5, n=2), label="")
        assert all(value < 0 for value in rollout.log_probs([(1, 10, 20, 30)])[0])
    finally:
        rollout.close()


def test_a_round_of_ssapo(gpu, sized_model, tiny_data, tmp_path):
    """Seed, samples, labels, worst case and steps at ZeRO 3 in bf16, with an engine that follows: its weights are compared with
    the policy's after the sync."""
    size, model = sized_model
    stages = train(run_flags(model, tiny_data, tmp_path / "run", "sgpo"), tmp_path / "run")
    measured(f"{size}: SSAPO, one round: seconds", sum(stage["seconds"] for stage in stages.values()), "s")
    measured(f"{size}: SSAPO: peak memory", max(stage["peak_memory_gib"] for stage in stages.values()), "GiB")
    evaluation = json.loads((tmp_path / "run" / "round_1" / "evaluation.json").read_text())
    measured(f"{size}: noise of engine and trainer", evaluation["probe"]["noise"], "nats per text")


def test_three_steps_of_slhf(gpu, sized_model, tiny_data, tmp_path):
    size, model = sized_model
    (stage,) = [
        cost
        for name, cost in train(run_flags(model, tiny_data, tmp_path / "run", "slhf"), tmp_path / "run").items()
        if name.endswith("/play")
    ]
    for part in ("generate", "train", "sync"):
        measured(f"{size}: SLHF, a step: {part}", stage[f"seconds_{part}"] / 3, "s")
    measured(f"{size}: SLHF: peak memory", stage["peak_memory_gib"], "GiB")


def test_three_steps_of_nash_md(gpu, sized_model, tiny_data, tmp_path):
    """The engine has the reference too, and keeps it while it sleeps."""
    size, model = sized_model
    if size != "135M":
        pytest.skip("one size is enough")
    train(run_flags(model, tiny_data, tmp_path / "run", "nash_md", ds__zero_stage="0"), tmp_path / "run")


def test_both_engines_take_the_likeliest_answers_of_the_mixture(gpu, sized_model, tiny_model, tmp_path):
    """In fp32, and again after a sleep; the policy answers in between."""
    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.data.tokens import load_chat
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.rollout import Sampling, start_rollout

    size, model = sized_model
    if size != "135M":
        pytest.skip("one size is enough")
    other = model_of(size, tiny_model, tmp_path / "other", seed=1)
    config = Config()
    config.ds.param_dtype, config.data.max_len = "fp32", 256
    config.vllm.gpu_memory_utilization, config.vllm.num_engines = 0.3, 1
    config.train.batch_size = config.train.micro_batch_size = 1
    build_strategy(config)
    chat, _ = load_chat(str(model), False, "model", 256)
    prompts = [(1, 10 + number, 20, 30) + (40,) * number for number in range(16)]

    def likeliest(engine: str) -> list:
        config.rollout.engine = engine
        rollout = start_rollout(config, chat, str(model), str(other))
        try:
            return [
                rollout.generate(prompts, Sampling(0.0, 1.0, 8, seed=5, share=share), label="")
                for share in (0.5, 0.0, 0.5, 1.0)
            ]
        finally:
            rollout.close()

    of_transformers = likeliest("hf")
    first, policy, again, reference = of_vllm = likeliest("vllm")
    assert first == again and policy != first != reference
    for shares, others in zip(of_transformers, of_vllm, strict=True):
        equal = [a == b for a, b in zip(shares, others, strict=True)]
        assert sum(equal) >= 0.9 * len(equal), "but for tokens that are nearly as likely"


def test_packing_with_flash_attention(gpu, sized_model, tiny_data, tmp_path):
    _, model = sized_model
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    flags = {"ds__packing_samples": "true", "ds__attn_implementation": "flash_attention_2", "rounds__count": "0"}
    argv = run_flags(model, tiny_data, tmp_path / "run", "sgpo", **flags, algo="dpo")
    for name in ("--data.prompt_dataset", "--rollout.max_new_tokens", "--vllm.gpu_memory_utilization"):
        place = argv.index(name)
        del argv[place : place + 2]
    train(argv, tmp_path / "run")
