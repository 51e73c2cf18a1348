"""The stages of ``openrlhf-sgpo compare``.

    prompts -> an answer of every run, and of the model from which all started -> divergence of every run's answers
    every pair of groups, and every group and the start -> oracle -> preferences of all pairs of seeds -> figures

A finished stage is read from its file, so a stopped comparison continues where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt

from openrlhf_sgpo import flags, oracle
from openrlhf_sgpo.comparison.compared_runs import START, ComparedRun, RunGroup, group_warnings, oracle_warnings
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
from openrlhf_sgpo.comparison.worst_case import worst_cases
from openrlhf_sgpo.content_cache import content_key
from openrlhf_sgpo.data.files import TEST_SPLITS, TRAIN_SPLITS
from openrlhf_sgpo.data.pairwise import transcript
from openrlhf_sgpo.data.records import Prompt, Records, fingerprint, load_prompts
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.oracle import Answer, Oracle, Question
from openrlhf_sgpo.output import say
from openrlhf_sgpo.rollout import sampling_of
from openrlhf_sgpo.run_folder import ADDRESS, write_json, write_text
from openrlhf_sgpo.staged_command import Row, StagedCommand

SHOWN = 20  # prompts whose answers are shown side by side


class RunComparison(StagedCommand):
    """One comparison."""

    def __init__(self, settings: CompareSettings, groups: Sequence[RunGroup]):
        self.settings = settings
        self.groups = groups
        self.runs = [run for group in groups for run in group.runs]
        self.initial, self.reference = self.runs[0].initial, self.runs[0].reference
        records = _records(settings, self.runs)
        config = inference(settings, self.initial, self.reference)
        super().__init__(settings, config, self.initial, "runs")
        name = f"--prompts {settings.prompts}" if settings.prompts else "the runs' held-out prompts"
        self.read_prompts(records, name, config.rollout.max_new_tokens)
        digests = {f"--runs {run.folder}": content_key(run.ledger()) for run in self.runs}
        digests["--prompts"] = fingerprint(self.prompts)
        self.begin(flags.dump({"": replace(settings, resume=False)}), digests)

    def execute(self) -> Row:
        """Run all unfinished stages and write the results; returns the contents of comparison.json."""
        try:
            start = self._answers(START, self.initial)
            answers = {
                group.name: [self._answers(name, run.policy.folder) for name, run in _named(group)]
                for group in self.groups
            }
        finally:
            self.close_engine()
        divergences = {
            group.name: [
                self._divergences(name, run, rows)
                for (name, run), rows in zip(_named(group), answers[group.name], strict=True)
            ]
            for group in self.groups
        }
        with closing(self.make_oracle()) as judge:
            pairs = with_holm(
                [
                    cross_play(names, self._preferences(judge, names, answers[names[0]], answers[names[1]]))
                    for names in combinations(answers, 2)
                ]
            )
            over_start = [
                versus_start(name, self._preferences(judge, (name, START), by_seed, [start]), divergences[name])
                for name, by_seed in answers.items()
            ]
        return self._write(start, answers, divergences, pairs, over_start)

    def _answers(self, name: str, folder: str) -> list[Row]:
        """One answer to each prompt from the weights in ``folder``; every model draws the same random numbers."""

        def work(cost: dict[str, float]) -> list[Row]:
            sampling = sampling_of(self.config.rollout, self.config.train.seed)
            samples = [sample for (sample,) in self.engine(folder).generate(self.tokens, sampling, name)]
            cost["samples"] = len(samples)
            cost["tokens_generated"] = sum(sample.tokens for sample in samples)
            return [{"id": prompt.id, **sample.to_row()} for prompt, sample in zip(self.prompts, samples, strict=True)]

        return self.stage(f"answers_{name}", work)

    def _divergences(self, name: str, run: ComparedRun, answers: Sequence[Row]) -> list[float]:
        """KL(policy || initial reference) of each answer, in nats."""
        room = self.config.data.max_len

        def work(cost: dict[str, float]) -> list[Row]:
            before = self.scorer.tokens_scored
            groups = [
                Group(prompt, (tuple(answer["token_ids"])[: room - len(prompt)],))
                for prompt, answer in zip(self.tokens, answers, strict=True)
            ]
            divergences = self.scorer.divergence(run.policy.folder, self.reference, groups, f"{name}: divergence")
            cost["tokens_scored"] = self.scorer.tokens_scored - before
            return [{"id": prompt.id, "kl": kl} for prompt, kl in zip(self.prompts, divergences, strict=True)]

        return [row["kl"] for row in self.stage(f"kl_{name}", work)]

    def _preferences(
        self, judge: Oracle, names: tuple[str, str], first: Sequence[list[Row]], second: Sequence[list[Row]]
    ) -> npt.NDArray[np.float64]:
        """[i, j, p]: the preference for seed i's answer to prompt p in the first group over seed j's in the second."""

        def work(cost: dict[str, float]) -> list[Row]:
            questions = [
                Question(prompt.id, prompt.messages, tuple(map(Answer.from_row, rows)), prompt.template_kwargs)
                for answers in first
                for opponents in second
                for prompt, *rows in zip(self.prompts, answers, opponents, strict=True)
            ]
            matrices = iter(judge.preferences(questions, " and ".join(names)))
            cost["comparisons"] = len(questions)
            return [
                {"id": prompt.id, "seeds": [i, j], "preference": next(matrices)[0][1]}
                for i in range(len(first))
                for j in range(len(second))
                for prompt in self.prompts
            ]

        rows = self.stage(f"preferences_{names[0]}_over_{names[1]}", work, judge.usage)
        return np.array([row["preference"] for row in rows]).reshape(len(first), len(second), -1)

    def _write(
        self,
        start: list[Row],
        answers: dict[str, list[list[Row]]],
        divergences: dict[str, list[list[float]]],
        pairs: list[Row],
        over_start: list[Row],
    ) -> Row:
        groups = [_summary(group, answers[group.name], divergences[group.name]) for group in self.groups]
        shown = {START: start} | {name: by_seed[0] for name, by_seed in answers.items()}
        settings = self.settings
        comparison = {
            "prompts": len(self.prompts),
            "oracle": {"name": settings.oracle, **self._identity()},
            "decoding": {"seed": self.config.train.seed, **flags.to_dict({"": settings})["rollout"]},
            "groups": groups,
            "cross_play": pairs,
            "versus_start": over_start,
            "worst_case": worst_cases(self.groups),
            "warnings": [
                *budget_warnings({group["name"]: group["ledger"] for group in groups}),
                *group_warnings(self.groups),
                *oracle_warnings(
                    self.groups, settings.oracle, settings.reward.model_name_or_path, settings.judge.model
                ),
            ],
            "samples": [
                {
                    "id": prompt.id,
                    "prompt": transcript(prompt.messages, prompt.template_kwargs.get("tools", ())),
                    "answers": {name: rows[index]["text"] for name, rows in shown.items()},
                }
                for index, prompt in enumerate(self.prompts[:SHOWN])
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
        """The settings on which the oracle's preferences depend."""
        reads = oracle.get(self.settings.oracle).reads
        tree = flags.to_dict({"": self.settings})
        return {
            f"{group}.{name}": value
            for group in ("reward", "judge")
            for name, value in tree[group].items()
            if f"{group}.{name}".startswith(tuple(reads)) and f"{group}.{name}" not in ADDRESS and value not in ("", [])
        }


