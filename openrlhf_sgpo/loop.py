"""The loop, which every rank runs: stages of training, each with its source of batches, and evaluations between them.

    stored pairs    prompts -> answers -> oracle -> pairs -> log-probabilities -> follower -> steps -> policy
    fresh answers   in every step: prompts -> answers by role -> preferences -> loss -> step -> weights to the engines

Each stage starts from what is on disk and leaves its result on disk; that is also how a run is resumed.
"""

from __future__ import annotations

import os
from functools import partial
from shlex import quote
from typing import Any

from openrlhf_sgpo import ranks
from openrlhf_sgpo.algorithms import AlgorithmType, PlayAlgorithm
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.evaluator import Evaluator, worst_case
from openrlhf_sgpo.output import Progress
from openrlhf_sgpo.report.moments import read_moments, verdict
from openrlhf_sgpo.report.tracked import track_round
from openrlhf_sgpo.run import Run
from openrlhf_sgpo.run_check import metrics_digest
from openrlhf_sgpo.run_folder import read_json, write_json, write_text
from openrlhf_sgpo.sources import FreshAnswers, Source, StoredPairs
from openrlhf_sgpo.table import results_table
from openrlhf_sgpo.training.trainer import Trainer


def execute(config: Config, algorithm: AlgorithmType, options: Any) -> list[dict[str, Any]]:
    """Runs all stages that are not finished yet. Returns the rows of the results table, beginning with the start.

    Raises ValueError for everything the user can fix, before a model is loaded if it can be known by then.
    """
    run = Run(config, algorithm, options)
    source: Source = (
        FreshAnswers(run, algorithm) if issubclass(algorithm, PlayAlgorithm) else StoredPairs(run, algorithm)
    )
    run.open(source.numbers, source.plan())
    try:
        evaluator = Evaluator(run)
        source.open()
        run.start_engines()
        rows = [] if source.trains_first else [evaluate_policy(run, evaluator, None)]
        for number in source.numbers:
            source.prepare(number)
            train_round(run, source, number)
            source.end(number)
            rows = rows or [evaluate_policy(run, evaluator, None)]
            evaluator.calibrate(rows[0])
            rows.append(evaluate_policy(run, evaluator, number) | ranks.on_rank_0(partial(source.results, number)))
        write_results(run, rows)
        source.finish()
        return rows
    finally:
        run.close()


def train_round(run: Run, source: Source, number: int) -> None:
    """The policy of a round, in optimiser steps on the source's batches."""
    if run.finished(number, source.training):
        return
    stage = source.begin(number)
    run.scorer.make_room(run.config.ref.model_name_or_path)
    with (
        run.stage(f"round_{number}/{source.training}") as cost,
        Trainer(stage, run.config, run.strategy, run.tokenizer) as trainer,
    ):
        step = trainer.restore()
        source.restore(stage, trainer, step)
        run.metrics.rewind(stage.label, step)
        progress = Progress(
            total=stage.last,
            initial=step,
            desc=f"{stage.label}: {source.training}",
            unit="step",
            disable=not run.writes,
        )
        while step < stage.last:
            step += 1
            samples = source.batch(step)
            metrics, recorded = trainer.step(step, samples)
            metrics |= source.record(step, recorded)
            run.metrics.log(stage.label, step, metrics)
            if source.follows_policy and step < stage.last:
                source.sync()
            trainer.end_step(step, source.ahead)
            shown = {name: metrics[f"train/{key}"] for key, name in source.shown.items()}
            progress.set_postfix({name: f"{value:.3f}" for name, value in shown.items() if value is not None})
            progress.update()
            run.page.step()
        progress.close()
        source.measure(stage, trainer)
        trainer.write_policies()
        cost |= stage.clock.cost
    if run.writes:
        stage.facts["metrics"] = metrics_digest(run.folder, number)
    run.finish(number, source.training, stage.facts, source.files(number))


def evaluate_policy(run: Run, evaluator: Evaluator, number: int | None) -> dict[str, Any]:
    """evaluation.json of the policy after a round, or of the start (None). The engines load the policy, and prove that they
    hold it."""
    path = run.folder.round(number)
    if not run.finished(number, "evaluate"):
        policy = run.config.model.model_name_or_path if number is None else str(run.folder.policy(number))
        previous = None if number is None else run.policy_before(number)
        name = "start" if number is None else f"round {number}"
        with run.stage(f"{path.name}/evaluate") as cost:
            row = {"name": name, **evaluator.preferences(name, policy, path)}
            if run.samples:
                row["probe"] = evaluator.sync(name, policy, previous)
                row |= evaluator.samples(name, policy, path, cost)
            if run.writes:
                write_json(path / "evaluation.json", row | worst_case(run.folder, run.algorithm, number))
        run.finish(number, "evaluate", {}, ["evaluation.json", "held_out.jsonl", "samples.jsonl"])
        track_round(run.metrics, path, row)
    if number is not None:
        run.page.write_cards(number)
    return ranks.from_rank_0(read_json(path / "evaluation.json") if run.writes else None)


def write_results(run: Run, rows: list[dict[str, Any]]) -> None:
    """Write table.txt, with the verdict under the table, and report.html; print the table, where the policy is, and commands
    to go on with."""
    if not run.writes:
        return
    moments = read_moments(run.folder.path)
    table = "\n".join([results_table(rows, run.ledger.stages), *verdict(moments), ""])
    write_text(run.folder.path / "table.txt", table)
    report = run.page.end(moments)
    folder = run.config.ckpt.output_dir
    policy = os.path.join(folder, run.folder.round(run.numbers[-1]).name, "policy")
    start = quote(f"start={run.config.model.model_name_or_path}")
    models = f"--models {quote(folder)} {start} --out {quote(folder.rstrip('/') + '-leaderboard')}"
    following = f"openrlhf-sgpo evaluate --tasks ifeval {models}\n        vllm serve {quote(policy)}"
    if not run.algorithm.needs.reference:  # it judges, and does not chat
        following = f"openrlhf-sgpo train --oracle preference_model --reward.model_name_or_path {quote(policy)} ..."
    run.say(f"{table}\npolicy: {policy}\nreport: {report or 'not drawn'}\nnext:   {following}")
