"""``openrlhf-sgpo train`` that ends itself with SIGKILL at a named moment: python killed_run.py MOMENT [flags of train].

SIGKILL cannot be caught, so what is on disk is what any sudden death at that moment leaves.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openrlhf_sgpo import fork, metrics, plays, rounds, run, run_folder
from openrlhf_sgpo.algorithms.sgpo import SGPO
from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.evaluation import between_rounds
from openrlhf_sgpo.training import checkpoints, scoring, stage, trainer


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def replace(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def after_step(label: str, number: int) -> None:
    """Die when a step of a stage has been logged, before its checkpoint."""

    def make(log):
        def wrapped(self, stage_label, step, row):
            log(self, stage_label, step, row)
            if (stage_label, step) == (label, number):
                die()

        return wrapped

    replace(metrics.Metrics, "log", make)


def half_checkpoint(label: str, number: int) -> None:
    """Die while a checkpoint is written: one of its files has half of its bytes."""
    import torch

    def half(state, path, *args, **kwargs):
        save(state, path, *args, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    save = torch.save

    def make(save_checkpoint):
        def wrapped(self, step):
            if (self.stage, step) == (label, number):
                torch.save = half
            save_checkpoint(self, step)

        return wrapped

    replace(trainer.PairTrainer, "_save_checkpoint", make)


def half_policy(folder: str, name: str = "policy") -> None:
    """Die while a policy, or what else has weights, is saved: half of its weights are written."""

    def make(save_policy):
        def wrapped(actor, tokenizer, destination, *args):
            save_policy(actor, tokenizer, destination, *args)
            if f"/{folder}/{name}" in destination:
                weights = Path(destination) / "model.safetensors"
                os.truncate(weights, weights.stat().st_size // 2)
                die()

        return wrapped

    replace(stage, "save_policy", make)


def half_file(ending: str) -> None:
    """Die while a file of the run folder is written: half of its text is there."""

    def make(write_text):
        def wrapped(path, text):
            if str(path).endswith(ending):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(path.name + ".partial").write_text(text[: len(text) // 2])
                die()
            write_text(path, text)

        return wrapped

    for module in (run_folder, run, rounds, fork, between_rounds):
        if hasattr(module, "write_text"):
            replace(module, "write_text", make)


def in_generation() -> None:
    """Die after the first of two batches has been sampled; the evaluation before it takes one of its own."""
    import transformers

    calls = []

    def make(generate):
        def wrapped(*args, **kwargs):
            calls.append(0)
            return die() if len(calls) > 2 else generate(*args, **kwargs)

        return wrapped

    replace(transformers.GenerationMixin, "generate", make)


def in_vllm_generation() -> None:
    """Die when the engines have answered the first prompt of a round and are at work on the others."""
    from openrlhf_sgpo.rollout import vllm

    class Progress(vllm.Progress):
        def __iter__(self):
            for number, item in enumerate(super().__iter__()):
                if number == 1 and "generate" in str(getattr(self, "desc", "")):
                    die()
                yield item

    vllm.Progress = Progress


def half_scores(part: int) -> None:
    """Die while scores are appended: the last line is cut in the middle."""
    calls = []

    def make(append):
        def wrapped(self, model, found):
            calls.append(model)
            append(self, model, found)
            if len(calls) == part:
                path = self._file(model)
                os.truncate(path, path.stat().st_size - 20)
                die()

        return wrapped

    replace(scoring.Scorer, "_append", make)


def in_follower() -> None:
    """Die when the follower has its answer and nothing of it is stored."""

    def make(begin_stage):
        def wrapped(self, *args):
            begin_stage(self, *args)
            die()

        return wrapped

    replace(SGPO, "begin_stage", make)


# In the order of a run, so that one folder can be killed at all of them, one after the other.
MOMENTS: dict[str, Callable[[], None]] = {
    "start evaluation": lambda: half_file("initial/evaluation.json"),
    "seed pairs": lambda: half_file("round_0/pairs.jsonl"),
    "seed reference scoring": lambda: half_scores(1),
    "seed training": lambda: after_step("round 0", 3),
    "seed checkpoint": lambda: half_checkpoint("round 0", 4),
    "seed checkpoint again": lambda: half_checkpoint("round 0", 4),
    "seed saving": lambda: half_policy("round_0"),
    "generation": in_generation,
    "writing responses": lambda: half_file("round_1/responses.jsonl"),
    "scoring": lambda: half_scores(1),
    "writing pairs": lambda: half_file("round_1/pairs.jsonl"),
    "follower": in_follower,
    "writing the certificate": lambda: half_file("round_1/worst_case.json"),
    "leader checkpoint": lambda: half_checkpoint("round 1", 4),
    "leader training": lambda: after_step("round 1", 5),
    "leader saving": lambda: half_policy("round_1"),
    "manifest": lambda: half_file("round_1/manifest.json"),
    "held-out margins": lambda: half_file("round_1/held_out.jsonl"),
    "samples": lambda: half_file("round_1/samples.jsonl"),
    "evaluation": lambda: half_file("round_1/evaluation.json"),
}


def half_play_checkpoint(number: int) -> None:
    """Die when one of the files of a checkpoint has been written and the next has not."""
    import torch

    def once(state, path, *args, **kwargs):
        save(state, path, *args, **kwargs)
        die()

    save = torch.save

    def make(save_checkpoint):
        def wrapped(self, engine, step, state):
            if step == number:
                torch.save = once
            save_checkpoint(self, engine, step, state)

        return wrapped

    replace(checkpoints.Checkpoints, "save", make)


def in_play(step: int) -> None:
    """Die when the plays of a step are recorded, the last of them by half, and the engines have not got its weights."""

    def make(one_step):
        def wrapped(self, number, at, *args):
            row = one_step(self, number, at, *args)
            if at == step:
                path = self.folder.round(number) / "plays.jsonl"
                os.truncate(path, path.stat().st_size - 20)
                die()
            return row

        return wrapped

    replace(plays.PlayRun, "_step", make)


PLAY_MOMENTS: dict[str, Callable[[], None]] = {
    "first play": lambda: after_step("round 1", 1),
    "half a play": lambda: in_play(3),
    "half a checkpoint of plays": lambda: half_play_checkpoint(3),
    "saving the policy of plays": lambda: half_policy("round_1"),
    "evaluation between plays": lambda: half_file("round_1/evaluation.json"),
    "second round": lambda: after_step("round 2", 5),
    "manifest of plays": lambda: half_file("round_2/manifest.json"),
}
ADAPTER_MOMENTS: dict[str, Callable[[], None]] = {
    "saving the follower": lambda: half_policy("round_1", "follower"),
    "second round of adapters": lambda: in_play(5),
}
OTHER_ENGINES = {"generation by vLLM": in_vllm_generation}


if __name__ == "__main__":
    (MOMENTS | PLAY_MOMENTS | ADAPTER_MOMENTS | OTHER_ENGINES)[sys.argv[1]]()
    sys.exit(main(["train", *sys.argv[2:]]))
