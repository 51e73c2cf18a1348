"""The length-controlled win rate of AlpacaEval 2.0 (Dubois et al., arXiv 2404.04475), by alpaca-eval's own model.

The win probability of the answer to instruction i is sigmoid(a tanh((l_baseline - l_model) / std) + b d_i + c), with lengths l
in characters and d_i the instruction's difficulty; the rate is its mean without the first term. df_gamed.csv has the
difficulties, and judgements of the baseline prompted to be concise or verbose, so a is not fitted to the model alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openrlhf_sgpo.benchmarks.benchmark_files import Hub, locate, upstream

INSTRUCTIONS = 805
GAMED = Hub("tatsu-lab/alpaca_eval", "dataset", "df_gamed.csv", "2edc6fad8be6b14ea7230aabfd08188da6b8b814")
GAMED_SHA256 = "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d"
_COLUMNS = ("model", "index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


def gamed_file(flag: str, user_path: str, unverified: bool) -> tuple[Path, list[str]]:
    """df_gamed.csv, the user's or else the hub's (downloaded once, then from the hub's cache), and notes for the result.

    Raises ValueError if it cannot be had, does not have the form of the published file, or has another content; with
    ``unverified`` (the user's flag of that name beside ``flag``), the last is a note."""
    path = locate(flag, user_path, GAMED)
    _check_form(flag, path)
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual == GAMED_SHA256:
        return path, []
    what = f"{path} is not the published df_gamed.csv: its SHA-256 is {actual}, not {GAMED_SHA256}"
    if unverified:
        return path, [what]
    raise ValueError(f"--{flag}: {what}. Download it again, or give --{flag.partition('.')[0]}.unverified to use it")


def _check_form(flag: str, path: Path) -> None:
    import pandas

    remedy = "expected df_gamed.csv of the hub's dataset tatsu-lab/alpaca_eval"
    try:
        table = pandas.read_csv(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag}: {path} cannot be read ({error}); {remedy}") from error
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        raise ValueError(f"--{flag}: {path} has no column {', '.join(missing)}; {remedy}")
    # Upstream reads the difficulty of instruction i from row i.
    if table["index"].head(INSTRUCTIONS).tolist() != list(range(INSTRUCTIONS)):
        raise ValueError(f"--{flag}: {path} does not begin with the {INSTRUCTIONS} instructions in order; {remedy}")
    if table["not_gamed_baseline"].dtype != bool:
        raise ValueError(f"--{flag}: {path}: not_gamed_baseline is not True or False in each row; {remedy}")


def obstacle(annotations: Sequence[Mapping[str, Any]]) -> str:
    """Why these annotations have no length-controlled win rate; empty if they have one.

    Upstream checks nothing and joins difficulties by row: with too few rows, or other instructions, its rate is wrong.
    """
    if sorted(row["index"] for row in annotations) != list(range(INSTRUCTIONS)):
        return f"it is defined for all {INSTRUCTIONS} instructions only"
    if all(row["preference"] is None for row in annotations):
        return "no judgement is usable"
    if len({len(row["output_1"]) - len(row["output_2"]) for row in annotations}) == 1:
        return "all answers differ from the baseline's by the same length"
    return ""


def length_controlled_win_rate(annotations: Sequence[Mapping[str, Any]], gamed: Path) -> tuple[float, float]:
    """(rate, its standard error) in percent. annotations: in alpaca-eval's format, without an ``obstacle``, in any order; those
    whose preference is None are predicted, not fitted. gamed: path of df_gamed.csv."""
    metrics = upstream("alpaca_eval", "alpaca_eval.metrics")
    sklearn = upstream("alpaca_eval", "sklearn")
    rows = sorted(annotations, key=lambda row: row["index"])  # folds of the cross-validation depend on the order
    with _download_gives(gamed), sklearn.config_context():  # upstream changes the configuration of scikit-learn
        winrate = metrics.get_length_controlled_winrate(rows, save_weights_dir=None)
    return float(winrate["length_controlled_winrate"]), float(winrate["lc_standard_error"])


@contextmanager
def _download_gives(gamed: Path) -> Iterator[None]:
    """Replace upstream's download of df_gamed.csv, repeated in every fit, by this file: upstream takes no path."""
    module = upstream("alpaca_eval", "alpaca_eval.metrics.glm_winrate")
    download = module.hf_hub_download
    module.hf_hub_download = lambda **_: str(gamed)
    try:
        yield
    finally:
        module.hf_hub_download = download
