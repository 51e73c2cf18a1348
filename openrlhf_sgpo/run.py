"""What a run works with, whatever its algorithm: checked data, strategy, run folder, ledger, engines and oracle."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from openrlhf_sgpo import flags, oracle, ranks, shared_files
from openrlhf_sgpo.algorithms.base import Algorithm
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.records import Prompt, fingerprint
from openrlhf_sgpo.data.report import require
from openrlhf_sgpo.data.run_data import RunRecords, inspect_run, load_policy_chat, load_run
from openrlhf_sgpo.data.tokens import ChatFormat
from openrlhf_sgpo.fork import check_source, take_over
from openrlhf_sgpo.integrity import model_digest
from openrlhf_sgpo.ledger import Ledger
from openrlhf_sgpo.metrics import Metrics
from openrlhf_sgpo.openrlhf import build_strategy
from openrlhf_sgpo.output import log_to, say, stage_line
from openrlhf_sgpo.report.live import LivePage
from openrlhf_sgpo.resume import accepted_changes
from openrlhf_sgpo.rollout import Rollout, check_rollout, start_rollout
from openrlhf_sgpo.rollout.roles import prompt_room
from openrlhf_sgpo.run_check import check_rounds, forget_metrics
from openrlhf_sgpo.run_folder import LOCK, METRICS, RunFolder, write_json
from openrlhf_sgpo.run_settings import samples
from openrlhf_sgpo.training.scoring import Scorer


class Run:
    """One run of one algorithm. ``__init__`` reads and checks everything that is cheap, ``open`` starts the rest."""

    def __init__(self, config: Config, algorithm: type[Algorithm[Any]], options: Any):
        transformers_logging.disable_progress_bar()  # a bar per shard and stage would drown this package's own
        self.config = config
        self.algorithm = algorithm
        self.options = options
        self.folder = RunFolder(config.ckpt.output_dir)
        self.samples = samples(config, algorithm)
        self.has_oracle = self.samples and not oracle.judges_itself(config, algorithm)  # the same for the whole run
        self.strategy = build_strategy(config)
        self.writes: bool = self.strategy.is_rank_0()
        # Data is read before anything expensive, so that a bad row costs seconds.
        records, self.chat = ranks.on_rank_0(self._read)
        self.tokenizer = self.chat.tokenizer
        room = prompt_room(algorithm, options, config, self.chat)
        self.data = inspect_run(records, self.chat, config, room)
        if self.writes:
            say("\n".join(report.text() for report in self.data.reports))
        require(self.data.reports)
        self.digests = {
            "--data.dataset": fingerprint(self.data.human.pairs),
            "--eval.dataset": fingerprint(records.held_out),  # those beyond --eval.max_samples too, which may change
            "--data.prompt_dataset": fingerprint(self.data.prompts.prompts),
            **ranks.on_rank_0(self._model_digests),
        }
        if self.has_oracle:
            held_out = [
                Prompt(pair.id, pair.prompt, template_kwargs=pair.template_kwargs) for pair in self.data.held_out.pairs
            ]
            prompts = self.data.prompts.prompts + held_out
            ranks.on_rank_0(lambda: oracle.get(config.oracle).check_prompts(config, prompts))

    def _read(self) -> tuple[RunRecords, ChatFormat]:
        """What rank 0 reads of files before a run, with the checks of files."""
        config = self.config
        records = load_run(config, with_prompts=config.rounds.count > 0)
        if self.samples:
            check_rollout(config, self.mixed_reference)
        if self.has_oracle:
            oracle.get(config.oracle).check(config)
        chat, model = load_policy_chat(config, self.folder.moment(self._source()))
        if self.samples:
            self._check_reference(model.get_text_config().vocab_size)
        return records, chat

    def _model_digests(self) -> dict[str, str]:
        """Of policy and reference, where they are folders, by flag. A reward model may be replaced by an undamaged copy."""
        models = {
            "--model.model_name_or_path": self.config.model.model_name_or_path,
            "--ref.model_name_or_path": self.config.ref.model_name_or_path,
        }
        return {flag: model_digest(Path(name)) for flag, name in models.items() if os.path.isdir(name)}

    def open(self, numbers: Sequence[int], plan: Sequence[str]) -> None:
        """Create or resume the run folder. numbers: of the rounds. plan: all stages of the
        run in order, by their names in the ledger. Collective."""
        config = self.config
        self.numbers = numbers
        self.plan = plan
        resolved = {"": replace(config, resume=False), self.algorithm.name: self.options}
        ranks.on_rank_0(lambda: self._prepare_folder(resolved))
        if shared_files.seen(self.folder.path / LOCK)[self.strategy.get_rank()]:
            log_to(self.folder.path)
        self.ledger = Ledger(self.folder.path / "ledger.json", self.writes)
        self.metrics = Metrics(self.folder.path, config, flags.to_dict(resolved), self.writes)
        self.page = LivePage(self.folder.path, self.writes)
        # Models stay in memory from stage to stage, but not on a GPU, whose memory engines need in between.
        resident, pad = not torch.cuda.is_available(), self.tokenizer.pad_token_id
        self.scorer = Scorer(config, self.strategy, pad, self.folder.path / "log_probs", resident)
        self._rollout: Rollout | None = None
        self._oracle: oracle.Oracle | None = None

    def close(self) -> None:
        """End what the run started."""
        self.page.close()
        self.metrics.close()
        self.scorer.close()
        if self._rollout:
            self._rollout.close()
        if self._oracle:
            self._oracle.close()

    def start_engines(self) -> None:
        """Start vLLM's engines, on a CPU in the background, if the run is going to ask them. Collective."""
        if self.samples and self.config.rollout.engine == "vllm" and not self.finished(self.numbers[-1], "evaluate"):
            start = self.config.model.model_name_or_path
            self._rollout = start_rollout(self.config, self.chat, start, self.mixed_reference)

    @property
    def mixed_reference(self) -> str:
        """The reference, if some answers are sampled from its mixture with the policy."""
        return self.config.ref.model_name_or_path if self.algorithm(self.options, self.config.model.beta).shares else ""

    def engine(self, policy: str) -> Rollout:
        """The rollout engines, which hold this policy from now on. Collective."""
        if self._rollout is None:
            self._rollout = start_rollout(self.config, self.chat, policy, self.mixed_reference)
        self._rollout.load(policy)
        return self._rollout

    def frozen_oracle(self) -> oracle.Oracle:
        """The oracle of --oracle, the same for the whole run. Where it is asked in every step its models stay in memory."""
        if self._oracle is None:
            self._oracle = oracle.get(self.config.oracle)(self.resources(resident=self.algorithm.fresh_answers))
        return self._oracle

    def resources(self, resident: bool = False) -> oracle.Resources:
        """What an oracle works with."""
        return oracle.Resources(
            self.config, self.strategy, self.chat, self.scorer, self.folder.path, resident, self.chat.template.moment
        )

    def policy_before(self, number: int) -> str:
        """The policy with which a round begins."""
        first = number == self.numbers[0]
        return self.config.model.model_name_or_path if first else str(self.folder.policy(number - 1))

    def name_of(self, model: str) -> str:
        """A policy of this run by its place in the run folder, so that the folder can be moved."""
        path = Path(model)
        return str(path.relative_to(self.folder.path)) if path.is_relative_to(self.folder.path) else model

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, float]]:
        """Announce a stage. Yields its cost, to which the block adds; the tokens that it scored are added at the end."""
        seconds = {done: entry["seconds"] for done, entry in self.ledger.stages.items() if "seconds" in entry}
        line = stage_line(name, self.plan, seconds)
        self.say(line)
        self.page.begin_stage(line, self.plan.index(name), len(self.plan))
        before = self.scorer.tokens_scored
        with self.ledger.stage(name) as cost:
            yield cost
            cost["tokens_scored"] = cost.get("tokens_scored", 0) + self.scorer.tokens_scored - before

    def finished(self, number: int | None, stage: str) -> bool:
        return ranks.on_rank_0(lambda: self.folder.finished(number, stage))

    def finish(self, number: int | None, stage: str, facts: dict[str, Any], files: Iterable[str] = ()) -> None:
        if self.writes:
            self.folder.finish(number, stage, facts, files)
        ranks.barrier()

    def say(self, text: str) -> None:
        if self.writes:
            say(text)

    def _source(self) -> RunFolder | None:
        return RunFolder(self.config.ckpt.fork_from) if self.config.ckpt.fork_from else None

    def _check_reference(self, vocabulary: int) -> None:
        """Divergences and mixtures are over one vocabulary."""
        name, reference = self.config.model.model_name_or_path, self.config.ref.model_name_or_path
        if reference == name:
            return
        model = AutoConfig.from_pretrained(reference, trust_remote_code=self.config.model.trust_remote_code)
        size = model.get_text_config().vocab_size
        if size != vocabulary:
            raise ValueError(
                f"--ref.model_name_or_path {reference} has a vocabulary of {size} tokens, --model.model_name_or_path {name} "
                f"one of {vocabulary}: their log-probabilities cannot be compared"
            )

    def _prepare_folder(self, resolved: dict[str, Any]) -> None:
        source = self._source()
        if source:
            check_source(source, self.folder, flags.to_dict(resolved), self.digests)
        accepted = accepted_changes(self.folder, self.config, self.algorithm, flags.dump(resolved))
        self.folder.prepare(flags.dump(resolved), self.config.resume, self.digests, self.chat.template, list(accepted))
        for key, (old, new) in accepted.items():
            say(f"--{key}: was {old!r}, from now on {new!r}")
        write_json(self.folder.path / "data_report.json", [report.to_dict() for report in self.data.reports])
        if source:
            take_over(source, self.folder)
        algorithm = self.algorithm(self.options, self.config.model.beta)
        judged_by = 2 if self.config.rounds.judge_reference == "previous" else 1
        check_rounds(self.folder, policies=max(judged_by, algorithm.reference_rounds))
        for lost, known in {
            METRICS: not forget_metrics(self.folder),
            "ledger.json": self.folder.path.joinpath("ledger.json").exists()
            or not self.folder.finished(None, "evaluate"),
        }.items():
            if not known:
                say(f"{lost} is missing: its figures of finished stages are lost")
