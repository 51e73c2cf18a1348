"""The work of a fixed run, counted instead of timed: models loaded, forward passes, tokens that they compute, and bytes
written."""

from __future__ import annotations

import pytest
from counting import counted
from running import arguments

from openrlhf_sgpo.data.records import load_pairs
from openrlhf_sgpo.data.tokens import ChatFormat, load_tokenizer

pytestmark = pytest.mark.slow


def sizes(model, path):
    """Tokens of each pair of a file, the prompt once."""
    chat = ChatFormat(load_tokenizer(str(model), False, "model"), 128)
    return [len(chat.pair(pair)) for pair in load_pairs(str(path))]


CHECK = 14  # tokens of the comparison with the padded layout, once per model in memory


def test_work_of_a_stage_on_pairs(tiny_model, tiny_data, tmp_path):
    """24 pairs in 6 steps of 4, which fit into one forward pass each, and 8 held-out pairs before and after."""
    loaded, tokens, _ = counted(arguments(tiny_model, tiny_data, tmp_path / "run", algo="dpo"))
    pairs, held_out = (sizes(tiny_model, tiny_data[name]) for name in ("pairs", "held_out"))
    assert len(tokens[True]) == 6 and sum(tokens[True]) == sum(pairs)
    # The start as reference of the loss and of both evaluations, and to be trained; the policy for its evaluation.
    assert loaded == {str(tiny_model): 2, str(tmp_path / "run/round_0/policy"): 1}
    # Every pair under the reference once, held-out pairs under both, and the last micro-batch once more at the end.
    assert sum(tokens[False]) == sum(pairs) + 2 * sum(held_out) + tokens[True][-1] + CHECK * loaded.total()
    filled = -(-sum(pairs) // (2 * 512)) + 1 + 2 * (-(-sum(held_out) // (2 * 512)))
    assert len(tokens[False]) <= filled + 1 + loaded.total()


def test_work_of_a_run_in_rounds(tiny_model, tiny_data, tmp_path):
    """Every policy is loaded to be scored, by its evaluation and as it ranks answers, to be trained further, and by the sampler
    here, which has its own copy. The start stays in memory as the reference."""
    loaded, tokens, written = counted(arguments(tiny_model, tiny_data, tmp_path / "run"))
    policies = [loaded[str(tmp_path / f"run/round_{number}/policy")] for number in (0, 1, 2)]
    assert policies == [3, 3, 2] and loaded[str(tiny_model)] == 3, loaded
    assert len(tokens[True]) == 6 + 2 * 3, "one forward pass for each optimiser step"
    left = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert written < 1.1 * left, "what is written stays: three policies, each once"
