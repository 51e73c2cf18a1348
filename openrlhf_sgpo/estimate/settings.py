"""Settings of ``openrlhf-sgpo estimate``, beside those of the run that it describes. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from openrlhf_sgpo import flags, run_settings
from openrlhf_sgpo.algorithms import AlgorithmType
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.files import check_data_source, count_rows
from openrlhf_sgpo.estimate.devices import KNOWN
from openrlhf_sgpo.flags import setting

PREFIX = "estimate"
FOLDER = "runs/estimate"  # stands for --ckpt.output_dir, which an estimate does not need
PROMPT, RESPONSE = 200, 250  # tokens, where nothing says how many


@dataclass
class EstimateSettings:
    gpu: str = setting("", f"GPU, one of {', '.join(KNOWN)} (default: what this machine has)")
    gpus: int = setting(0, "GPUs, each with a rank (0: those of this machine, or 1 with --estimate.gpu)", low=0)
    pairs: int = setting(0, "human pairs, if --data.dataset is not a file whose rows can be counted", low=0)
    prompts: int = setting(0, "prompts, if --data.prompt_dataset is not such a file", low=0)
    prompt_tokens: int = setting(0, f"mean tokens of a prompt (0: {PROMPT}, at most what --data.max_len leaves)", low=0)
    response_tokens: int = setting(
        0, f"mean tokens of a response (0: {RESPONSE}, at most --rollout.max_new_tokens)", low=0
    )
    utilisation: float = setting(0.35, "share of the GPU's operations that training and scoring use", above=0, high=1)
    bandwidth_share: float = setting(0.5, "share of the memory's bandwidth that sampling uses", above=0, high=1)
    from_run: str = setting(
        "", "run folder on the same machines: take the speeds of its ledger in place of assumed ones"
    )
    json: bool = setting(False, "print JSON")


class Asked(NamedTuple):
    """The run, its algorithm with options, and what the estimate is to assume."""

    config: Config
    algorithm: AlgorithmType
    options: Any
    settings: EstimateSettings


def load(argv: Sequence[str]) -> Asked:
    """Parse command-line arguments: flags of ``train``, and those of ``EstimateSettings`` as ``--estimate.NAME``. Raises
    flags.SettingsError with all problems at once, DataError for a data file that is not there."""
    algorithm, parsed = run_settings.read(argv, {PREFIX: EstimateSettings})
    config: Config = parsed.instances[""]
    settings: EstimateSettings = parsed.instances[PREFIX]
    config.ckpt.output_dir = config.ckpt.output_dir or FOLDER
    run_settings.complete(algorithm, parsed)
    for name, source, split, wanted in (
        ("pairs", config.data.dataset, config.data.dataset_split, not algorithm.fresh_answers),
        ("prompts", config.data.prompt_dataset, config.data.prompt_split, config.rounds.count > 0),
    ):
        if source and wanted and not getattr(settings, name):
            check_data_source(source, split)
            setattr(settings, name, count_rows(source) or 0)
    if config.data.max_samples:
        settings.pairs = min(settings.pairs or config.data.max_samples, config.data.max_samples)
    flags.refuse(flags.out_of_range({PREFIX: settings}, (PREFIX,)) + _problems(config, algorithm, settings))
    return Asked(config, algorithm, parsed.instances[algorithm.name], settings)


def _problems(config: Config, algorithm: AlgorithmType, settings: EstimateSettings) -> list[str]:
    problems = []
    if settings.gpu and settings.gpu not in KNOWN:
        problems.append(f"--{PREFIX}.gpu: {settings.gpu} is unknown, choose one of {', '.join(KNOWN)}")
    if config.ds.attn_implementation == "eager":
        problems.append(
            "--ds.attn_implementation: eager keeps a matrix of all pairs of tokens, for which estimate has no formula; use sdpa"
        )
    if not algorithm.fresh_answers and not (config.seed.size or settings.pairs):
        problems.append(
            f"--{PREFIX}.pairs: missing, the rows of --data.dataset {config.data.dataset} cannot be counted"
        )
    counted = settings.prompts or sum(config.rounds.prompts)
    if config.rounds.count and not algorithm.fresh_answers and not counted:
        problems.append(
            f"--{PREFIX}.prompts: missing, the rows of --data.prompt_dataset {config.data.prompt_dataset} cannot be counted"
        )
    if settings.from_run and settings.gpu:
        problems.append(
            f"--{PREFIX}.from_run: has the speed of the machines of that run, --{PREFIX}.gpu names others; leave one out"
        )
    return problems
