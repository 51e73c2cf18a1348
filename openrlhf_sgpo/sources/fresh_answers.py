"""Fresh answers: in every step the policy answers, the oracle judges, the policy learns.

    prompts -> answers by role -> preferences -> log-probabilities -> loss -> optimiser step -> weights to the engines

With ``--rollout.steps_behind`` 1 the engines answer the prompts of step t + 1, with the weights that step t - 1 has left, while
step t judges and trains. The second step of a round has answers of the weights with which the round begins, as the first does.

A round is ``--rounds.steps`` steps; at its end the policy is saved and evaluated. Each round takes up weights and optimiser
from the checkpoint at which the one before ended, as a resumed run does, so that both do the same.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any, ClassVar

from torch import Tensor

from openrlhf_sgpo import oracle as oracles
from openrlhf_sgpo import ranks
from openrlhf_sgpo.algorithms.base import Stage
from openrlhf_sgpo.algorithms.plays import PlayAlgorithm, Role
from openrlhf_sgpo.data.inspection import prompt_key
from openrlhf_sgpo.data.records import Prompt
from openrlhf_sgpo.finite import NotFiniteError, in_training
from openrlhf_sgpo.ledger import Stopwatch, increase
from openrlhf_sgpo.openrlhf import DEFAULT_ADAPTER, PolicyWeights, aside
from openrlhf_sgpo.oracle import Question, RewardOracle
from openrlhf_sgpo.oracle.base import win_probabilities
from openrlhf_sgpo.rollout.base import prompt_seed
from openrlhf_sgpo.rollout.roles import Answers, Roles
from openrlhf_sgpo.run import Run
from openrlhf_sgpo.run_folder import json_text, keep_rows, read_jsonl
from openrlhf_sgpo.sources.base import Source
from openrlhf_sgpo.training.checkpoints import Checkpoints
from openrlhf_sgpo.training.plays import Play, PlayForward
from openrlhf_sgpo.training.sizes import check_sizes
from openrlhf_sgpo.training.trainer import Trainer, TrainingStage


class FreshAnswers(Source):
    """Rounds of steps. The answers of each step are sampled and judged for that step."""

    training = "play"
    trains_first = False
    shown: ClassVar[dict[str, str]] = {"loss": "loss", "wins": "wins", "grad_norm": "grad_norm"}

    def __init__(self, run: Run, algorithm: type[PlayAlgorithm]):
        super().__init__(run)
        self.algorithm = algorithm
        self._check_scores()
        taken = run.data.held_out_prompts
        self.prompts = [prompt for prompt in run.data.prompts.prompts if prompt_key(prompt.messages) not in taken]
        check_sizes(self.config, algorithm, None, len(self.prompts), int(os.environ.get("WORLD_SIZE", "1")))

    def _check_scores(self) -> None:
        """Raises ValueError if the algorithm reads scores of answers and the oracle has none."""
        run, name = self.run, self.config.oracle
        algorithm = self.algorithm(run.options, self.config.model.beta)
        if algorithm.scored and not issubclass(oracles.get(name), RewardOracle):
            raise ValueError(
                f"--oracle {name} compares answers and gives them no scores, which --algo {algorithm.name} reads with these "
                "settings; use an oracle with scores, such as reward_model, or win rates"
            )

    @property
    def numbers(self) -> Sequence[int]:
        return range(1, 1 + self.config.rounds.count)

    @property
    def checkpoints(self) -> Path:
        return self.folder.path / "checkpoints"

    def plan(self) -> list[str]:
        stages = [f"round_{number}/{stage}" for number in self.numbers for stage in ("play", "evaluate")]
        return ["initial/evaluate", *stages]

    def open(self) -> None:
        """A round that ended after the latest whole checkpoint is played again if another round follows, because that one
        begins from it."""
        done = sum(self.run.finished(number, self.training) for number in self.numbers)
        if done in (0, len(self.numbers)):
            return
        latest = Checkpoints(self.checkpoints, self.run.strategy).latest()
        for number in range(1 + latest // self.config.rounds.steps, 1 + done):
            self.run.say(
                f"round {number} is played again: round {done + 1} begins with the checkpoint of its last step"
            )
            self.run.scorer.discard(str(self.folder.policy(number)))
            if self.run.writes:
                for name in ("manifest.json", "evaluation.json"):
                    (self.folder.round(number) / name).unlink(missing_ok=True)
        ranks.barrier()

    def begin(self, number: int) -> TrainingStage:
        run, config = self.run, self.config
        algorithm = self.play = self.algorithm(run.options, config.model.beta)
        steps, before = config.rounds.steps, run.policy_before(number)
        # Engines take their share of a GPU's memory before the trainer does, also in a resumed run.
        self.engine = run.engine(before)
        algorithm.begin_stage(Stage(None, number, steps, config.train.seed + number))
        clock = Stopwatch()
        every = algorithm.reference_rounds
        moved = (number - 1) // every * every if every else 0
        self.reference = str(self.folder.policy(moved)) if moved else config.ref.model_name_or_path
        folders = {"reference": self.reference, "previous": before}
        return TrainingStage(
            number,
            algorithm,
            partial(
                PlayForward,
                algorithm,
                run.tokenizer.pad_token_id,
                config.rollout,
                clock,
            ),
            config.model.model_name_or_path,
            config.adam.lr,
            first=(number - 1) * steps,
            last=number * steps,
            scheduled=config.rounds.count * steps,
            policies={
                adapter: self.folder.round(number) / role
                for role, adapter in (algorithm.adapters or {"policy": DEFAULT_ADAPTER}).items()
            },
            checkpoints=self.checkpoints,
            generator="plays",  # one training, whose adapters begin once
            frozen={name: folders[name] for name in algorithm.models},
            adapters=algorithm.learning_rates,
            keeps_optimizer=True,
            facts={"policy": run.name_of(before), "steps": steps},
            clock=clock,
        )

    def restore(self, stage: TrainingStage, trainer: Trainer, step: int) -> None:
        self.trainer = trainer
        self.number = stage.number
        self._rewind(step)
        longest = self.config.data.max_len - self.config.rollout.max_new_tokens
        self.roles = Roles(
            self.play, self.run.chat, self.engine, self._folders(), longest, self.config.rollout, stage.clock
        )
        self._next: Answers | Callable[[], tuple[Answers, tuple[float, float]]] | None = trainer.ahead
        self._trains = self._trained = 0.0  # when the latest step of the trainer began and ended
        self.follows_policy = self.play.steps_per_sync > 0
        if step > stage.first and self.follows_policy:
            self.sync()

    def batch(self, step: int) -> list[Play]:
        """Draw the step's plays. They are the same on every rank, and each rank trains on its share."""
        config, cost, oracle = self.config, self.trainer.stage.clock.cost, self.run.frozen_oracle()
        prompts = self._prompts_of(step)
        try:
            answers = self._answers(step)
        except NotFiniteError as error:
            place = f"{self.trainer.stage.label}, step {step}"
            raise in_training(place, str(error), config.ds.param_dtype) from error
        questions = [
            Question(prompt.id, prompt.messages, tuple(sample for _, sample in drawn), prompt.template_kwargs)
            for prompt, drawn in zip(prompts, answers, strict=True)
        ]
        before = oracle.usage()
        rewards: list[list[float]] = [[] for _ in questions]
        with self.trainer.stage.clock("oracle"):
            if self.play.scored:
                rewards = oracle.rewards(questions, label="")
                matrices = [win_probabilities(*row) for row in zip(questions, rewards, strict=True)]
            else:
                matrices = oracle.preferences(questions, label="")
        self.plays = [Play(*row) for row in zip(prompts, answers, matrices, rewards, strict=True)]
        for name, amount in {
            "steps": 1,
            "samples": sum(len(play.answers) for play in self.plays),
            "tokens_generated": sum(sample.tokens for play in self.plays for _, sample in play.answers),
            "tokens_scored": sum(self.trainer.forward.tokens(self.plays)) * len(self.play.models),
            **increase(before, oracle.usage()),
        }.items():
            cost[name] = cost.get(name, 0) + amount
        share = len(self.plays) // self.run.strategy.world_size
        first = self.run.strategy.get_rank() * share
        self._trains = perf_counter()
        return self.plays[first : first + share]

    def record(self, step: int, recorded: Tensor) -> dict[str, float]:
        """Append a line to plays.jsonl for each play. Metrics: wins, the mean preference for the first answer over the others;
        and for each role the tokens per answer and the share of answers that the length limit cut."""
        self._trained = perf_counter()
        if self.run.writes:
            with open(self._file(self.number), "a", encoding="utf-8") as file:
                for play, log_probs in zip(self.plays, recorded.tolist(), strict=True):
                    file.write(json_text(self._row(step, play, log_probs)) + "\n")
        metrics: dict[str, float] = {"train/wins": mean(mean(play.preferences[0][1:]) for play in self.plays)}
        for role in dict.fromkeys(self.play.roles):
            samples = [
                sample
                for play in self.plays
                for other, (_, sample) in zip(self.play.roles, play.answers, strict=True)
                if other == role
            ]
            metrics[f"train/{role}/length"] = mean(sample.tokens for sample in samples)
            metrics[f"train/{role}/truncated"] = mean(sample.truncated for sample in samples)
        return metrics

    def _answers(self, step: int) -> Answers:
        if not self.config.rollout.steps_behind:
            with self.trainer.stage.clock("generate"), aside(self.trainer.actor):
                return self.roles.answer(*self._asked(step))
        if self._next is None:
            self._next = self.roles.begin(*self._asked(step))
        answers = self.ahead()
        assert answers is not None
        self._next = self.roles.begin(*self._asked(step + 1)) if step < self.trainer.stage.last else None
        return answers

    def ahead(self) -> Answers | None:
        """The answers for the next step, once engines have given them; None if they have not begun with any."""
        if callable(self._next):
            with self.trainer.stage.clock("generate"):
                self._next, (began, ended) = self._next()
            both = min(ended, self._trained) - max(began, self._trains)
            cost = self.trainer.stage.clock.cost
            for name, seconds in (("engine_seconds", ended - began), ("overlapped_seconds", max(0.0, both))):
                cost[name] = cost.get(name, 0.0) + seconds
        return self._next

    def _asked(self, step: int) -> tuple[list[Prompt], list[tuple[int, ...]], int]:
        """The prompts of a step, their tokens, and its seed."""
        prompts = self._prompts_of(step)
        tokens = [self.run.data.prompts.tokens_of(prompt) for prompt in prompts]
        return prompts, tokens, prompt_seed(self.config.train.seed, (step,))

    def sync(self) -> None:
        """The roles answer with the weights that were just trained, out of the trainer's memory."""
        adapters = {role: self.play.adapters.get(role, DEFAULT_ADAPTER) for role in self.play.roles}
        latest = {name: PolicyWeights(self.trainer.actor, name) for name in adapters.values()}
        self.roles.weights = {**self.roles.weights, **{role: latest[name] for role, name in adapters.items()}}

    def files(self, number: int) -> list[str]:
        return ["plays.jsonl", *(self.play.adapters or ("policy",))]

    def finish(self) -> None:
        if self.run.writes:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _row(self, step: int, play: Play, log_probs: list[float]) -> dict[str, Any]:
        """A line of plays.jsonl. log_probs: what ``PlayForward.recorded`` says of the play."""
        count, anchor = len(play.answers), self.play.models[0]
        columns = zip(self.play.roles, play.answers, log_probs[:count], log_probs[count : 2 * count], strict=True)
        answers = [
            {
                "role": role,
                "text": sample.text,
                "truncated": sample.truncated,
                "tokens": sample.tokens,
                "log_prob": policy,
                f"{anchor}_log_prob": frozen,
            }
            for role, (_, sample), policy, frozen in columns
        ]
        rewards = {"rewards": play.rewards} if play.rewards else {}
        return {"step": step, "id": play.prompt.id, "answers": answers, "preferences": play.preferences, **rewards}

    def _prompts_of(self, step: int) -> list[Prompt]:
        """The batch of a step. Prompts are shuffled in every epoch, and an epoch has whole batches only."""
        size = self.config.train.batch_size
        epoch, place = divmod(step - 1, len(self.prompts) // size)
        order = _shuffled(len(self.prompts), prompt_seed(self.config.train.seed, (epoch,)))
        return [self.prompts[index] for index in order[place * size : (place + 1) * size]]

    def _file(self, number: int) -> Path:
        return self.folder.round(number) / "plays.jsonl"

    def _rewind(self, step: int) -> None:
        """Drop what a killed process recorded after ``step``, because those steps are taken again."""
        path = self._file(self.number)
        if self.run.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            keep_rows(path, lambda row: row["step"] <= step)
            count = (step - (self.number - 1) * self.config.rounds.steps) * self.config.train.batch_size
            if (there := len(read_jsonl(path))) != count:
                raise ValueError(
                    f"{path}: {there} rows up to step {step}, but {count} were written; restore it from a copy, or start again "
                    "in another --ckpt.output_dir"
                )

    def _folders(self) -> dict[Role, str | PolicyWeights]:
        """Folders with the weights of each role when the round begins."""
        folders: dict[Role, str | PolicyWeights] = dict.fromkeys(self.play.roles, self.run.policy_before(self.number))
        if self.number > 1:
            before = self.folder.round(self.number - 1)
            folders |= {role: str(before / role) for role in self.play.adapters}
        return folders


@lru_cache(maxsize=1)
def _shuffled(count: int, seed: int) -> list[int]:
    """The numbers below ``count`` in the order of an epoch. All steps of the epoch share it."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
