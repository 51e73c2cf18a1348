"""``openrlhf-sgpo judge-check``: how far an oracle agrees with human preferences, and its position and length biases.

Imports no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from openrlhf_sgpo import flags, oracle
from openrlhf_sgpo.config import (
    DataSettings,
    DeepspeedSettings,
    Inference,
    JudgeSettings,
    ModelSettings,
    RewardSettings,
    TrainSettings,
)
from openrlhf_sgpo.data.files import is_file
from openrlhf_sgpo.data.records import Pair, fingerprint, load_pairs
from openrlhf_sgpo.flags import part, setting
from openrlhf_sgpo.inference import one_process, other_oracle, unread
from openrlhf_sgpo.intervals import scores, standard_error
from openrlhf_sgpo.oracle import Answer, Comparison, Oracle, PreferenceOracle, Question
from openrlhf_sgpo.oracle.base import check_shares
from openrlhf_sgpo.output import log_to, say
from openrlhf_sgpo.run_folder import RunFolder, write_json, write_jsonl, write_text
from openrlhf_sgpo.table import aligned

Z = 1.959964  # the normal distribution's 97.5% point

_LOCAL = ("ds.", "train.", "data.max_len")  # settings of models that this process loads


@dataclass
class JudgeCheckSettings:
    oracle: str = setting("judge", "the oracle that compares answers: as in training, but not implicit")
    out: str = setting("", "folder for judgements and results")
    trust_remote_code: bool = setting(False, "run code that a model repository ships; off unless you have read it")
    resume: bool = setting(False, "continue in --out, without requesting stored judgements again")
    data: DataSettings = part(DataSettings, "dataset", "dataset_split", "max_samples", "max_len")
    reward: RewardSettings = field(default_factory=RewardSettings)
    # Without swap: the difference between the two orders is to be measured, so both are always shown.
    judge: JudgeSettings = part(
        JudgeSettings,
        *("base_url", "model", "api_key", "concurrency", "max_retries", "timeout", "logprobs", "temperature"),
    )
    ds: DeepspeedSettings = part(one_process, "param_dtype", "attn_implementation")
    train: TrainSettings = part(TrainSettings, "micro_batch_size")

    def inference(self) -> Inference:
        """The settings as oracles read them."""
        model = ModelSettings(trust_remote_code=self.trust_remote_code)
        train = replace(self.train, batch_size=self.train.micro_batch_size)
        return Inference(model=model, data=self.data, reward=self.reward, judge=self.judge, ds=self.ds, train=train)


class PairShares(NamedTuple):
    """An oracle's probability that the answer shown first is the better one: with the human choice first, and with it second.
    An oracle that does not show answers in an order has chosen_second = 1 - chosen_first."""

    chosen_first: float
    chosen_second: float

    @property
    def verdict(self) -> float:
        """1[p > 1/2] + 1/2 1[p = 1/2], with p = (chosen_first + 1 - chosen_second) / 2 the probability of the human choice."""
        return scores([self.chosen_first - self.chosen_second])[0]  # the same without rounding


class Figure(NamedTuple):
    """A mean over ``n`` pairs with its 95% interval; None without pairs."""

    value: float | None
    interval: tuple[float, float] | None
    n: int


def share_of(points: Sequence[float]) -> Figure:
    """The mean of points in [0, 1] with Wilson's interval (JASA 22, 1927). That interval is for zeros and ones; with halves it
    can only be too wide."""
    n = len(points)
    if not n:
        return Figure(None, None, 0)
    mean = fmean(points)
    middle = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return Figure(mean, (max(0.0, middle - half), min(1.0, middle + half)), n)


def bias_of(values: Sequence[float]) -> Figure:
    """The mean of values of either sign; its interval, 1.96 standard errors to both sides, needs at least two values."""
    if not values:
        return Figure(None, None, 0)
    mean, error = fmean(values), standard_error(values)
    return Figure(mean, None if error is None else (mean - Z * error, mean + Z * error), len(values))


def agreement_figures(pairs: Sequence[Pair], shares: Sequence[PairShares], shows_orders: bool) -> dict[str, Figure]:
    """The figures of the table, by name. p: the probability of the human choice, see ``PairShares``; ties always count 1/2.
    Lengths are in characters; figures of length cover the pairs whose answers differ in length.

        agreement           share of pairs with p > 1/2
        chosen_first        the same with the human choice shown first: chosen_first > 1/2
        chosen_second       the same with the human choice shown second: chosen_second < 1/2
        position_bias       mean of (chosen_first + chosen_second) / 2 - 1/2, the advantage of the answer shown first
        flips               share of pairs in which the same position wins in both orders
        longer_preferred    P(the oracle prefers the longer answer)
        longer_chosen       P(people prefer the longer answer), also the agreement of the rule "the longer one wins"
        length_bias         longer_preferred - longer_chosen
        agreement_longer    agreement where people chose the longer answer
        agreement_shorter   agreement where people chose the shorter answer

    An oracle that does not show answers in an order has no figures of orders.
    """
    figures = {"agreement": share_of([share.verdict for share in shares])}
    if shows_orders:
        figures |= {
            "chosen_first": share_of(scores([first - 0.5 for first, _ in shares])),
            "chosen_second": share_of(scores([0.5 - second for _, second in shares])),
            "position_bias": bias_of([(first + second - 1) / 2 for first, second in shares]),
            "flips": share_of([float((first - 0.5) * (second - 0.5) > 0) for first, second in shares]),
        }
    gaps = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    where_longer = [share.verdict for gap, share in zip(gaps, shares, strict=True) if gap > 0]
    where_shorter = [share.verdict for gap, share in zip(gaps, shares, strict=True) if gap < 0]
    disagreements = [1 - verdict for verdict in where_shorter]  # here the oracle prefers the longer answer
    return figures | {
        "longer_preferred": share_of(where_longer + disagreements),
        "longer_chosen": share_of([1.0] * len(where_longer) + [0.0] * len(where_shorter)),
        "length_bias": bias_of([verdict - 1 for verdict in where_longer] + disagreements),
        "agreement_longer": share_of(where_longer),
        "agreement_shorter": share_of(where_shorter),
    }


def ask(judge: Oracle, pairs: Sequence[Pair]) -> tuple[list[PairShares], bool]:
    """The oracle's preference on each pair, in both orders if it shows answers in an order, and whether it does."""
    name = f"judge-check: {judge.name}"
    if not _shows_orders(judge):
        questions = [
            Question(pair.id, pair.prompt, (Answer(pair.chosen), Answer(pair.rejected)), pair.template_kwargs)
            for pair in pairs
        ]
        shares = [matrix[0][1] for matrix in judge.preferences(questions, name)]
        return [PairShares(share, 1 - share) for share in shares], False
    assert isinstance(judge, PreferenceOracle)
    comparisons = [
        Comparison(
            pair.id, pair.prompt, Answer(pair.chosen), Answer(pair.rejected), pair.template_kwargs.get("tools", ())
        )
        for pair in pairs
    ]
    orders = [order for comparison in comparisons for order in (comparison, comparison.swapped())]
    probabilities = check_shares(judge.name, orders, judge.compare(orders, name))
    return [PairShares(*both) for both in zip(probabilities[::2], probabilities[1::2], strict=True)], True


