"""What a refinement leaves: a row for every answer, files in AlpacaEval's format, figures by depth, and their table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from openrlhf_sgpo.data.messages import template_columns
from openrlhf_sgpo.intervals import half_of, standard_error
from openrlhf_sgpo.refinement.preferences import OPPONENTS, Answers
from openrlhf_sgpo.rollout.base import Sample
from openrlhf_sgpo.table import PLUS_MINUS, aligned, plus_minus

Row = dict[str, Any]

_TITLES = {
    "answer_tokens": "tokens",
    "total_tokens": "in total",
    "over_first": "over the first",
    "over_previous": "over the one before",
    "samples": "samples",
    "sample_tokens": "their tokens",
    "over_iid": "over one of them",
    "over_best_of_n": "over the best",
}
_NOTE = f"""tokens: of an answer, mean; in total: of the chain up to it; samples: independent answers that these pay for
over ...: mean preference of the oracle for the chain's answer; {PLUS_MINUS}, over the prompts"""


@dataclass(frozen=True)
class Writers:
    """Who wrote what. model: every answer but first ones that are drafts. dataset: where the prompts are from.
    follower_prompt: what the model was told about a draft."""

    model: str
    dataset: str
    follower_prompt: str


def answer_rows(one: Answers, best: Sequence[int], by: Writers) -> Iterator[Row]:
    """A row for each answer to a prompt. best: by depth the index of the best sample, empty if that is not known.

    chain: depth, and the answer that it revised. iid: index from 1, and the least depth whose tokens pay for it, if any does.
    best_of_n: depth, and the index among as many ``samples`` as that depth pays for. total_tokens: of all answers that it
    took to get there.
    """

    def row(name: str, role: str, sample: Sample, total: int, **own: Any) -> Row:
        method = name.partition("/")[0]
        return {
            "answer_id": f"{one.prompt.id}/{name}",
            "id": one.prompt.id,
            "prompt": one.prompt.messages,
            **template_columns(one.prompt.template_kwargs),
            "method": method,
            "role": role,
            "depth": None,
            "index": None,
            "samples": None,
            "parent_id": None,
            "follower_prompt": None,
            "generator": by.model,
            **sample.to_row(),
            "total_tokens": total,
            **own,
        }

    totals = list(accumulate(sample.tokens for sample in one.chain))
    for depth, (sample, total) in enumerate(zip(one.chain, totals, strict=True), start=1):
        if depth > 1:
            parent = {"parent_id": f"{one.prompt.id}/chain/{depth - 1}", "follower_prompt": by.follower_prompt}
            yield row(f"chain/{depth}", "follower", sample, total, depth=depth, **parent)
        elif one.draft_by:
            yield row("chain/1", "draft", sample, total, depth=1, generator=one.draft_by)
        else:
            yield row("chain/1", "leader", sample, total, depth=1)
    totals = list(accumulate(sample.tokens for sample in one.samples))
    for index, (sample, total) in enumerate(zip(one.samples, totals, strict=True), start=1):
        pays = next((depth for depth, count in enumerate(one.counts, start=1) if count >= index), None)
        yield row(f"iid/{index}", "leader", sample, total, depth=pays, index=index)
    for depth, (place, count) in enumerate(zip(best, one.counts, strict=bool(best)), start=1):
        own = {"depth": depth, "index": place + 1, "samples": count}
        yield row(f"best_of_n/{depth}", "leader", one.samples[place], totals[count - 1], **own)


def alpaca_eval_outputs(found: Sequence[Row], dataset: str) -> dict[str, list[Row]]:
    """Outputs of chains and best samples in AlpacaEval's format, by file name; prompts of several messages have none."""
    files: dict[str, list[Row]] = {}
    for row in found:
        (first, *others), depth = row["prompt"], row["depth"]
        if row["method"] == "iid" or others or first["role"] != "user":
            continue
        best = row["method"] == "best_of_n"
        generator = row["generator"] + ("-best-of-n" if best else "")
        if best or row["role"] == "follower":
            generator += f"-depth-{depth}"
        files.setdefault(f"alpaca_eval_{'best_of_n_' if best else ''}depth_{depth}.json", []).append(
            {"instruction": first["content"], "output": row["text"], "generator": generator, "dataset": dataset}
        )
    return files


def figures_by_depth(answers: Sequence[Answers], preferences: Sequence[Row]) -> list[Row]:
    """Means over the prompts, a row per depth; preferences with their standard errors. What was not measured is None."""
    found = []
    for place in range(len(answers[0].chain)):
        sampled = [one for one in answers if one.samples]
        row: Row = {
            "depth": place + 1,
            "answer_tokens": fmean(one.chain[place].tokens for one in answers),
            "truncated": fmean(one.chain[place].truncated for one in answers),
            "total_tokens": fmean(sum(sample.tokens for sample in one.chain[: place + 1]) for one in answers),
            "samples": fmean(one.counts[place] for one in sampled) if sampled else None,
            "sample_tokens": fmean(sum(sample.tokens for sample in one.samples[: one.counts[place]]) for one in sampled)
            if sampled
            else None,
        }
        for name in (f"over_{opponent}" for opponent in OPPONENTS):
            values = [one[name] for one in preferences if one["depth"] == place + 1 and one[name] is not None]
            row[name] = fmean(values) if values else None
            row[f"{name}_error"] = standard_error(values)
        found.append(row)
    return found


def refinement_table(found: Sequence[Row]) -> str:
    """One line per depth, with the columns that hold something."""
    shown = [name for name in _TITLES if any(row[name] is not None for row in found)]
    lines = [["depth", *(_TITLES[name] for name in shown)]]
    for row in found:
        lines.append([str(row["depth"]), *(_cell(row, name) for name in shown)])
    return "\n".join([*aligned(lines, left=()), _NOTE]) + "\n"


def _cell(row: Row, name: str) -> str:
    if not name.startswith("over_"):
        return plus_minus(row[name], None, 1)
    return plus_minus(row[name], half_of(row, name), 3)
