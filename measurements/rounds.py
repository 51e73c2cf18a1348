"""A whole round of SSAPO, and the same round by the book with vLLM, transformers, cvxpy and TRL.

    python measurements/rounds.py [--model build/smollm2] [--prompts 32] [--samples 2] [--tokens 32] [--out build/rounds.json]

A run of ``openrlhf-sgpo train`` trains on the seed and plays a round. Its policy after the seed, the round's prompts and the
order of its pairs go to the other side: answers by vLLM's ``LLM.generate``; their implicit rewards from log-probabilities by
transformers, 8 answers in a padded batch, under policy and reference; the worst case by cvxpy; and TRL's ``DPOTrainer`` on the
pairs, with this package's loss. TRL computes the reference's log-probabilities itself, though the rewards have needed them
already; the last row leaves that out. Both sides must come to the same answers, pairs, worst case, losses and policy. Engines
are up when the round begins, and hold the policy.

Times are CPU seconds of all processes, one thread each, from the request for answers to the policy on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "build/peers"))
os.environ["OMP_NUM_THREADS"] = "1"

STAGES = {"generate": "answers", "annotate": "rewards", "score": "worst case", "train": "training"}
AGAIN = "the reference again, by TRL"
WHOLE = "whole round"
BETA, RADIUS, RATE, BATCH, MICRO_BATCH = 0.1, 0.01, 5e-6, 16, 2
LONGEST, SCORED_TOGETHER = 384, 8
SECONDS_OF: dict[int, float] = {}  # by process, also those of processes that have ended


def cpu_seconds() -> float:
    """Of this process and all that it started."""
    process = psutil.Process()
    for each in (process, *process.children(recursive=True)):
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        SECONDS_OF[each.pid] = times.user + times.system
    return sum(SECONDS_OF.values())


class Clock:
    """CPU seconds by part of the round, and from the beginning of the first to the end of the latest."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        before = cpu_seconds()
        self.began = before if self.began is None else self.began
        yield
        now = cpu_seconds()
        self.seconds[part] = now - before
        self.seconds[WHOLE] = now - self.began


