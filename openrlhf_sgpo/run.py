"""What every run has, whatever its loop: checked data, strategy, run folder, engines, evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from openrlhf_sgpo import flags, oracle, ranks
from openrlhf_sgpo.algorithms.base import Algorithm
from openrlhf_sgpo.algorithms.on_policy import OnPolicyAlgorithm
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.records import Pair, Prompt, fingerprint
from openrlhf_sgpo.data.report import require
from openrlhf_sgpo.data.run_data import inspect_run, load_policy_chat, load_run
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.evaluation.between_rounds import Evaluator
from openrlhf_sgpo.fork import check_source, take_over
from openrlhf_sgpo.ledger import Ledger
from openrlhf_sgpo.metrics import Metrics
from openrlhf_sgpo.openrlhf import build_strategy
from openrlhf_sgpo.output import log_to, say, stage_line
from openrlhf_sgpo.report import write_report
from openrlhf_sgpo.resume import accepted_changes
from openrlhf_sgpo.rollout import Rollout, check_rollout, start_rollout
from openrlhf_sgpo.run_check import check_rounds, forget_metrics
from openrlhf_sgpo.run_folder import METRICS, RunFolder, read_json, write_json, write_text
from openrlhf_sgpo.run_settings import samples
from openrlhf_sgpo.table import results_table
from openrlhf_sgpo.training.log_probs import check_layout
from openrlhf_sgpo.training.scoring import Scorer

PROBES = 16  # fixed texts that prove a weight sync


class Run:
    """One run of one algorithm; a loop derives from it and gives it ``execute``."""

    def __init__(self, config: Config, algorithm: type[Algorithm], options: Any):
        transformers_logging.disable_progress_bar()  # a bar per shard and stage would drown this package's own
        self.config = config
        self.algorithm = algorithm
        self.options = options
        self.folder = RunFolder(config.ckpt.output_dir)
        # Data is read before anything expensive, so that a bad row costs seconds.
        sampling = samples(config, algorithm)
        records = load_run(config, with_prompts=config.rounds.count > 0)
        if sampling:
            check_rollout(config)
        if sampling and not oracle.judges_itself(config, algorithm):
            oracle.get(config.oracle).check(config)
        source = RunFolder(config.ckpt.fork_from) if config.ckpt.fork_from else None
        self.chat, model = load_policy_chat(config, self.folder.moment(source))
        name, trust = config.model.model_name_or_path, config.model.trust_remote_code
        self.tokenizer = self.chat.tokenizer
        check_layout(config, model.get_text_config())
        reference = config.ref.model_name_or_path
        if sampling and reference != name:  # divergences and mixtures are over one vocabulary
            theirs = AutoConfig.from_pretrained(reference, trust_remote_code=trust).get_text_config().vocab_size
            if theirs != model.get_text_config().vocab_size:
                raise ValueError(
                    f"--ref.model_name_or_path {reference} has a vocabulary of {theirs} tokens, --model.model_name_or_path "
                    f"{name} one of {model.get_text_config().vocab_size}: their log-probabilities cannot be compared"
                )
        self.data = inspect_run(records, self.chat, config, self._room())
        if os.environ.get("RANK", "0") == "0":  # the strategy does not exist yet
            say("\n".join(report.text() for report in self.data.reports))
        require(self.data.reports)
        self.digests = {
            "--data.dataset": fingerprint(self.data.human.pairs),
            "--eval.dataset": fingerprint(records.held_out),  # those beyond --eval.max_samples too, which may change
            "--data.prompt_dataset": fingerprint(self.data.prompts.prompts),
        }
        if sampling and not oracle.judges_itself(config, algorithm):
            shown = [
                Prompt(one.id, one.prompt, template_kwargs=one.template_kwargs) for one in self.data.held_out.pairs
            ]
            oracle.get(config.oracle).check_prompts(config, self.data.prompts.prompts + shown)
        self._check_prompts()
        held_out = self._held_out()

        resolved = {"": replace(config, resume=False), algorithm.name: options}
        self.strategy = build_strategy(config)
        self.writes = self.strategy.is_rank_0()
        if len(set(ranks.gather(self.chat.template.moment))) > 1:
            raise ValueError(
                "the day (UTC) changed while the ranks started, and with it the date in prompts: start again"
            )
        ranks.on_rank_0(lambda: self._prepare_folder(resolved))
        log_to(self.folder.path)
        self.ledger = Ledger(self.folder.path / "ledger.json", self.writes)
        self.metrics = Metrics(self.folder.path, config, flags.to_dict(resolved), self.writes)
        self.scorer = Scorer(config, self.strategy, self.tokenizer.pad_token_id, self.folder.path / "log_probs")
        self.rollout: Rollout | None = None
        self.oracle: oracle.Oracle | None = None
        self.evaluator = Evaluator(
            config,
            self.scorer,
            self.chat,
            held_out,
            self._probes() if sampling else [],
            self._engine if sampling else None,
            self._frozen_oracle if sampling and not oracle.judges_itself(config, algorithm) else None,
            self.writes,
        )

    def _prepare_folder(self, resolved: dict[str, Any]) -> None:
        source = RunFolder(self.config.ckpt.fork_from) if self.config.ckpt.fork_from else None
        if source:
            check_source(source, self.folder, flags.to_dict(resolved), self.digests)
        accepted = accepted_changes(self.folder, self.config, self.algorithm, flags.dump(resolved))
        self.folder.prepare(flags.dump(resolved), self.config.resume, self.digests, self.chat.template, list(accepted))
        for key, (old, new) in accepted.items():
            say(f"--{key}: was {old!r}, from now on {new!r}")
        write_json(self.folder.path / "data_report.json", [report.to_dict() for report in self.data.reports])
        if source:
            take_over(source, self.folder)
        check_rounds(self.folder, policies=2 if self.config.rounds.judge_reference == "previous" else 1)
        for lost, known in {
            METRICS: not forget_metrics(self.folder),
            "ledger.json": self.folder.path.joinpath("ledger.json").exists()
            or not self.folder.finished(None, "evaluate"),
        }.items():
            if not known:
                say(f"{lost} is missing: what it said of finished stages is lost")

    def _check_prompts(self) -> None:
        """Raises ValueError if the prompts are too few for the run; called when data is known and nothing else is."""

    def _room(self) -> int:
        """Tokens that a prompt must leave within ``--data.max_len``."""
        return self.config.rollout.max_new_tokens

    def execute(self) -> list[dict[str, Any]]:
        """All stages that are not finished yet; returns the rows of the results table, start first."""
        raise NotImplementedError

    def _write_results(self, rows: list[dict[str, Any]]) -> None:
        """table.txt, which is also printed, and report.html; then where the policy is, and what can be done with it."""
        if self.writes:
            table = results_table(rows, self.ledger.stages)
            write_text(self.folder.path / "table.txt", table)
            report = write_report(self.folder.path)
            folder = self.config.ckpt.output_dir
            policy = os.path.join(folder, self._plan()[-1].partition("/")[0], "policy")
            self._say(f"{table}\npolicy: {policy}\nreport: {report}\n{self._next(folder, policy)}")

    def _next(self, folder: str, policy: str) -> str:
        """Commands that go on from here, ready to be pasted."""
        if not self.algorithm.needs.reference:  # it judges, and does not chat
            return (
                f"next:   openrlhf-sgpo train --oracle preference_model --reward.model_name_or_path {quote(policy)} ..."
            )
        start = quote(f"start={self.config.model.model_name_or_path}")
        models = f"--models {quote(folder)} {start} --out {quote(folder.rstrip('/') + '-leaderboard')}"
        return f"next:   openrlhf-sgpo evaluate --tasks ifeval {models}\n        vllm serve {quote(policy)}"

    def _close(self) -> None:
        self.metrics.close()
        if self.rollout:
            self.rollout.close()
        if self.oracle:
            self.oracle.close()

    def _evaluate(self, number: int | None) -> dict[str, Any]:
        """evaluation.json of the policy after a round, or of the start (None); also the moment at which the engines take it
        over."""
        path = self.folder.round(number)
        if self._finished(number, "evaluate"):
            return ranks.from_rank_0(read_json(path / "evaluation.json") if self.writes else None)
        with self._stage(f"{path.name}/evaluate") as cost:
            if number is None:
                row = self.evaluator.evaluate("start", self.config.model.model_name_or_path, None, path, cost)
            else:
                policy, previous = str(self.folder.policy(number)), self._policy_before(number)
                row = self.evaluator.evaluate(f"round {number}", policy, previous, path, cost)
        self._finish(number, "evaluate", {}, ["evaluation.json", "held_out.jsonl", "samples.jsonl"])
        return row

    def _policy_before(self, number: int) -> str:
        return self.config.model.model_name_or_path if number == 0 else str(self.folder.policy(number - 1))

    def _held_out(self) -> list[tuple[Pair, Group]]:
        """The held-out pairs as the algorithm sees them."""
        known = self.data.held_out
        pairs = self.algorithm.pairs(known.pairs, self.chat)
        tokens = ((pair, known.tokens_of(pair) or self.chat.pair(pair)) for pair in pairs)
        return [(pair, group) for pair, group in tokens if group is not None]

    def _probes(self) -> list[Group]:
        """Fixed texts for the weight probe; an engine wants room for one more token."""
        longest = self.config.data.max_len - 1
        candidates = self.data.held_out.groups[:PROBES] or self.data.human.groups[:PROBES]
        if not candidates:
            # A run on prompts alone: the end of a prompt is as good a text.
            return [Group(ids[:-4], (ids[-4:],)) for ids in self.data.prompts.tokens[:PROBES]]
        return [Group(group.prompt, (group.responses[0][: longest - len(group.prompt)],)) for group in candidates]

    def _engine(self, policy: str) -> Rollout:
        if self.rollout is None:
            self.rollout = start_rollout(self.config, self.chat, policy)
        self.rollout.load(policy)
        return self.rollout

    def _frozen_oracle(self) -> oracle.Oracle:
        """The oracle of --oracle. Where it is asked in every step its models stay in memory."""
        if self.oracle is None:
            path, resident = self.folder.path, issubclass(self.algorithm, OnPolicyAlgorithm)
            self.oracle = oracle.get(self.config.oracle)(
                oracle.Resources(
                    self.config, self.strategy, self.chat, self.scorer, path, resident, self.chat.template.moment
                )
            )
        return self.oracle

    def _finished(self, number: int | None, stage: str) -> bool:
        return ranks.from_rank_0(self.folder.finished(number, stage))

    def _finish(self, number: int | None, stage: str, facts: dict[str, Any], files: Iterable[str] = ()) -> None:
        if self.writes:
            self.folder.finish(number, stage, facts, files)
        ranks.barrier()

    def _plan(self) -> list[str]:
        """All stages of the run in their order, by their names in the ledger."""
        raise NotImplementedError

    @contextmanager
    def _stage(self, name: str) -> Iterator[dict[str, float]]:
        """A stage is announced; what it costs is yielded, and gets the tokens that it scored."""
        seconds = {done: entry["seconds"] for done, entry in self.ledger.stages.items() if "seconds" in entry}
        self._say(stage_line(name, self._plan(), seconds))
        before = self.scorer.tokens_scored
        with self.ledger.stage(name) as cost:
            yield cost
            cost["tokens_scored"] = cost.get("tokens_scored", 0) + self.scorer.tokens_scored - before

    def _name(self, model: str) -> str:
        """A policy of this run by its place in the run folder, so that the folder can be moved."""
        path = Path(model)
        return str(path.relative_to(self.folder.path)) if path.is_relative_to(self.folder.path) else model

    def _say(self, text: str) -> None:
        if self.writes:
            say(text)
