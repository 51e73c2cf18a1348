"""The runs of `make test-gpu`, which branch of the package each test reaches, and the table of what was measured."""

from __future__ import annotations

from pathlib import Path

# Functions of openrlhf_sgpo that ask whether there is a GPU, and the tests here that reach that branch.
BRANCHES = {
    "doctor/report.py:examine": "",  # asks what is there; `openrlhf-sgpo doctor` shows it
    "estimate/devices.py:devices_here": "",  # the same for `estimate`
    "estimate/memory.py:_head": "",  # sizes of tiles on a device, which need not be there
    "estimate/memory.py:scoring": "",
    "judge/server.py:_command": "",  # without one it serves with eager kernels
    "ledger.py:_peak_memory_gib": "test_a_round_of_ssapo",
    "ledger.py:stage": "test_a_round_of_ssapo",
    "memory.py:release_memory": "test_models_give_their_memory_back",
    "openrlhf/actor.py:fits_whole": "test_models_give_their_memory_back",
    "openrlhf/engine.py:gpu": "test_a_round_of_ssapo",
    "openrlhf/weights.py:aside": "test_three_steps_of_slhf",
    "openrlhf/strategy.py:build_strategy": "test_a_round_of_ssapo",
    "openrlhf/strategy.py:check_cuda": "test_installation",
    "packed/attention.py:packed_attention": "test_packed_rows_are_padded_rows",
    "packed/head.py:": "test_packed_rows_are_padded_rows",
    "rollout/__init__.py:check_rollout": "test_a_round_of_ssapo",
    "rollout/base.py:sleeping": "test_engines_sleep_and_wake",
    "rollout/hf.py:_load": "test_both_engines_take_the_likeliest_answers_of_the_mixture",
    "rollout/hf.py:_sample": "test_both_engines_take_the_likeliest_answers_of_the_mixture",
    "rollout/vllm.py:__init__": "test_engines_sleep_and_wake",
    "rollout/transfer.py:open_transfer": "test_three_steps_of_slhf",
    "rollout/vllm.py:_restart": "",  # as `_start`; no test kills an engine on a GPU
    "rollout/vllm.py:_wake": "test_engines_sleep_and_wake",
    "rollout/vllm.py:awake": "test_engines_sleep_and_wake",
    "rollout/vllm.py:replace": "",
    "rollout/vllm.py:_start": "test_engines_sleep_and_wake",
    "run.py:open": "test_a_round_of_ssapo",
}

# As SmolLM2-135M and Qwen2.5-0.5B, with random weights: speed and memory do not depend on these.
SIZES = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}
MEASURED: list[tuple[str, str, str]] = []  # what, figure, unit


def measured(what: str, figure: float, unit: str) -> None:
    MEASURED.append((what, f"{figure:.4g}", unit))


def model_of(size: str, tiny_model: Path, folder: Path, seed: int = 0) -> Path:
    """A Llama of this size in bf16, with the tokenizer of the tiny model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES[size], **tokens, max_position_embeddings=2048)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def run_flags(model: Path, data: dict[str, Path], folder: Path, algo: str, **changes: str) -> list[str]:
    """Of a round of SSAPO, or of three steps of an algorithm with fresh answers, at ZeRO 3 in bf16 with one engine."""
    given = {
        "--algo": algo,
        "--model.model_name_or_path": str(model),
        "--data.prompt_dataset": str(data["prompts"]),
        "--eval.dataset": str(data["held_out"]),
        "--data.max_len": "256",
        "--ckpt.output_dir": str(folder),
        "--train.batch_size": "8",
        "--train.micro_batch_size": "4",
        "--adam.lr": "1e-5",
        "--ds.zero_stage": "3",
        "--rounds.count": "1",
        "--rollout.max_new_tokens": "64",
        "--vllm.gpu_memory_utilization": "0.3",
    }
    if algo == "sgpo":
        given["--data.dataset"] = str(data["pairs"])
    else:
        given |= {"--rounds.steps": "3", "--oracle": "toy_oracles:Letters"}
    given |= {f"--{name.replace('__', '.')}": value for name, value in changes.items()}
    return [word for pair in given.items() for word in pair]