def _shows_orders(judge: Oracle) -> bool:
    """Whether it compares two answers at a time: then it defines compare or prefer, which the base class leaves open."""
    base = PreferenceOracle
    return isinstance(judge, base) and (type(judge).compare, type(judge).prefer) != (base.compare, base.prefer)


def agreement_table(figures: dict[str, Figure]) -> str:
    """A line per figure: its value, its 95% interval, and the number of pairs behind it."""
    lines = [["", "value", "95% interval", "pairs"]]
    for name, figure in figures.items():
        value = "-" if figure.value is None else f"{figure.value:.3f}"
        interval = "-" if figure.interval is None else "{:.3f} to {:.3f}".format(*figure.interval)
        lines.append([name.replace("_", " "), value, interval, str(figure.n)])
    return "\n".join(aligned(lines))


def check_judge(settings: JudgeCheckSettings) -> dict[str, Any]:
    """Asks the oracle, writes pairs.jsonl, judge_check.json and table.txt into --out, prints the table; returns the result.

    Raises ValueError for unreadable data, a server that does not answer, and a folder that belongs to something else.
    """
    config = settings.inference()
    data = settings.data
    loaded = load_pairs(data.dataset, data.dataset_split, data.max_samples)
    pairs = [pair for pair in loaded if pair.chosen != pair.rejected]
    if not pairs:
        raise ValueError(f"--data.dataset {data.dataset}: no pair has two different answers")
    oracle.get(settings.oracle).check(config)
    folder = RunFolder(settings.out, "out")
    resolved = flags.dump({"": replace(settings, resume=False)})
    folder.prepare(resolved, settings.resume, {"--data.dataset": fingerprint(loaded)})
    log_to(folder.path)
    with closing(_make(settings.oracle, config, folder.path)) as judge:
        shares, shows_orders = ask(judge, pairs)
    rows = zip(pairs, shares, strict=True)
    write_jsonl(folder.path / "pairs.jsonl", ({"id": pair.id, **share._asdict()} for pair, share in rows))
    notes = [] if shows_orders else ["the oracle shows no order, so its position bias is 0 by construction"]
    if len(pairs) < len(loaded):
        notes.append(f"{len(loaded) - len(pairs)} pairs of two equal answers are left out")
    if loaded.left_out:
        notes.append(f"{len(loaded.left_out)} rows are not pairs, such as {loaded.left_out[0]}")
    figures = agreement_figures(pairs, shares, shows_orders)
    models = (settings.judge.model, settings.reward.model_name_or_path, *settings.reward.heads)
    result = {
        "oracle": settings.oracle,
        "model": " ".join(filter(None, models)),
        "pairs": len(pairs),
        "figures": {name: figure._asdict() for name, figure in figures.items()},
        "notes": notes,
        "usage": judge.usage(),
    }
    write_json(folder.path / "judge_check.json", result)
    cost = ", ".join(f"{name} {value}" for name, value in judge.usage().items())
    text = "\n".join([agreement_table(figures), *notes, f"cost of this call: {cost}", ""])
    write_text(folder.path / "table.txt", text)
    say(text, end="")
    return result


