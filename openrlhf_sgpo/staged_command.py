"""The shared base of ``compare`` and ``refine``: policies on disk answer prompts, an oracle compares the answers, in stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from transformers.utils import logging as transformers_logging

from openrlhf_sgpo import oracle
from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.data.inspection import inspect_prompts
from openrlhf_sgpo.data.records import Prompt, Records
from openrlhf_sgpo.data.report import DataReport, require
from openrlhf_sgpo.data.template import refuse_unread_variables, template_arguments
from openrlhf_sgpo.data.tokens import load_chat
from openrlhf_sgpo.ledger import Ledger, stage_rows
from openrlhf_sgpo.openrlhf import build_strategy
from openrlhf_sgpo.oracle import Oracle, Resources
from openrlhf_sgpo.output import log_to, say
from openrlhf_sgpo.rollout import Rollout, check_rollout, start_rollout
from openrlhf_sgpo.run_folder import RunFolder, write_json
from openrlhf_sgpo.training.scoring import Scorer

Row = dict[str, Any]


class Settings(Protocol):
    """The settings that both commands have. oracle: its name, empty for none."""

    out: str
    oracle: str
    trust_remote_code: bool
    resume: bool


class StagedCommand:
    """Base of both commands. Problems of data, folders and servers are found before a model is loaded: a constructor calls that
    of this class, then ``read_prompts``, which sets ``prompts`` and their ``tokens``, and then ``begin``.

    model: folder or hub name of the model whose chat format is used; name: its name in messages.
    """

    def __init__(self, settings: Settings, config: Inference, model: str, name: str):
        transformers_logging.disable_progress_bar()
        self.config = config
        self._settings = settings
        check_rollout(config)
        if settings.oracle:
            oracle.get(settings.oracle).check(config)
        self.folder = RunFolder(settings.out, "out")
        variables = template_arguments(config.data.chat_template_kwargs)
        self.chat, _ = load_chat(
            *(model, settings.trust_remote_code, name, config.data.max_len, variables, self.folder.moment())
        )
        refuse_unread_variables([self.chat.template])
        self.rollout: Rollout | None = None

    def read_prompts(self, records: Records[Prompt], name: str, room: int) -> None:
        """Inspect the prompts and print the report, which calls them ``name``. room: tokens reserved for an answer. Raises
        DataError if a limit is exceeded, ValueError for a prompt that the oracle cannot read."""
        inspected = inspect_prompts(records, self.chat, self.config.data.limits, name=name, room=room)
        self.report: DataReport = inspected.report
        say(self.report.text())
        require([self.report])
        self.prompts, self.tokens = inspected.prompts, inspected.tokens
        if self._settings.oracle:
            oracle.get(self._settings.oracle).check_prompts(self.config, self.prompts)

    def begin(self, resolved: str, digests: Mapping[str, str]) -> None:
        """Create the folder, or resume in it. resolved: the settings as YAML; digests: hashes of the data, by flag. Raises
        ValueError if the folder belongs to something else."""
        path = self.folder.path
        self.folder.prepare(resolved, self._settings.resume, dict(digests), self.chat.template)
        log_to(path)
        write_json(path / "data_report.json", [self.report.to_dict()])
        self.strategy = build_strategy(self.config)
        pad = self.chat.tokenizer.pad_token_id
        self.scorer = Scorer(self.config, self.strategy, pad, path / "log_probs")
        self.ledger = Ledger(path / "ledger.json", writes=True)

    def stage(
        self, name: str, work: Callable[[dict[str, float]], list[Row]], usage: Callable[[], dict[str, int]] = dict
    ) -> list[Row]:
        """The rows of a stage, computed only if they do not exist yet, see ``ledger.stage_rows``."""
        return stage_rows(self.folder.path, self.ledger, name, work, usage)

    def engine(self, folder: str) -> Rollout:
        """The rollout engine with the weights in ``folder``; the first call starts it."""
        if self.rollout is None:
            self.rollout = start_rollout(self.config, self.chat, folder)
        self.rollout.load(folder)
        return self.rollout

    def close_engine(self) -> None:
        """End the engine, whose memory scoring and an oracle may need."""
        if self.rollout:
            self.rollout.close()

    def make_oracle(self) -> Oracle:
        """The oracle of --oracle; its models stay in memory until it is closed."""
        return oracle.get(self._settings.oracle)(
            Resources(
                self.config,
                self.strategy,
                self.chat,
                self.scorer,
                self.folder.path,
                resident=True,
                moment=self.chat.template.moment,
            )
        )
