"""The stages of ``openrlhf-sgpo compare``.

    prompts -> an answer of every run, and of the model from which all started -> divergence of every run's answers
    every pair of groups, and every group and the start -> oracle -> preferences of all pairs of seeds -> figures

A stage's rows are taken from its file if that is there, so that a stopped comparison goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers.utils import logging as transformers_logging

from openrlhf_sgpo import flags, oracle
from openrlhf_sgpo.comparison.compared_runs import (
    START,
    ComparedRun,
    RunGroup,
    group_warnings,
    oracle_warnings,
)
from openrlhf_sgpo.comparison.head_to_head import (
    budget_warnings,
    comparison_table,
    cross_play,
    mean_ledger,
    over_seeds,
    versus_start,
    with_holm,
)
from openrlhf_sgpo.comparison.settings import CompareSettings, inference
from openrlhf_sgpo.data.files import TEST_SPLITS, TRAIN_SPLITS
from openrlhf_sgpo.data.inspection import inspect_prompts
from openrlhf_sgpo.data.pairwise import transcript
from openrlhf_sgpo.data.records import Prompt, Records, fingerprint, load_prompts
from openrlhf_sgpo.data.report import require
from openrlhf_sgpo.data.template import refuse_unread_variables, template_arguments
from openrlhf_sgpo.data.tokens import Group, load_chat
from openrlhf_sgpo.judge.cache import content_key
from openrlhf_sgpo.ledger import Ledger, stage_rows
from openrlhf_sgpo.openrlhf import build_strategy
from openrlhf_sgpo.oracle import Answer, Oracle, Question, Resources
from openrlhf_sgpo.output import log_to, say
from openrlhf_sgpo.rollout import Rollout, check_rollout, start_rollout
from openrlhf_sgpo.run_folder import ADDRESS, RunFolder, write_json, write_text
from openrlhf_sgpo.training.scoring import Scorer

Row = dict[str, Any]

SHOWN = 20  # prompts whose answers are shown side by side


class RunComparison:
    """One comparison. Everything that can be wrong with data and folders is found before a model is loaded."""

    def __init__(self, settings: CompareSettings, groups: Sequence[RunGroup]):
        transformers_logging.disable_progress_bar()
        self.settings = settings
        self.groups = groups
        self.runs = [run for group in groups for run in group.runs]
        self.initial, self.reference = self.runs[0].initial, self.runs[0].reference
        self.config = config = inference(settings, self.initial, self.reference)
        records = self._records()
        check_rollout(config)
        oracle.get(settings.oracle).check(config)
        self.folder = RunFolder(settings.out, "out")
        variables = template_arguments(config.data.chat_template_kwargs)
        self.chat, _ = load_chat(
            *(self.initial, settings.trust_remote_code, "runs", config.data.max_len, variables, self.folder.moment())
        )
        refuse_unread_variables([self.chat.template])
        inspected = inspect_prompts(
            records,
            self.chat,
            config.data.limits,
            name=f"--prompts {settings.prompts}" if settings.prompts else "the runs' held-out prompts",
            room=config.rollout.max_new_tokens,
        )
        say(inspected.report.text())
        require([inspected.report])
        self.prompts, self.tokens = inspected.prompts, inspected.tokens
        oracle.get(settings.oracle).check_prompts(config, self.prompts)

        digests = {f"--runs {run.folder}": content_key(run.ledger()) for run in self.runs}
        digests["--prompts"] = fingerprint(self.prompts)
        self.folder.prepare(
            flags.dump({"": replace(settings, resume=False)}), settings.resume, digests, self.chat.template
        )
        log_to(self.folder.path)
        write_json(self.folder.path / "data_report.json", [inspected.report.to_dict()])
        self.strategy = build_strategy(config)
        pad = self.chat.tokenizer.pad_token_id
        self.scorer = Scorer(config, self.strategy, pad, self.folder.path / "log_probs")
        self.ledger = Ledger(self.folder.path / "ledger.json", writes=True)
        self.rollout: Rollout | None = None

    def _records(self) -> Records[Prompt]:
        settings, count = self.settings, self.settings.max_prompts
        if settings.prompts:
            return load_prompts(settings.prompts, settings.split, count, TRAIN_SPLITS)
        held_out = self.runs[0].settings["eval"]
        if not held_out["dataset"] or len({run.digests().get("--eval.dataset") for run in self.runs}) > 1:
            raise ValueError("--prompts: missing, the runs do not share held-out prompts; give a file of prompts")
        limits = [limit for limit in (count, held_out["max_samples"]) if limit]
        return load_prompts(held_out["dataset"], held_out["split"], min(limits, default=0), TEST_SPLITS)

    def execute(self) -> Row:
        """All stages that are not finished yet, and the results; returns what comparison.json holds."""
        try:
            start = self._answers(START, self.initial)
            answers = {
                group.name: [self._answers(name, run.policy.folder) for name, run in _named(group)]
                for group in self.groups
            }
        finally:
            if self.rollout:
                self.rollout.close()  # scoring and an oracle may need its memory
        divergences = {
            group.name: [
                self._divergences(name, run, own)
                for (name, run), own in zip(_named(group), answers[group.name], strict=True)
            ]
            for group in self.groups
        }
        resources = Resources(self.config, self.strategy, self.chat, self.scorer, self.folder.path, resident=True)
        judge = oracle.get(self.settings.oracle)(replace(resources, moment=self.chat.template.moment))
        try:
            pairs = with_holm(
                [
                    cross_play((one, other), self._preferences(judge, (one, other), answers[one], answers[other]))
                    for one, other in combinations(answers, 2)
                ]
            )
            over_start = [
                versus_start(name, self._preferences(judge, (name, START), own, [start]), divergences[name])
                for name, own in answers.items()
            ]
        finally:
            judge.close()
        return self._write(start, answers, divergences, pairs, over_start)

    # Stages ---------------------------------------------------------------------------------------------------------

    def _answers(self, name: str, folder: str) -> list[Row]:
        """One answer to each prompt, by the weights in a folder; the same random numbers for everyone."""

        def work(cost: dict[str, float]) -> list[Row]:
            if self.rollout is None:
                self.rollout = start_rollout(self.config, self.chat, folder)
            self.rollout.load(folder)
            samples = [one for (one,) in self.rollout.generate(self.tokens, 1, self.config.train.seed, name)]
            cost["samples"] = len(samples)
            cost["tokens_generated"] = sum(one.tokens for one in samples)
            return [{"id": prompt.id, **one.to_row()} for prompt, one in zip(self.prompts, samples, strict=True)]

        return self._stage(f"answers_{name}", work)

    def _divergences(self, name: str, run: ComparedRun, answers: Sequence[Row]) -> list[float]:
        """KL(policy || initial reference) of each answer, in nats."""
        room = self.config.data.max_len

        def work(cost: dict[str, float]) -> list[Row]:
            before = self.scorer.tokens_scored
            responses = [
                self.chat.response(one["text"], one["truncated"], room - len(prompt))
                for prompt, one in zip(self.tokens, answers, strict=True)
            ]
            # An empty answer has no tokens on which two policies could differ.
            spoken = [Group(prompt, (own,)) for prompt, own in zip(self.tokens, responses, strict=True) if own]
            label = f"{name}: divergence"
            found = self.scorer.divergence(run.policy.folder, self.reference, spoken, label) if spoken else []
            rest = iter(found)
            cost["tokens_scored"] = self.scorer.tokens_scored - before
            return [
                {"id": prompt.id, "kl": next(rest) if own else 0.0}
                for prompt, own in zip(self.prompts, responses, strict=True)
            ]

        return [row["kl"] for row in self._stage(f"kl_{name}", work)]

    def _preferences(
        self, judge: Oracle, names: tuple[str, str], first: Sequence[list[Row]], second: Sequence[list[Row]]
    ) -> npt.NDArray[np.float64]:
        """[i, j, p]: for the answer of seed i of the one over that of seed j of the other to prompt p."""

        def work(cost: dict[str, float]) -> list[Row]:
            questions = [
                Question(
                    prompt.id, prompt.messages, (_answer(one[place]), _answer(other[place])), prompt.template_kwargs
                )
                for one in first
                for other in second
                for place, prompt in enumerate(self.prompts)
            ]
            found = iter(judge.preferences(questions, " and ".join(names)))
            cost["comparisons"] = len(questions)
            return [
                {"id": prompt.id, "seeds": [i, j], "preference": next(found)[0][1]}
                for i in range(len(first))
                for j in range(len(second))
                for prompt in self.prompts
            ]

        rows = self._stage(f"preferences_{names[0]}_over_{names[1]}", work, judge.usage)
        return np.array([row["preference"] for row in rows]).reshape(len(first), len(second), -1)

    def _stage(
        self,
        name: str,
        work: Callable[[dict[str, float]], list[Row]],
        usage: Callable[[], dict[str, int]] = dict,
    ) -> list[Row]:
        return stage_rows(self.folder.path, self.ledger, name, work, usage)

    # Results --------------------------------------------------------------------------------------------------------

    def _write(
        self,
        start: list[Row],
        answers: dict[str, list[list[Row]]],
        divergences: dict[str, list[list[float]]],
        pairs: list[Row],
        over_start: list[Row],
    ) -> Row:
        groups = [_summary(group, answers[group.name], divergences[group.name]) for group in self.groups]
        shown = {START: start} | {name: own[0] for name, own in answers.items()}
        settings = self.settings
        comparison = {
            "prompts": len(self.prompts),
            "oracle": {"name": settings.oracle, **self._identity()},
            "decoding": {"seed": self.config.train.seed, **flags.to_dict({"": settings})["rollout"]},
            "groups": groups,
            "cross_play": pairs,
            "versus_start": over_start,
            "warnings": [
                *budget_warnings({one["name"]: one["ledger"] for one in groups}),
                *group_warnings(self.groups),
                *oracle_warnings(
                    self.groups, settings.oracle, settings.reward.model_name_or_path, settings.judge.model
                ),
            ],
            "samples": [
                {
                    "id": prompt.id,
                    "prompt": transcript(prompt.messages, prompt.template_kwargs.get("tools", ())),
                    "answers": {name: own[place]["text"] for name, own in shown.items()},
                }
                for place, prompt in enumerate(self.prompts[:SHOWN])
            ],
        }
        path = self.folder.path
        write_json(path / "comparison.json", comparison)
        text = comparison_table(comparison)
        write_text(path / "table.txt", text)
        say(text)
        from openrlhf_sgpo.report import write_report

        write_report(path)
        return comparison

    def _identity(self) -> Row:
        """The settings that decide what the oracle says."""
        reads = oracle.get(self.settings.oracle).reads
        tree = flags.to_dict({"": self.settings})
        return {
            f"{group}.{name}": value
            for group in ("reward", "judge")
            for name, value in tree[group].items()
            if f"{group}.{name}".startswith(tuple(reads)) and f"{group}.{name}" not in ADDRESS and value not in ("", [])
        }


def _named(group: RunGroup) -> list[tuple[str, ComparedRun]]:
    return [(f"{group.name}_{number}", run) for number, run in enumerate(group.runs, start=1)]


def _answer(row: Row) -> Answer:
    return Answer(row["text"], row["truncated"])


def _summary(group: RunGroup, answers: Sequence[list[Row]], divergences: Sequence[list[float]]) -> Row:
    evaluations = [run.evaluation() for run in group.runs]
    measured = all("accuracy" in one for one in evaluations)
    held_out = {name: [one[name] for one in evaluations] if measured else [] for name in ("accuracy", "margin")}
    return {
        "name": group.name,
        "runs": [{"folder": str(Path(run.folder).absolute()), "seed": run.seed} for run in group.runs],
        "figures": {
            **{name: over_seeds(values) for name, values in held_out.items()},
            "kl": over_seeds([fmean(own) for own in divergences]),
            "response_length": over_seeds([fmean(row["tokens"] for row in own) for own in answers]),
        },
        "ledger": mean_ledger([run.ledger() for run in group.runs], group.trials),
    }