def _make(name: str, config: Inference, folder: Path) -> Oracle:
    """The oracle. There is no policy: ``implicit`` is unavailable, and a user's oracle has neither chat nor scorer."""
    strategy: Any = None
    if name != "judge":  # a judge needs no strategy, which takes a while to build
        from openrlhf_sgpo.openrlhf import build_strategy

        strategy = build_strategy(config)
    missing: Any = None
    return oracle.get(name)(oracle.Resources(config, strategy, missing, missing, folder))


def load(argv: Sequence[str]) -> JudgeCheckSettings:
    """The settings from command-line arguments. Raises flags.SettingsError with every problem at once."""
    instances, origins, _ = flags.parse(argv, {"": JudgeCheckSettings})
    settings: JudgeCheckSettings = instances[""]
    required = {"data.dataset": (settings.data.dataset, "pairs that people chose"), "out": (settings.out, "a folder")}
    problems = [f"--{name}: missing, give {what}" for name, (value, what) in required.items() if not value]
    if settings.data.dataset_split and is_file(settings.data.dataset):
        problems.append(f"--data.dataset_split: {settings.data.dataset} is a file, which has no splits; leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("judge-check is one process: start it without a launcher")
    flags.refuse(problems + flags.out_of_range({"": settings}) + _oracle_problems(settings, origins))
    return settings


def _oracle_problems(settings: JudgeCheckSettings, origins: dict[str, str]) -> list[str]:
    if settings.oracle == "implicit":
        return ["--oracle: implicit is a policy's own reward; runs measure its agreement as held-out accuracy"]
    groups = ("reward.", "judge.", *(_LOCAL if settings.oracle == "judge" else ()))
    reasons = dict.fromkeys(groups, f"--oracle {settings.oracle} has no use for it")
    _, reads = other_oracle(settings.oracle)
    return [
        *unread(settings, JudgeCheckSettings(), origins, reasons, reads),
        *oracle.problems(settings.oracle, settings.inference()),
    ]
