"""The loop of algorithms that learn from fresh answers: in every step the policy plays, the oracle judges, the policy learns.

    prompts -> answers by role -> preferences -> log-probs -> loss -> optimiser step -> weights to the engines

A round is ``--rounds.steps`` steps; at its end the policy is saved and evaluated. Each round takes up weights and optimiser
from the checkpoint at which the one before ended, as a resumed run does, so that both do the same.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from openrlhf_sgpo import ranks
from openrlhf_sgpo.algorithms.on_policy import Model, OnPolicyAlgorithm, Role
from openrlhf_sgpo.data.inspection import prompt_key
from openrlhf_sgpo.data.records import Prompt
from openrlhf_sgpo.finite import NotFiniteError, check_figures, in_training
from openrlhf_sgpo.memory import release_memory
from openrlhf_sgpo.openrlhf import DEFAULT_ADAPTER, Actor, load_actor, save_weights
from openrlhf_sgpo.oracle.base import Answer, Question
from openrlhf_sgpo.output import Progress
from openrlhf_sgpo.rollout import Rollout
from openrlhf_sgpo.rollout.base import prompt_seed
from openrlhf_sgpo.rollout.hf import HuggingFaceRollout
from openrlhf_sgpo.rollout.roles import Roles, prompt_room
from openrlhf_sgpo.run import Run
from openrlhf_sgpo.run_check import metrics_digest
from openrlhf_sgpo.run_folder import json_text, keep_rows, read_jsonl
from openrlhf_sgpo.training.checkpoints import Checkpoints
from openrlhf_sgpo.training.play_trainer import Play, PlayTrainer
from openrlhf_sgpo.training.sizes import check_sizes
from openrlhf_sgpo.training.stage import load_trained, write_policy

SHOWN = ("train/loss", "train/wins", "train/grad_norm")  # beside the progress bar


class PlayRun(Run):
    """One run of an on-policy algorithm."""

    play: OnPolicyAlgorithm

    def _check_prompts(self) -> None:
        taken = self.data.held_out_prompts
        self.prompts = [one for one in self.data.prompts.prompts if prompt_key(one.messages) not in taken]
        check_sizes(self.config, self.algorithm, None, len(self.prompts), int(os.environ.get("WORLD_SIZE", "1")))

    def _room(self) -> int:
        self.play = self.algorithm(self.options, self.config.model.beta)  # type: ignore[assignment]
        return prompt_room(self.play, self.chat, self.config.rollout.max_new_tokens)

    # The loop -------------------------------------------------------------------------------------------------------

    def execute(self) -> list[dict[str, Any]]:
        self.checkpoints = Checkpoints(self.folder.path / "checkpoints", self.strategy)
        self.weights = self.folder.path / "engine_weights"
        self._synced = 0
        self._mixed: HuggingFaceRollout | None = None
        try:
            self._reopen()
            rows = [self._evaluate(None)]
            self.evaluator.calibrate(rows[0])
            for number in range(1, 1 + self.config.rounds.count):
                self._play_round(number)
                rows.append(self._evaluate(number))
            self._write_results(rows)
            if self.writes:
                shutil.rmtree(self.checkpoints.folder, ignore_errors=True)
            return rows
        finally:
            if self.writes:
                shutil.rmtree(self.weights, ignore_errors=True)
            self._close()

    def _plan(self) -> list[str]:
        rounds = range(1, 1 + self.config.rounds.count)
        return ["initial/evaluate", *(f"round_{number}/{stage}" for number in rounds for stage in ("play", "evaluate"))]

    def _policy_before(self, number: int) -> str:
        return self.config.model.model_name_or_path if number == 1 else str(self.folder.policy(number - 1))

    def _reopen(self) -> None:
        """Rounds that ended after the latest whole checkpoint are played again where another follows, which begins with it."""
        done = sum(self._finished(number, "play") for number in range(1, 1 + self.config.rounds.count))
        if done in (0, self.config.rounds.count):
            return
        for number in range(1 + self.checkpoints.latest() // self.config.rounds.steps, 1 + done):
            self._say(f"round {number} is played again: round {done + 1} begins with the checkpoint of its last step")
            self.scorer.discard(str(self.folder.policy(number)))
            if self.writes:
                for name in ("manifest.json", "evaluation.json"):
                    (self.folder.round(number) / name).unlink(missing_ok=True)
        ranks.barrier()

    def _play_round(self, number: int) -> None:
        """round_K/plays.jsonl and policy: ``--rounds.steps`` steps."""
        if self._finished(number, "play"):
            return
        with self._stage(f"round_{number}/play") as entry:
            entry |= self._play(number)
        facts: dict[str, Any] = {"policy": self._name(self._policy_before(number)), "steps": self.config.rounds.steps}
        if self.writes:
            facts["metrics"] = metrics_digest(self.folder, number)
        self._finish(number, "play", facts, ["plays.jsonl", *(self.play.adapters or ("policy",))])

    def _play(self, number: int) -> dict[str, float]:
        """Returns what it cost, in all processes that took part in the round."""
        config, before = self.config, self._policy_before(number)
        last = number * config.rounds.steps
        first = last - config.rounds.steps
        models: dict[Model, str] = {"reference": config.ref.model_name_or_path, "previous": before}
        total = config.rounds.count * config.rounds.steps
        actor, optimizer, scheduler = load_trained(
            *(config.model.model_name_or_path, config, self.strategy, config.adam.lr, total, "plays"),
            adapters=self.play.learning_rates,
        )
        frozen = {
            name: self.strategy.prepare(load_actor(models[name], config, self.strategy, trainable=False))
            for name in self.play.models
        }
        pad = self.scorer.pad_token_id
        trainer = PlayTrainer(self.play, actor, optimizer, scheduler, frozen, self.strategy, config, pad)
        try:
            state = self.checkpoints.restore(actor.model) or {"step": 0, "cost": {}}
            step = state["step"]
            cost: dict[str, float] = state["cost"] if step > first else {}
            self._rewind(number, step)
            engine = self._engine(before)
            mixture, folders = self._mixture(engine, before), self._folders(number)
            longest = config.data.max_len - config.rollout.max_new_tokens
            roles = Roles(self.play, self.chat, engine, mixture, folders, longest)
            if step > first and self.play.steps_per_sync:
                self._sync(actor, roles)
            progress = Progress(
                total=last, initial=step, desc=f"round {number}: play", unit="step", disable=not self.writes
            )
            while step < last:
                step += 1
                row = self._step(number, step, roles, trainer, cost)
                if self.play.steps_per_sync and step < last:
                    with _seconds(cost, "sync"):
                        self._sync(actor, roles)
                if step == last or (config.ckpt.save_steps > 0 and step % config.ckpt.save_steps == 0):
                    trainer.check_policy(f"round {number}, after step {step}")
                    self.checkpoints.save(actor.model, step, {"step": step, "cost": cost})
                shown = {name.removeprefix("train/"): row[name] for name in SHOWN if row[name] is not None}
                progress.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
                progress.update()
            progress.close()
            for role, adapter in (self.play.adapters or {"policy": DEFAULT_ADAPTER}).items():
                write_policy(actor, self.tokenizer, self.folder.round(number) / role, self.strategy, adapter)
        finally:
            for model in (actor, *frozen.values()):
                model.model.destroy()
            del trainer, model, actor, optimizer, scheduler, frozen
            release_memory()
        return cost

    # A step ---------------------------------------------------------------------------------------------------------

    def _step(
        self, number: int, step: int, roles: Roles, trainer: PlayTrainer, cost: dict[str, float]
    ) -> dict[str, float | None]:
        """One step and what is recorded of it; returns its metrics."""
        place, dtype = f"round {number}, step {step}", self.config.ds.param_dtype
        prompts = self._prompts_of(step)
        tokens = [self.data.prompts.tokens_of(prompt) for prompt in prompts]
        loading = roles.seconds_loading
        with _seconds(cost, "generate"):
            try:
                answers = roles.answer(prompts, tokens, prompt_seed(self.config.train.seed, (step,)))
            except NotFiniteError as error:
                raise in_training(place, str(error), dtype) from error
        loading = roles.seconds_loading - loading
        questions = [
            Question(
                prompt.id,
                prompt.messages,
                tuple(Answer(one.text, one.truncated) for _, one in own),
                prompt.template_kwargs,
            )
            for prompt, own in zip(prompts, answers, strict=True)
        ]
        oracle = self._frozen_oracle()
        used = oracle.usage()
        with _seconds(cost, "oracle"):
            matrices = oracle.preferences(questions, label="")
        plays = [Play(*row) for row in zip(prompts, answers, matrices, strict=True)]
        frozen = trainer.seconds_log_probs
        learning_rate = trainer.scheduler.get_last_lr()[0]
        with _seconds(cost, "train"):
            losses, own, anchor = trainer.step(step, plays)
        norm = self.strategy.get_grad_norm(trainer.actor)
        # In this order: what comes first is the cause of what follows. All ranks have the same figures.
        figures = {
            "mean log-probability of the answers": own.mean().item(),
            f"mean log-probability of the answers under the {self.play.models[0]} model": anchor.mean().item(),
            "loss": losses.mean().item(),
            "gradient norm": norm,
        }
        check_figures(figures, place, dtype)
        frozen = trainer.seconds_log_probs - frozen
        sizes = [len(group) for play in plays for group in play.groups()]
        for name, amount in {
            "steps": 1,
            "samples": sum(len(play.answers) for play in plays),
            "tokens_generated": sum(one.tokens for play in plays for _, one in play.answers),
            "tokens_trained": sum(sizes),
            "tokens_scored": sum(sizes) * len(self.play.models),
            "seconds_log_probs": frozen,
            "seconds_train": -frozen,
            "seconds_sync": loading,
            "seconds_generate": -loading,
            **{name: total - used[name] for name, total in oracle.usage().items()},
        }.items():
            cost[name] = cost.get(name, 0) + amount
        row = self._metrics(plays, losses, own, anchor)
        row["train/grad_norm"] = norm
        row["train/learning_rate"] = learning_rate
        self.metrics.log(f"round {number}", step, row)
        if self.writes:
            with open(self._plays(number), "a", encoding="utf-8") as file:
                for play, ours, theirs in zip(plays, own.tolist(), anchor.tolist(), strict=True):
                    file.write(json_text(self._row(step, play, ours, theirs)) + "\n")
        return row

    def _metrics(self, plays: list[Play], losses: Tensor, own: Tensor, anchor: Tensor) -> dict[str, float | None]:
        """wins: mean preference for the first answer over the others. Of each role: kl, the mean log-ratio to the reference
        (to the round's first policy where there is no reference), entropy, minus the mean log-probability, both in nats per
        answer; tokens per answer, and the share that the length limit cut."""
        row: dict[str, float | None] = {
            "train/loss": losses.mean().item(),
            "train/wins": mean(mean(play.preferences[0][1:]) for play in plays),
        }
        roles = self.play.roles
        for role in dict.fromkeys(roles):
            places = [place for place, other in enumerate(roles) if other == role]
            samples = [play.answers[place][1] for play in plays for place in places]
            row |= {
                f"train/{role}/kl": (own - anchor)[:, places].mean().item(),
                f"train/{role}/entropy": -own[:, places].mean().item(),
                f"train/{role}/length": mean(one.tokens for one in samples),
                f"train/{role}/truncated": mean(one.truncated for one in samples),
            }
        return row

    def _row(self, step: int, play: Play, own: list[float], anchor: list[float]) -> dict[str, Any]:
        """A line of plays.jsonl."""
        answers = [
            {"role": role, **sample.to_row(), "log_prob": ours, f"{self.play.models[0]}_log_prob": theirs}
            for role, (_, sample), ours, theirs in zip(self.play.roles, play.answers, own, anchor, strict=True)
        ]
        return {"step": step, "id": play.prompt.id, "answers": answers, "preferences": play.preferences}

    def _prompts_of(self, step: int) -> list[Prompt]:
        """The batch of a step: the prompts in an order that is shuffled anew every epoch, in whole batches."""
        size = self.config.train.batch_size
        epoch, place = divmod(step - 1, len(self.prompts) // size)
        order = _shuffled(len(self.prompts), prompt_seed(self.config.train.seed, (epoch,)))
        return [self.prompts[index] for index in order[place * size : (place + 1) * size]]

    # What a round works with ----------------------------------------------------------------------------------------

    def _plays(self, number: int) -> Path:
        return self.folder.round(number) / "plays.jsonl"

    def _rewind(self, number: int, step: int) -> None:
        """Drop what a killed process recorded after ``step``: those steps are taken again."""
        self.metrics.rewind(f"round {number}", step)
        path = self._plays(number)
        if self.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            keep_rows(path, lambda row: row["step"] <= step)
            count = (step - (number - 1) * self.config.rounds.steps) * self.config.train.batch_size
            if (there := len(read_jsonl(path))) != count:
                raise ValueError(
                    f"{path}: {there} rows are there up to step {step}, {count} were written; restore it from a copy, or "
                    "start again in another --ckpt.output_dir"
                )

    def _folders(self, number: int) -> dict[Role, str]:
        """With the weights of each role when the round begins."""
        before = dict.fromkeys(self.play.roles, self._policy_before(number))
        own = {} if number == 1 else {role: str(self.folder.round(number - 1) / role) for role in self.play.adapters}
        return before | own

    def _mixture(self, engine: Rollout, policy: str) -> Rollout:
        """The rollout that holds the mixture, with this policy; the engine where there is none."""
        if not self.play.mixture:
            return engine
        if self._mixed is None:
            self._mixed = HuggingFaceRollout(self.config, self.chat, policy, self.play.mixture)
        self._mixed.load(policy)
        return self._mixed

    def _sync(self, actor: Actor, roles: Roles) -> None:
        """The roles answer with the weights that were just trained, from folders that are there until the next time."""
        self._synced += 1
        folder = self.weights / str(self._synced)
        if self.writes:
            shutil.rmtree(self.weights, ignore_errors=True)
        adapters = {role: self.play.adapters.get(role, DEFAULT_ADAPTER) for role in self.play.roles}
        for adapter in dict.fromkeys(adapters.values()):
            save_weights(actor, str(folder / adapter), self.strategy, adapter)
        roles.folders = {role: str(folder / adapter) for role, adapter in adapters.items()}


@lru_cache(maxsize=1)
def _shuffled(count: int, seed: int) -> list[int]:
    """The numbers below ``count`` in the order of an epoch, which all its steps share."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


@contextmanager
def _seconds(cost: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    cost[f"seconds_{part}"] = cost.get(f"seconds_{part}", 0.0) + time.perf_counter() - start