def _records(settings: CompareSettings, runs: Sequence[ComparedRun]) -> Records[Prompt]:
    """The prompts of --prompts, or the held-out prompts of all runs. Raises ValueError if there are neither."""
    count = settings.max_prompts
    if settings.prompts:
        return load_prompts(settings.prompts, settings.split, count, TRAIN_SPLITS)
    held_out = runs[0].settings["eval"]
    if not held_out["dataset"] or len({run.digests().get("--eval.dataset") for run in runs}) > 1:
        raise ValueError("--prompts: missing, the runs do not share held-out prompts; give a file of prompts")
    sizes = {run.settings["eval"]["max_samples"] for run in runs}
    limits = [limit for limit in (count, *sizes) if limit]
    if len(sizes) > 1 and limits:
        say(f"runs differ in --eval.max_samples: all are compared on the first {min(limits)} held-out prompts")
    return load_prompts(held_out["dataset"], held_out["split"], min(limits, default=0), TEST_SPLITS)


def _named(group: RunGroup) -> list[tuple[str, ComparedRun]]:
    return [(f"{group.name}_{number}", run) for number, run in enumerate(group.runs, start=1)]


def _summary(group: RunGroup, answers: Sequence[list[Row]], divergences: Sequence[list[float]]) -> Row:
    evaluations = [run.evaluation() for run in group.runs]
    measured = all("accuracy" in figures for figures in evaluations)
    held_out = {name: [figures[name] for figures in evaluations] if measured else [] for name in ("accuracy", "margin")}
    return {
        "name": group.name,
        "runs": [{"folder": str(Path(run.folder).absolute()), "seed": run.seed} for run in group.runs],
        "figures": {
            **{name: over_seeds(values) for name, values in held_out.items()},
            "kl": over_seeds([fmean(nats) for nats in divergences]),
            "response_length": over_seeds([fmean(row["tokens"] for row in rows) for rows in answers]),
        },
        "ledger": mean_ledger([run.ledger() for run in group.runs], group.trials),
    }