def this_package(arguments: argparse.Namespace, run: Path) -> dict[str, Any]:
    """The round by ``openrlhf-sgpo train``."""
    from openrlhf_sgpo.cli.main import main as command
    from openrlhf_sgpo.ledger import Ledger
    from openrlhf_sgpo.sources.stored_pairs import StoredPairs

    clock, order = Clock(), []
    plain_stage, plain_batch = Ledger.stage, StoredPairs.batch

    @contextmanager
    def stage(self: Ledger, name: str, *rest: Any, **more: Any) -> Iterator[dict[str, float]]:
        number, _, part = name.partition("/")
        if number != "round_1" or part not in STAGES:
            with plain_stage(self, name, *rest, **more) as entry:
                yield entry
            return
        with clock(STAGES[part]), plain_stage(self, name, *rest, **more) as entry:
            yield entry

    def batch(self: StoredPairs, step: int) -> Any:
        samples = plain_batch(self, step)
        order.extend(samples.index.tolist())
        return samples

    Ledger.stage, StoredPairs.batch = stage, batch  # type: ignore[method-assign]
    quickstart = ROOT / "examples/quickstart"
    flags = {
        "algo": "sgpo", "sgpo.radius": RADIUS, "model.beta": BETA, "model.model_name_or_path": arguments.model,
        "data.dataset": quickstart / "seed.jsonl", "data.prompt_dataset": quickstart / "prompts.jsonl",
        "data.max_len": LONGEST, "data.max_samples": 32, "seed.lr": 3e-5, "rounds.count": 1,
        "rounds.prompts": arguments.prompts,
        "rollout.n_samples_per_prompt": arguments.samples, "rollout.max_new_tokens": arguments.tokens,
        "train.batch_size": BATCH, "train.micro_batch_size": MICRO_BATCH, "adam.lr": RATE, "lr_scheduler": "constant",
        "lr_warmup_ratio": 0, "ds.param_dtype": "fp32", "ckpt.output_dir": run,
    }  # fmt: skip
    status = command(["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))])
    if status:
        sys.exit(status)
    return {"seconds": clock.seconds, "order": order[-len(read(run / "round_1/pairs.jsonl")) :]}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_the_book(arguments: argparse.Namespace, run: Path) -> dict[str, Any]:
    """The same round by vLLM, transformers, cvxpy and TRL."""
    from openrlhf_sgpo.rollout.vllm_on_cpu import CPU_ENGINE_ARGUMENTS, CPU_ENVIRONMENT

    # On a CPU vLLM has one process then, which is cheaper, and compiles nothing.
    os.environ |= {name: value for name, value in CPU_ENVIRONMENT.items() if name.startswith(("VLLM", "TORCH"))}
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.utils import selective_log_softmax
    from vllm import LLM, SamplingParams

    from openrlhf_sgpo.dro.program import program
    from openrlhf_sgpo.rollout.base import prompt_seed
    from openrlhf_sgpo.trl import DPOConfig, DPOTrainer, Stage

    torch.set_num_threads(1)
    policy, first_round = run / "round_0/policy", run / "round_1"
    tokenizer = AutoTokenizer.from_pretrained(policy)
    engine = LLM(str(policy), dtype="float32", max_model_len=LONGEST, **CPU_ENGINE_ARGUMENTS)
    clock = Clock()
    with clock("answers"):
        prompts = [
            tuple(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))
            for row in read(first_round / "prompts.jsonl")
        ]
        sampling = [
            SamplingParams(
                n=arguments.samples, temperature=0.7, max_tokens=arguments.tokens, seed=prompt_seed(43, prompt)
            )
            for prompt in prompts
        ]
        outputs = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling)
        answers = [[tuple(answer.token_ids) for answer in output.outputs] for output in outputs]

    with clock("rewards"), torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (policy, arguments.model)]
        rows = [(prompt, answer) for prompt, group in zip(prompts, answers, strict=True) for answer in group]
        by_length = sorted(range(len(rows)), key=lambda index: -sum(map(len, rows[index])))
        scores = torch.zeros(len(rows), 2)
        for start in range(0, len(rows), SCORED_TOGETHER):
            index = by_length[start : start + SCORED_TOGETHER]
            batch = tokenizer.pad(
                {"input_ids": [list(sum(rows[row], ())) for row in index]}, return_tensors="pt", padding_side="right"
            )
            lengths = torch.tensor([[len(part) for part in rows[row]] for row in index])
            place = torch.arange(1, batch["input_ids"].shape[1])
            answered = (place >= lengths[:, :1]) & (place < lengths.sum(1, keepdim=True))
            for column, model in enumerate(models):
                logits = model(**batch, use_cache=False).logits[:, :-1]
                scores[index, column] = (selective_log_softmax(logits, batch["input_ids"][:, 1:]) * answered).sum(1)
        rewards = BETA * (scores[:, 0] - scores[:, 1]).view(len(prompts), -1)
        pairs, margins = [], []
        for prompt, group, values in zip(prompts, answers, rewards.tolist(), strict=True):
            best, worst = (group[values.index(extreme)] for extreme in (max(values), min(values)))
            if best != worst:
                pairs.append({"prompt_ids": list(prompt), "chosen_ids": list(best), "rejected_ids": list(worst)})
                margins.append(max(values) - min(values))
    with clock("worst case"):
        worst_case = program(torch.tensor(margins), RADIUS)

    class Trainer(DPOTrainer):
        """On tokens, in the given order, with the margins of the stage."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _prepare_for_training(self, steps: int, *rest: Any) -> Any:
            prepared = super()._prepare_for_training(steps, *rest)
            self._algorithm.begin_stage(Stage(torch.tensor(margins), 1, steps, 43))
            return prepared

    with clock(AGAIN):
        settings = DPOConfig(
            str(run / "book"), beta=BETA, algorithm_settings={"radius": RADIUS}, per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=BATCH // MICRO_BATCH, learning_rate=RATE, lr_scheduler_type="constant",
            num_train_epochs=1,
            precompute_ref_log_probs=True, max_length=None, use_cpu=True, bf16=False, gradient_checkpointing=False,
            report_to=[], logging_steps=1, disable_tqdm=True, save_strategy="no", dataloader_drop_last=True,
        )  # fmt: skip
        order = json.loads((run / "package.json").read_text(encoding="utf-8"))["order"]
        dataset = Dataset.from_list([pairs[index] for index in order])
        trainer = Trainer(models[0], models[1], args=settings, train_dataset=dataset, processing_class=tokenizer)
    with clock("training"):
        trainer.train()
        trainer.save_model(str(run / "book/policy"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": clock.seconds, "answers": answers, "pairs": pairs, "margins": margins, "losses": losses,
        "value": worst_case.value,
    }  # fmt: skip


def check(run: Path, book: dict[str, Any]) -> float:
    """The distance of the policies, relative to how far training has moved them. Raises AssertionError if the rounds differ."""
    import torch
    from safetensors.torch import load_file

    answers = [[answer["token_ids"] for answer in row["responses"]] for row in read(run / "round_1/responses.jsonl")]
    assert answers == book["answers"]
    pairs = read(run / "round_1/pairs.jsonl")
    for side in ("chosen", "rejected"):
        assert [pair[f"{side}_token_ids"] for pair in pairs] == [pair[f"{side}_ids"] for pair in book["pairs"]]
    certificate = json.loads((run / "round_1/worst_case.json").read_text())
    torch.testing.assert_close(torch.tensor(certificate["margins"]), torch.tensor(book["margins"]), rtol=0, atol=1e-3)
    assert abs(certificate["value"] - book["value"]) < 1e-4, (certificate["value"], book["value"])
    losses = [row["train/loss"] for row in read(run / "metrics.jsonl") if row["stage"] == "round 1"]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(book["losses"]), rtol=1e-3, atol=0)
    before, package, others = (
        load_file(run / name / "model.safetensors") for name in ("round_0/policy", "round_1/policy", "book/policy")
    )
    apart = sum(float((package[key] - others[key]).square().sum()) for key in others) ** 0.5
    moved = sum(float((package[key] - before[key]).square().sum()) for key in others) ** 0.5
    assert apart < 1e-2 * moved, (apart, moved)
    return apart / moved


def in_a_process(side: str, run: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    numbers = [
        word for name in ("prompts", "samples", "tokens") for word in (f"--{name}", str(getattr(arguments, name)))
    ]
    command = [sys.executable, __file__, "--model", arguments.model, *numbers, "--side", side, str(run)]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        sys.exit(f"{process.stdout}\nthe round of {side} failed")
    result: dict[str, Any] = json.loads((run / f"{side}.json").read_text(encoding="utf-8"))
    return result


SIDES: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {"package": this_package, "book": by_the_book}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/smollm2")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", default="build/rounds.json")
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "RUN"), help="used by this script itself")
    arguments = parser.parse_args()
    if arguments.side:
        side, folder = arguments.side
        result = SIDES[side](arguments, Path(folder))
        (Path(folder) / f"{side}.json").write_text(json.dumps(result), encoding="utf-8")
        return
    seconds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            rounds = {side: in_a_process(side, run, arguments) for side in SIDES}
            apart = check(run, rounds["book"])
        for side, played in rounds.items():
            seconds[side].append(played["seconds"])
    print(f"losses {rounds['book']['losses']}; the policies differ by {apart:.2g} of how far training has moved them")
    print("| part of a round | this package | by the book | ratio |\n|---|---|---|---|")
    rows = []
    once = f"{WHOLE} without {AGAIN}"
    for played in (*seconds["package"], *seconds["book"]):
        played[once] = played[WHOLE] - played.setdefault(AGAIN, 0.0)
    for part in (*STAGES.values(), AGAIN, WHOLE, once):
        package, book = (min(played[part] for played in seconds[side]) for side in SIDES)
        ratio = f"{book / package:.2f}" if package > 0.5 else ""
        rows.append({"part": part, "package": package, "book": book})
        print(f"| {part} | {package:.1f} | {book:.1f} | {ratio} |")
    Path(arguments.out).write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
