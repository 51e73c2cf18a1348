"""For the tests of refinement: an engine whose answers are known, an oracle that reads marks, and a run folder."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from openrlhf_sgpo.algorithms.slhf import SLHF
from openrlhf_sgpo.data.records import Answer
from openrlhf_sgpo.flags import dump
from openrlhf_sgpo.integrity import signed
from openrlhf_sgpo.oracle import RewardOracle
from openrlhf_sgpo.run_folder import RunFolder
from openrlhf_sgpo.run_settings import load


def number(*parts: object) -> int:
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16)


class Marks(RewardOracle):
    """The reward of an answer is its mark. Few marks, so that there are ties."""

    name = "marks"

    def score(self, prompt, answer):
        return float(re.search(r"mark (\d)", answer)[1])


class ScriptedEngine:
    """Answers of 1 to 20 tokens that depend on the prompt's tokens, the seed and the place. asked: every call."""

    def __init__(self):
        self.asked: list[tuple[list[tuple[int, ...]], int, int]] = []
        self.open = True

    def load(self, folder):
        pass

    def generate(self, prompts, sampling, label):
        self.asked.append((prompts, sampling.n, sampling.seed))
        return [
            [self.sample(number(prompt, sampling.seed, place)) for place in range(sampling.n)] for prompt in prompts
        ]

    def sample(self, key):
        return Answer(f"answer {key} mark {key % 4}", False, (9,) * (1 + key % 20))

    def close(self):
        self.open = False


def make_run(folder: Path, model: Path, *flags: str, rounds: int = 2) -> Path:
    """What a run of SLHF leaves, as far as a refinement reads it; the last round is not finished."""
    argv = ["--algo", "slhf", "--model.model_name_or_path", str(model), "--data.prompt_dataset", "p.jsonl"]
    config, options = load([*argv, "--ckpt.output_dir", str(folder), "--oracle", "refining:Marks", *flags])
    run = RunFolder(str(folder))
    folder.mkdir()
    (folder / "resolved_config.yaml").write_text(signed(dump({"": config, SLHF.name: options})))
    for number in range(1, rounds + 1):
        shutil.copytree(model, run.policy(number))
        if number < rounds:
            run.finish(number, "play", {})
    return folder
