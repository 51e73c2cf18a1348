"""The loop: seed stage, then rounds of sample, rank, follower, train, evaluate. Every rank runs it.

    prompts -> rollout -> responses -> oracle -> pairs -> log-probs -> margins -> worst case -> leader steps -> policy

Each stage starts from what is on disk and leaves its result on disk; that is also how a run is resumed.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import starmap
from typing import Any

from torch import distributed

from openrlhf_sgpo.algorithms.base import NoSettings, Stage
from openrlhf_sgpo.algorithms.dpo import DPO
from openrlhf_sgpo.data.inspection import prompt_key
from openrlhf_sgpo.data.messages import template_columns, template_kwargs
from openrlhf_sgpo.data.records import Pair, Prompt, load_run_pairs
from openrlhf_sgpo.data.seed import flip_labels, select_seed
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.evaluation.between_rounds import margins
from openrlhf_sgpo.oracle import Answer, Oracle, Question, Resources, judges_itself
from openrlhf_sgpo.oracle.base import agreement, rank
from openrlhf_sgpo.oracle.implicit import ImplicitReward
from openrlhf_sgpo.run import Run
from openrlhf_sgpo.run_check import check_round, metrics_digest
from openrlhf_sgpo.run_folder import (
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from openrlhf_sgpo.training.embeddings import prompt_embeddings
from openrlhf_sgpo.training.sizes import check_sizes, prompt_counts, stage_epochs
from openrlhf_sgpo.training.stage import check_enough, train_stage


class Rounds(Run):
    """A seed stage and rounds. ``execute`` is the loop; the other methods are its stages."""

    def _check_prompts(self) -> None:
        samples, available = self.config.rounds.count > 0, len(self.data.prompts.prompts)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))  # there is no process group yet
        check_sizes(self.config, self.algorithm, len(self.data.human.pairs), available, world_size)
        self.prompt_counts = prompt_counts(self.config, available) if samples else []
        self._shuffled: list[Prompt] | None = None

    # The loop -------------------------------------------------------------------------------------------------------

    def execute(self) -> list[dict[str, Any]]:
        """All stages that are not finished yet; returns the rows of the results table, start first."""
        try:
            rows = [self._evaluate(None)]
            self.evaluator.calibrate(rows[0])
            for number in range(1 + len(self.prompt_counts)):
                if number == 0:
                    self._seed_pairs()
                    if self.prompt_counts:
                        self._round_prompts(1)  # too few prompts must not show only after the seed stage
                else:
                    self._generate(number)
                    self._annotate(number)
                certificate = self._train(number)
                row = self._evaluate(number)
                labels = self.folder.manifest(number)["stages"]["pairs"].get("label_accuracy")
                rows.append(row | {"value": certificate.get("value"), "label_accuracy": labels})
            self._write_results(rows)
            return rows
        finally:
            self._close()

    def _plan(self) -> list[str]:
        plan = ["initial/evaluate"]
        for number in range(1 + self.config.rounds.count):
            made = ("generate", "annotate") if number else ("pairs",)
            plan += [f"round_{number}/{stage}" for stage in (*made, "score", "train", "evaluate")]
        return plan

    # Stages ---------------------------------------------------------------------------------------------------------

    def _seed_pairs(self) -> None:
        """round_0/pairs.jsonl: the seed, chosen among the human pairs."""
        if self._finished(0, "pairs"):
            return
        seed, settings = self.config.train.seed, self.config.seed
        with self._stage("round_0/pairs") as cost:
            embeddings = None
            if settings.size and settings.selection == "fps":
                prompts = [group.prompt for group in self.data.human.groups]
                embeddings = prompt_embeddings(
                    self.config.model.model_name_or_path, prompts, self.config, self.strategy
                )
            pairs = flip_labels(
                select_seed(self.data.human.pairs, settings.size, seed, embeddings), settings.flip_rate, seed
            )
            cost["human_pairs"] = len(pairs)
        self._write_pairs(0, pairs, {"flipped": sum(pair.flipped for pair in pairs)})

    def _generate(self, number: int) -> None:
        """round_K/prompts.jsonl and responses.jsonl: samples from the policy that enters the round."""
        if self._finished(number, "generate"):
            return
        rollout, path = self.config.rollout, self.folder.round(number)
        prompts = self._round_prompts(number)
        with self._stage(f"round_{number}/generate") as cost:
            samples = self._engine(self._policy_before(number)).generate(
                [self.data.prompts.tokens_of(prompt) for prompt in prompts],
                rollout.n_samples_per_prompt,
                seed=self.config.train.seed + number,
                label=f"round {number}: generate",
            )
            cost["samples"] = len(prompts) * rollout.n_samples_per_prompt
            cost["tokens_generated"] = sum(sample.tokens for group in samples for sample in group)
        if self.writes:
            write_jsonl(path / "prompts.jsonl", map(_prompt_row, prompts))
            rows = zip(prompts, samples, strict=True)
            write_jsonl(
                path / "responses.jsonl",
                ({"id": prompt.id, "responses": [one.to_row() for one in group]} for prompt, group in rows),
            )
        self._finish(number, "generate", {"prompts": len(prompts)}, ["prompts.jsonl", "responses.jsonl"])

    def _annotate(self, number: int) -> None:
        """round_K/pairs.jsonl: best and worst response of each prompt, as the oracle ranks them."""
        if self._finished(number, "pairs"):
            return
        path = self.folder.round(number)
        check_round(self.folder, number, ("generate",))
        prompts = {row["id"]: row for row in read_jsonl(path / "prompts.jsonl")}
        questions, gold = [], []
        skipped = 0
        for row in read_jsonl(path / "responses.jsonl"):
            prompt = prompts[row["id"]]
            # Only distinct answers that say something can be ranked.
            distinct = {one["text"]: one["truncated"] for one in row["responses"] if one["text"].strip()}
            told = template_kwargs(prompt)
            if len(distinct) < 2:
                skipped += 1
            else:
                answers = tuple(starmap(Answer, distinct.items()))
                questions.append(Question(row["id"], prompt["prompt"], answers, told))
            if prompt.get("chosen") is not None:
                labelled = (Answer(prompt["chosen"]), Answer(prompt["rejected"]))
                gold.append(Question(row["id"], prompt["prompt"], labelled, told))
        if not questions:
            raise ValueError(
                f"round {number}: no prompt got two different answers, so that there is nothing to rank: raise "
                f"--rollout.temperature or --rollout.n_samples_per_prompt, in another --{self.folder.flag}"
            )
        oracle = self._oracle(number)
        before = oracle.usage()
        with self._stage(f"round_{number}/annotate") as cost:
            rewards = oracle.rewards([*questions, *gold], f"round {number}: score")
            cost |= {name: total - before[name] for name, total in oracle.usage().items()}
        # Equal rewards are no preference; a label would only say which answer came first.
        ranked = [row for row in zip(questions, rewards, strict=False) if max(row[1]) > min(row[1])]
        if not ranked:
            raise ValueError(self._no_preference(number, rewards))
        pairs = [rank(question, scores, oracle.name, number) for question, scores in ranked]
        facts: dict[str, Any] = {
            "oracle": oracle.name,
            "prompts_without_two_answers": skipped,
            "prompts_with_equal_rewards": len(questions) - len(ranked),
        }
        if oracle.name == "implicit":
            facts["judge_reference"] = self._name(self._judge_reference(number))
        if gold:
            # How often the oracle agrees with people, on human pairs of the very prompts that it now labels.
            facts |= {"label_accuracy": agreement(rewards[len(questions) :]), "gold_pairs": len(gold)}
        self._write_pairs(number, pairs, facts)

    def _no_preference(self, number: int, rewards: Sequence[Sequence[float]]) -> str:
        """Why all rewards are equal, and what to do."""
        start = f"round {number}: all answers to a prompt got the same reward, so that there is nothing to learn"
        if any(any(row) for row in rewards) or not judges_itself(self.config, self.algorithm):
            return f"{start}: --oracle {self.config.oracle} does not tell such answers apart; choose another"
        flags = "--seed.lr or --seed.max_epochs" if number == 1 else "--adam.lr or --train.max_epochs"
        before = self.folder.round(number - 1)
        return (
            f"{start}: the policy {self._name(str(self.folder.policy(number - 1)))} has not moved from "
            f"{self._name(self._judge_reference(number))}. Raise {flags}: in another --{self.folder.flag}"
            + (f", or delete {before} and {self.folder.round(number)} and add --resume" if number == 1 else "")
        )

    def _train(self, number: int) -> dict[str, Any]:
        """round_K/policy and worst_case.json: the follower's answer, then the leader's steps. Returns the certificate."""
        path, config = self.folder.round(number), self.config
        certificate_path = path / "worst_case.json"
        if self._finished(number, "train"):
            return read_json(certificate_path) if certificate_path.exists() else {}
        start, loss_reference = self._policy_before(number), self._loss_reference(number)
        # A seed stage has settings of its own; an algorithm that is made for rounds begins with DPO.
        is_seed = number == 0 and config.rounds.count > 0
        own = not (is_seed and self.algorithm.needs.rounds)
        algorithm = self.algorithm(self.options, config.model.beta) if own else DPO(NoSettings(), config.model.beta)
        epochs = stage_epochs(number, config)
        learning_rate = config.seed.lr if is_seed else config.adam.lr

        first = 0 if config.rounds.data == "all" else number
        pairs = [pair for k in range(first, number + 1) for pair in self._read_pairs(k)]
        pairs, groups = self._tokenize(self.algorithm.pairs(pairs, self.chat))
        label, by_itself = f"round {number}", judges_itself(self.config, self.algorithm)
        steps = check_enough(label, len(groups), epochs, config)
        self._say(
            f"{label}: {len(pairs)} pairs, {steps} optimiser steps, policy {self._name(start)}, "
            f"loss reference {self._name(loss_reference) or 'none'}"
            + (f", judge reference {self._name(self._judge_reference(number))}" if number and by_itself else "")
        )
        with self._stage(f"round_{number}/score"):
            reference = self.scorer.score(loss_reference, groups, f"{label}: reference")
            policy = self.scorer.score(start, groups, f"{label}: policy") if own else reference
        certificate: dict[str, Any] = {}
        if own:
            at_start = margins(policy, reference, config.model.beta).float()
            begin = time.perf_counter()
            certificate = algorithm.begin_stage(at_start, Stage(number, steps, config.train.seed + number))
            if certificate:  # otherwise there is no follower
                self.ledger.book(f"round_{number}/follower", {}, begin)
                if self.writes:
                    write_json(certificate_path, certificate | {"margins": at_start.tolist()})
        if start != config.ref.model_name_or_path:
            self.scorer.forget(start)
        self.scorer.discard(str(self.folder.policy(number)))
        with self._stage(f"round_{number}/train") as cost:
            tokens = train_stage(
                algorithm,
                groups,
                reference,
                start=start,
                loss_reference=loss_reference,
                destination=self.folder.policy(number),
                epochs=epochs,
                learning_rate=learning_rate,
                label=label,
                config=config,
                strategy=self.strategy,
                tokenizer=self.tokenizer,
                metrics=self.metrics,
            )
            cost["pairs"] = len(pairs)
            cost["tokens_trained"] = tokens
        facts = {
            "policy": self._name(start),
            "loss_reference": self._name(loss_reference),
            "pairs": len(pairs),
            "epochs": round(steps * config.train.batch_size / len(pairs), 3) if config.train.max_steps else epochs,
            "steps": steps,
            "learning_rate": learning_rate,
            "seed": config.train.seed,
            "ranks": distributed.get_world_size(),
            "versions": {name: version(name) for name in ("openrlhf", "torch", "transformers", "deepspeed")},
        }
        if self.writes:
            facts["metrics"] = metrics_digest(self.folder, number)
        self._finish(number, "train", facts, ["policy", *(["worst_case.json"] if certificate else [])])
        if self.writes:
            # Only now have the checkpoints served: a kill before would otherwise cost the whole stage.
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
        return certificate

    # What a stage works with ----------------------------------------------------------------------------------------

    def _judge_reference(self, number: int) -> str:
        initial = self.config.rounds.judge_reference == "initial" or number < 2
        return self.config.ref.model_name_or_path if initial else str(self.folder.policy(number - 2))

    def _oracle(self, number: int) -> Oracle:
        if not judges_itself(self.config, self.algorithm):
            return self._frozen_oracle()
        resources = Resources(
            self.config, self.strategy, self.chat, self.scorer, self.folder.path, moment=self.chat.template.moment
        )
        return ImplicitReward(resources, self._policy_before(number), self._judge_reference(number))

    def _loss_reference(self, number: int) -> str:
        initial = self.config.rounds.loss_reference == "initial" or number == 0
        return self.config.ref.model_name_or_path if initial else self._policy_before(number)

    def _round_prompts(self, number: int) -> list[Prompt]:
        """This round's share of the prompts, which are shuffled once; those of seed and held-out pairs are left out."""
        if self._shuffled is None:
            taken = {prompt_key(pair.prompt) for pair in self._read_pairs(0)} | self.data.held_out_prompts
            self._shuffled = [one for one in self.data.prompts.prompts if prompt_key(one.messages) not in taken]
            random.Random(self.config.train.seed).shuffle(self._shuffled)
            self.prompt_counts = prompt_counts(self.config, len(self._shuffled))
        first = sum(self.prompt_counts[: number - 1])
        return self._shuffled[first : first + self.prompt_counts[number - 1]]

    def _tokenize(self, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Group]]:
        """The pairs that fit into --data.max_len, and their tokens."""
        human = self.data.human
        tokens = [(pair, (pair.round == 0 and human.tokens_of(pair)) or self.chat.pair(pair)) for pair in pairs]
        kept = [(pair, group) for pair, group in tokens if group is not None]
        if pairs and not kept:
            raise ValueError(f"none of {len(pairs)} pairs fits into --data.max_len {self.config.data.max_len} tokens")
        return [pair for pair, _ in kept], [group for _, group in kept]

    def _write_pairs(self, number: int, pairs: list[Pair], facts: dict[str, Any]) -> None:
        if self.writes:
            write_jsonl(self.folder.round(number) / "pairs.jsonl", (pair.to_row() for pair in pairs))
        self._finish(number, "pairs", {"pairs": len(pairs), **facts}, ["pairs.jsonl"])

    def _read_pairs(self, number: int) -> list[Pair]:
        check_round(self.folder, number, ("pairs",))
        return load_run_pairs(str(self.folder.round(number) / "pairs.jsonl"))


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    gold = {} if prompt.chosen is None else {"chosen": prompt.chosen, "rejected": prompt.rejected}
    return {"id": prompt.id, "prompt": prompt.messages, **template_columns(prompt.template_kwargs), **gold}
