"""Ranks on machines that share no files: only rank 0 has data, models and the run folder.

The paths begin with /proc/self/cwd, which is another folder in each process: the same path leads to other files, as on another
machine.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from running import contents, forked

RANK = """
import os, sys
os.chdir(f"{sys.argv[1]}/rank_{os.environ.get('RANK', '0')}")
from openrlhf_sgpo.cli.main import main
sys.exit(main(["train", *sys.argv[2:]]))
"""
HERE = Path("/proc/self/cwd")


def settings(algo: str, *more: str) -> list[str]:
    common = [
        *("--algo", algo, "--model.model_name_or_path", f"{HERE}/model", "--eval.dataset", f"{HERE}/held_out.jsonl"),
        *("--data.prompt_dataset", f"{HERE}/prompts.jsonl", "--data.max_len", "128"),
        *("--ckpt.output_dir", f"{HERE}/run"),
        *("--train.batch_size", "4", "--train.micro_batch_size", "2", "--adam.lr", "1e-3", "--ds.param_dtype", "fp32"),
        *("--rollout.engine", "hf", "--rollout.max_new_tokens", "8", "--rollout.temperature", "1.0"),
    ]
    return common + list(more)


@pytest.mark.slow
@pytest.mark.skipif(not HERE.exists(), reason="needs /proc")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("algo", "more"),
    [
        (
            "sgpo",
            [
                *("--rounds.count", "1", "--ds.zero_stage", "3", "--data.dataset", f"{HERE}/pairs.jsonl"),
                *("--ckpt.save_steps", "2"),
            ],
        ),
        (
            "online_ipo",
            [
                *("--ds.zero_stage", "2", "--rounds.steps", "3", "--rounds.count", "2", "--oracle", "reward_model"),
                *("--reward.model_name_or_path", f"{HERE}/reward"),
            ],
        ),
    ],
)
def test_only_rank_0_touches_files(algo, more, tiny_model, tiny_reward_model, tiny_data, tmp_path):
    """Two ranks with one file system, and two where the second has none of the files, end with the same files at rank 0; the
    second has written nothing. Each round of online IPO takes up the checkpoint of the one before."""
    for name in ("shared", "apart"):
        first, second = tmp_path / name / "rank_0", tmp_path / name / "rank_1"
        first.mkdir(parents=True)
        shutil.copytree(tiny_model, first / "model")
        shutil.copytree(tiny_reward_model, first / "reward")
        for kind, file in tiny_data.items():
            shutil.copy(file, first / f"{kind}.jsonl")
        second.symlink_to(first) if name == "shared" else second.mkdir()
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    for name in ("shared", "apart"):
        done = forked(script, str(tmp_path / name), *settings(algo, *more), ranks=2, TMPDIR=str(tmp_path))
        assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "apart" / "rank_1").iterdir()) == [], "the other rank wrote files"
    expected, actual = (contents(tmp_path / name / "rank_0" / "run") for name in ("shared", "apart"))
    assert {name: actual.get(name) == expected.get(name) for name in expected | actual} == dict.fromkeys(expected, True)
    assert not list(tmp_path.glob("sgpo-c*")), "copies are left"
