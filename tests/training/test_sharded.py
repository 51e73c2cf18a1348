"""Models whose weights ranks share, at ZeRO 3, against whole ones."""

from __future__ import annotations

import json

import pytest
from running import forked

# Above DeepSpeed's threshold, below which every rank keeps weights whole.
VOCABULARY, WIDTH = 2048, 64

# Each rank has pairs of its own, the second one longer ones, which take more chunks of the vocabulary's logits.
RANKS = """
import json, os, sys
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.openrlhf import build_strategy, load_actor
from openrlhf_sgpo.packed import head
from openrlhf_sgpo.training.log_probs import figures_of, predictions, response_log_probs, sequence_divergence
from openrlhf_sgpo.training.policies import load_trained

policy, reference, vocabulary, stage, adapters = sys.argv[1:]
config = Config()
config.model.model_name_or_path, config.data.max_len = policy, 128
config.train.batch_size, config.train.micro_batch_size = 2, 1
config.ds.param_dtype, config.ds.zero_stage = "fp32", int(stage)
if adapters == "true":
    config.ds.lora.rank, config.ds.lora.target_modules = 4, ["lm_head", "q_proj"]
head.ELEMENTS["cpu"] = 10 * int(vocabulary) // 16  # ten rows at a time
strategy = build_strategy(config)
actor, optimizer, scheduler = load_trained(policy, config, strategy, 1e-3, 10, "")
frozen = strategy.prepare(load_actor(reference, config, strategy, trainable=False)).eval()
pairs = [Group((3, 5, 7), (tuple(range(length)), tuple(range(20, 20 + length)))) for length in (6, 40)]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def figures(predicted, of_reference):
    return predicted.sums(predicted.log_probs()) + sequence_divergence(predicted, of_reference)

rows = []
for _ in range(4):
    actor.train()
    for start in range(0, 2, world):
        number = start + rank
        of_reference = predictions(frozen, [pairs[number]], 0)
        values = figures_of(actor, [pairs[number]], 0, lambda predicted: figures(predicted, of_reference))
        rows.append([number, values.tolist()])
        strategy.accumulate(values.sum() / 2 * world / 100, actor, start + world == 2)
    strategy.optimizer_step(optimizer, actor, scheduler)
print(json.dumps(rows), flush=True)
"""


def make_model(folder, seed):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def test_two_ranks_share_weights_and_compute_what_one_does(tmp_path):
    """Steps of log-probabilities and divergences over the whole vocabulary, of responses of different lengths by rank."""
    (tmp_path / "ranks.py").write_text(RANKS)
    for seed, name in enumerate(("policy", "reference")):
        make_model(tmp_path / name, seed)
    for adapters in ("false", "true"):
        rows = {}
        for stage, count in ((0, 1), (3, 2)):
            given = (*(str(tmp_path / name) for name in ("policy", "reference")), str(VOCABULARY), str(stage), adapters)
            process = forked(tmp_path / "ranks.py", *given, ranks=count)
            assert process.returncode == 0, process.stderr[-3000:]
            lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("[[")]
            assert len(lines) == count
            rows[stage] = {
                (number, step): values
                for line in lines
                for number in (0, 1)
                for step, values in enumerate(values for place, values in line if place == number)
            }
        assert rows[0].keys() == rows[3].keys() and len(rows[0]) == 8
        for key, values in rows[0].items():
            assert rows[3][key] == pytest.approx(values, rel=1e-4), key
