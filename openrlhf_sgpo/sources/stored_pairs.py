"""Stored pairs: the human seed, and rounds in which the policy samples and an oracle ranks its answers.

prompts -> rollout -> responses -> oracle -> pairs -> log-probabilities -> margins -> worst case
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import distributed

from openrlhf_sgpo import ranks
from openrlhf_sgpo.algorithms.base import NoSettings, PairAlgorithm, Stage
from openrlhf_sgpo.algorithms.dpo import DPO
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.inspection import prompt_key
from openrlhf_sgpo.data.messages import template_kwargs
from openrlhf_sgpo.data.records import LABEL_COLUMNS, Pair, Prompt, load_run_pairs
from openrlhf_sgpo.data.seed import flip_labels, select_seed
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.dro.curve import certified_curve
from openrlhf_sgpo.ledger import Stopwatch, increase
from openrlhf_sgpo.openrlhf import DEFAULT_ADAPTER
from openrlhf_sgpo.oracle import Answer, Oracle, Question
from openrlhf_sgpo.oracle.base import agreement, rank
from openrlhf_sgpo.oracle.implicit import ImplicitReward, as_group
from openrlhf_sgpo.rollout import sampling_of
from openrlhf_sgpo.run import Run
from openrlhf_sgpo.run_check import check_round
from openrlhf_sgpo.run_folder import CERTIFICATE, read_json, read_jsonl, write_json, write_jsonl
from openrlhf_sgpo.sources import engine_log_probs
from openrlhf_sgpo.sources.base import Source
from openrlhf_sgpo.training.embeddings import prompt_embeddings
from openrlhf_sgpo.training.log_probs import implicit_margins
from openrlhf_sgpo.training.pairs import PairBatches, PairForward, PairSamples, label_columns
from openrlhf_sgpo.training.sizes import check_sizes, optimiser_steps, prompt_counts, stage_epochs, too_few
from openrlhf_sgpo.training.trainer import Trainer, TrainingStage

MEASURED_AFTER = 1024  # pairs of a round whose margins are measured again when it is trained


class StoredPairs(Source):
    """A seed stage on human pairs, then rounds on pairs that the policy's own answers make."""

    training = "train"
    trains_first = True
    shown: ClassVar[dict[str, str]] = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}

    def __init__(self, run: Run, algorithm: type[PairAlgorithm]):
        super().__init__(run)
        self.algorithm = algorithm
        self.data = run.data
        available = len(self.data.prompts.prompts)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))  # there is no process group yet
        check_sizes(self.config, algorithm, len(self.data.human.pairs), available, world_size)
        check_labels(self.config, algorithm, self.data.human.pairs)
        self.prompt_counts = prompt_counts(self.config, available) if self.config.rounds.count else []
        self._shuffled: list[Prompt] | None = None
        self._batches: PairBatches | None = None
        self._certified: dict[str, Any] = {}  # worst_case.json of the round, empty without a follower

    @property
    def numbers(self) -> Sequence[int]:
        return range(1 + self.config.rounds.count)

    def plan(self) -> list[str]:
        plan = [f"round_0/{stage}" for stage in ("pairs", "score", "train")] + ["initial/evaluate", "round_0/evaluate"]
        for number in self.numbers[1:]:
            plan += [f"round_{number}/{stage}" for stage in ("generate", "annotate", "score", "train", "evaluate")]
        return plan

    def prepare(self, number: int) -> None:
        if number:
            self._generate(number)
            self._annotate(number)
        else:
            self._seed_pairs()
            if self.prompt_counts:
                self._round_prompts(1)  # so that too few prompts are an error before the seed stage, not after it

    def _seed_pairs(self) -> None:
        """round_0/pairs.jsonl: the seed, chosen among the human pairs."""
        if self.run.finished(0, "pairs"):
            return
        seed, settings = self.config.train.seed, self.config.seed
        with self.run.stage("round_0/pairs") as cost:
            embeddings = None
            if settings.size and settings.selection == "fps":
                prompts = [group.prompt for group in self.data.human.groups]
                embeddings = prompt_embeddings(
                    self.config.model.model_name_or_path, prompts, self.config, self.run.strategy
                )
            pairs = flip_labels(
                select_seed(self.data.human.pairs, settings.size, seed, embeddings), settings.flip_rate, seed
            )
            cost["human_pairs"] = len(pairs)
        self._write_pairs(0, pairs, {"flipped": sum(pair.flipped for pair in pairs)})

    def _generate(self, number: int) -> None:
        """round_K/prompts.jsonl and responses.jsonl: samples from the policy that enters the round."""
        if self.run.finished(number, "generate"):
            return
        rollout, path = self.config.rollout, self.folder.round(number)
        prompts = self._round_prompts(number)
        with self.run.stage(f"round_{number}/generate") as cost:
            samples = self.run.engine(self.run.policy_before(number)).generate(
                [self.data.prompts.tokens_of(prompt) for prompt in prompts],
                sampling_of(
                    rollout,
                    self.config.train.seed + number,
                    rollout.n_samples_per_prompt,
                    log_probs=rollout.reuse_log_probs,
                ),
                label=f"round {number}: generate",
            )
            cost["samples"] = len(prompts) * rollout.n_samples_per_prompt
            cost["tokens_generated"] = sum(sample.tokens for group in samples for sample in group)
        if self.run.writes:
            write_jsonl(path / "prompts.jsonl", (prompt.to_row() for prompt in prompts))
            rows = zip(prompts, samples, strict=True)
            write_jsonl(
                path / "responses.jsonl",
                ({"id": prompt.id, "responses": [sample.to_row() for sample in group]} for prompt, group in rows),
            )
        self.run.finish(number, "generate", {"prompts": len(prompts)}, ["prompts.jsonl", "responses.jsonl"])

    def _annotate(self, number: int) -> None:
        """round_K/pairs.jsonl: best and worst response of each prompt, as the oracle ranks them."""
        if self.run.finished(number, "pairs"):
            return
        prompt_rows, response_rows = ranks.on_rank_0(partial(self._read_responses, number))
        prompts = {row["id"]: row for row in prompt_rows}
        questions, gold = [], []
        skipped = 0
        for row in response_rows:
            prompt = prompts[row["id"]]
            # Only distinct answers that say something can be ranked.
            answers = map(Answer.from_row, row["responses"])
            distinct = {answer.text: answer for answer in answers if answer.text.strip()}
            told = template_kwargs(prompt)
            if len(distinct) < 2:
                skipped += 1
            else:
                questions.append(Question(row["id"], prompt["prompt"], tuple(distinct.values()), told))
            if prompt.get("chosen") is not None:
                labelled = (Answer(prompt["chosen"]), Answer(prompt["rejected"]))
                gold.append(Question(row["id"], prompt["prompt"], labelled, told))
        if not questions:
            raise ValueError(
                f"round {number}: no prompt got two different answers, so there is nothing to rank: raise "
                f"--rollout.temperature or --rollout.n_samples_per_prompt, in another --{self.folder.flag}"
            )
        oracle = self._oracle(number)
        before = oracle.usage()
        facts: dict[str, Any] = {"oracle": oracle.name, "prompts_without_two_answers": skipped}
        with self.run.stage(f"round_{number}/annotate") as cost:
            if self.config.rollout.reuse_log_probs and not self.run.has_oracle:
                rows, groups = (
                    (prompt_rows, response_rows),
                    [as_group(question, self.run.chat) for question in questions],
                )
                facts |= engine_log_probs.take(self.run, number, rows, groups, self._judge_reference(number))
            rewards = oracle.rewards([*questions, *gold], f"round {number}: score")
            cost |= increase(before, oracle.usage())
        # Equal rewards are no preference; a label would only say which answer came first.
        ranked = [row for row in zip(questions, rewards, strict=False) if max(row[1]) > min(row[1])]
        if not ranked:
            raise ValueError(self._no_preference(number, rewards))
        pairs = [rank(question, scores, oracle.name, number) for question, scores in ranked]
        facts["prompts_with_equal_rewards"] = len(questions) - len(ranked)
        if oracle.name == "implicit":
            facts["judge_reference"] = self.run.name_of(self._judge_reference(number))
        if gold:
            # How often the oracle agrees with people, on human pairs of the very prompts that it now labels.
            facts |= {"label_accuracy": agreement(rewards[len(questions) :]), "gold_pairs": len(gold)}
        self._write_pairs(number, pairs, facts)

    def _no_preference(self, number: int, rewards: Sequence[Sequence[float]]) -> str:
        """Why all rewards are equal, and the remedy."""
        start = f"round {number}: all answers to a prompt got the same reward, so there is nothing to learn"
        if any(any(row) for row in rewards) or self.run.has_oracle:
            return f"{start}: --oracle {self.config.oracle} does not tell such answers apart; choose another"
        flags = "--seed.lr or --seed.max_epochs" if number == 1 else "--adam.lr or --train.max_epochs"
        before = self.folder.round(number - 1)
        return (
            f"{start}: the policy {self.run.name_of(str(self.folder.policy(number - 1)))} has not moved from "
            f"{self.run.name_of(self._judge_reference(number))}. Raise {flags}: in another --{self.folder.flag}"
            + (f", or delete {before} and {self.folder.round(number)} and add --resume" if number == 1 else "")
        )

    def begin(self, number: int) -> TrainingStage:
        """Score the round's pairs, and begin the stage with the follower's answer."""
        run, config = self.run, self.config
        start, loss_reference = run.policy_before(number), self._loss_reference(number)
        # A seed stage has settings of its own; an algorithm that is made for rounds begins with DPO.
        is_seed = number == 0 and config.rounds.count > 0
        with_dpo = is_seed and self.algorithm.needs.rounds
        beta = config.model.beta
        algorithm: PairAlgorithm = DPO(NoSettings(), beta) if with_dpo else self.algorithm(run.options, beta)
        epochs = stage_epochs(number, config)
        learning_rate = config.seed.lr if is_seed else config.adam.lr

        first = 0 if config.rounds.data == "all" else number
        pairs = [pair for k in range(first, number + 1) for pair in self._read_pairs(k)]
        pairs, groups = self._tokenize(self.algorithm.pairs(pairs, run.chat))
        label, world_size = f"round {number}", distributed.get_world_size()
        if reason := too_few(len(groups), epochs, config, world_size):
            raise ValueError(f"{label}: {reason}, and add --resume")
        steps = optimiser_steps(len(groups), epochs, config.train, world_size)
        judged_by = "" if run.has_oracle or not number else self._judge_reference(number)
        run.say(
            f"{label}: {len(pairs)} pairs, {steps} optimiser steps, policy {run.name_of(start)}, "
            f"loss reference {run.name_of(loss_reference) or 'none'}"
            + (f", judge reference {run.name_of(judged_by)}" if judged_by else "")
        )
        with run.stage(f"round_{number}/score"):
            reference = run.scorer.score(loss_reference, groups, f"{label}: reference")
            taken = {}
            if config.rollout.reuse_log_probs and number and run.has_oracle:
                rows = ranks.on_rank_0(partial(self._read_responses, number))
                taken = engine_log_probs.take(run, number, rows, groups, loss_reference)
            policy = reference if with_dpo else run.scorer.score(start, groups, f"{label}: policy")
        self._certified = {}
        if not with_dpo:
            margins = implicit_margins(policy, reference, config.model.beta).float()
            began = time.perf_counter()
            certificate = algorithm.begin_stage(Stage(margins, number, steps, config.train.seed + number))
            if certificate:  # otherwise there is no follower
                run.ledger.book(f"round_{number}/follower", {}, began)
                self._certified = certificate | {"margins": margins.tolist()}
        if start != config.ref.model_name_or_path:
            run.scorer.forget(start)
        run.scorer.discard(str(self.folder.policy(number)))
        self._batches = PairBatches(groups, reference, run.strategy, label_columns(pairs))
        return TrainingStage(
            number,
            algorithm,
            partial(PairForward, algorithm, run.tokenizer.pad_token_id, nll_coef=config.train.nll_coef),
            start,
            learning_rate,
            first=0,
            last=steps,
            scheduled=steps,
            policies={DEFAULT_ADAPTER: self.folder.policy(number)},
            checkpoints=self._checkpoints(number),
            generator=label,
            # Otherwise the reference's log-probabilities are all that is needed of it.
            frozen={"reference": loss_reference} if algorithm.extrapolation else {},
            clock=Stopwatch(pairs=len(pairs)),
            facts={
                "policy": run.name_of(start),
                "loss_reference": run.name_of(loss_reference),
                "pairs": len(pairs),
                "epochs": round(steps * config.train.batch_size / len(pairs), 3) if config.train.max_steps else epochs,
                "steps": steps,
                "learning_rate": learning_rate,
                "seed": config.train.seed,
                "ranks": world_size,
                "versions": {name: version(name) for name in ("openrlhf", "torch", "transformers", "deepspeed")},
                **taken,
            },
        )

    def batch(self, step: int) -> PairSamples:
        assert self._batches is not None
        return self._batches.step(step)

    def measure(self, stage: TrainingStage, trainer: Trainer) -> None:
        """Write the follower's certificate, if there is one; that of a worst case with what the round has done to V."""
        if self._certified.get("ball") == "worst":
            self._certified |= self._after(stage, trainer)
        if self._certified and self.run.writes:
            write_json(self._certificate(stage.number), self._certified)

    def _after(self, stage: TrainingStage, trainer: Trainer) -> dict[str, Any]:
        """Margins of up to 1,024 pairs, from steps spread evenly over the stage, under the policy that was just trained; V of
        these pairs before and after the stage."""
        assert self._batches is not None
        count = min(stage.last, max(1, MEASURED_AFTER // self.config.train.batch_size))
        measured: dict[int, float] = {}
        for step in torch.linspace(1, stage.last, count).long().unique().tolist():
            samples = self._batches.step(step)
            measured |= zip(samples.index.tolist(), trainer.watched(step, samples).tolist(), strict=True)
        margins = dict(sorted(item for part in ranks.gather(measured) for item in part.items()))
        before = [self._certified["margins"][pair] for pair in margins]
        after = list(margins.values())
        values = {
            name: float(certified_curve(self._certified, measured_then, [self._certified["radius"]])[0])
            for name, measured_then in (("value_before", before), ("value_after", after))
        }
        return values | {"after": {"pairs": list(margins), "margins": after}}

    def files(self, number: int) -> list[str]:
        return ["policy", *([CERTIFICATE] if self._certificate(number).exists() else [])]

    def end(self, number: int) -> None:
        self._batches = None
        if self.run.writes:
            # Not earlier: without checkpoints, a kill before the stage was recorded as finished would cost all of it.
            shutil.rmtree(self._checkpoints(number), ignore_errors=True)

    def results(self, number: int) -> dict[str, Any]:
        path = self._certificate(number)
        value = read_json(path).get("value") if path.exists() else None
        labels = self.folder.manifest(number)["stages"]["pairs"].get("label_accuracy")
        return {"value": value, "label_accuracy": labels}

    def _judge_reference(self, number: int) -> str:
        initial = self.config.rounds.judge_reference == "initial" or number < 2
        return self.config.ref.model_name_or_path if initial else str(self.folder.policy(number - 2))

    def _oracle(self, number: int) -> Oracle:
        if self.run.has_oracle:
            return self.run.frozen_oracle()
        return ImplicitReward(self.run.resources(), self.run.policy_before(number), self._judge_reference(number))

    def _loss_reference(self, number: int) -> str:
        initial = self.config.rounds.loss_reference == "initial" or number == 0
        return self.config.ref.model_name_or_path if initial else self.run.policy_before(number)

    def _round_prompts(self, number: int) -> list[Prompt]:
        """This round's share of the prompts. They are shuffled once, without the prompts of seed and held-out pairs."""
        if self._shuffled is None:
            taken = {prompt_key(pair.prompt) for pair in self._read_pairs(0)} | self.data.held_out_prompts
            self._shuffled = [
                prompt for prompt in self.data.prompts.prompts if prompt_key(prompt.messages) not in taken
            ]
            random.Random(self.config.train.seed).shuffle(self._shuffled)
            self.prompt_counts = prompt_counts(self.config, len(self._shuffled))
        first = sum(self.prompt_counts[: number - 1])
        return self._shuffled[first : first + self.prompt_counts[number - 1]]

    def _tokenize(self, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Group]]:
        """The pairs that fit into --data.max_len, and their tokens."""
        human = self.data.human
        tokens = [(pair, (pair.round == 0 and human.tokens_of(pair)) or self.run.chat.pair(pair)) for pair in pairs]
        kept = [(pair, group) for pair, group in tokens if group is not None]
        if pairs and not kept:
            raise ValueError(f"none of {len(pairs)} pairs fits into --data.max_len {self.config.data.max_len} tokens")
        return [pair for pair, _ in kept], [group for _, group in kept]

    def _certificate(self, number: int) -> Path:
        return self.folder.round(number) / CERTIFICATE

    def _checkpoints(self, number: int) -> Path:
        return self.folder.round(number) / "checkpoints"

    def _write_pairs(self, number: int, pairs: list[Pair], facts: dict[str, Any]) -> None:
        if self.run.writes:
            write_jsonl(self.folder.round(number) / "pairs.jsonl", (pair.to_row() for pair in pairs))
        self.run.finish(number, "pairs", {"pairs": len(pairs), **facts}, ["pairs.jsonl"])

    def _read_responses(self, number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The rows of a round's prompts and responses."""
        check_round(self.folder, number, ("generate",))
        path = self.folder.round(number)
        return read_jsonl(path / "prompts.jsonl"), read_jsonl(path / "responses.jsonl")

    def _read_pairs(self, number: int) -> list[Pair]:
        """Collective."""

        def work() -> list[Pair]:
            check_round(self.folder, number, ("pairs",))
            return load_run_pairs(str(self.folder.round(number) / "pairs.jsonl"))

        return ranks.on_rank_0(work)


def check_labels(config: Config, algorithm: type[PairAlgorithm], pairs: Sequence[Pair]) -> None:
    """Raises ValueError if the algorithm's loss would see human pairs with columns that have no meaning for it."""
    if config.rounds.count and algorithm.needs.rounds and config.rounds.data == "new":
        return  # only the seed stage, which is DPO, trains on human pairs
    for column in LABEL_COLUMNS:
        marked = [pair.id for pair in pairs if getattr(pair, column) != 1]
        if marked and column not in algorithm.label_columns:
            raise ValueError(
                f"--algo {algorithm.name} cannot use the column {column!r}, which is not 1 in {len(marked)} of {len(pairs)} "
                f"pairs of --data.dataset, such as {marked[0]}: remove the column, choose another algorithm, or let rounds "
                "train on their own pairs alone (--rounds.data new)"
            )
