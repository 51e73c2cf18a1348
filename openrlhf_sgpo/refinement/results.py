"""The results of a refinement: a row per answer, files in AlpacaEval's format, figures by depth, and their table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

from openrlhf_sgpo.data.messages import template_columns
from openrlhf_sgpo.data.records import Answer
from openrlhf_sgpo.intervals import half_of, standard_error
from openrlhf_sgpo.refinement.preferences import OPPONENTS, Answers
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


def answer_rows(answers: Answers, best: Sequence[int], model: str, follower_prompt: str) -> Iterator[Row]:
    """A row for each answer to a prompt. best: index of the best sample by depth, empty if unknown. model: the name of the
    model, which wrote every answer but drafts. follower_prompt: the instruction for revisions.

    chain: depth, and the answer that it revised. iid: index from 1, and the smallest depth whose budget includes it, if any.
    best_of_n: depth, and the index among the ``samples`` within the depth's budget. total_tokens: tokens of all answers needed
    for this one.
    """
    prompt = answers.prompt

    def row(name: str, role: str, sample: Answer, total: int, **columns: Any) -> Row:
        method = name.partition("/")[0]
        return {
            "answer_id": f"{prompt.id}/{name}",
            "id": prompt.id,
            "prompt": prompt.messages,
            **template_columns(prompt.template_kwargs),
            "method": method,
            "role": role,
            "depth": None,
            "index": None,
            "samples": None,
            "parent_id": None,
            "follower_prompt": None,
            "generator": model,
            **sample.to_row(),
            "total_tokens": total,
            **columns,
        }

    totals = list(accumulate(sample.tokens for sample in answers.chain))
    for depth, (sample, total) in enumerate(zip(answers.chain, totals, strict=True), start=1):
        if depth > 1:
            parent = {"parent_id": f"{prompt.id}/chain/{depth - 1}", "follower_prompt": follower_prompt}
            yield row(f"chain/{depth}", "follower", sample, total, depth=depth, **parent)
        elif answers.draft_by:
            yield row("chain/1", "draft", sample, total, depth=1, generator=answers.draft_by)
        else:
            yield row("chain/1", "leader", sample, total, depth=1)
    totals = list(accumulate(sample.tokens for sample in answers.samples))
    for index, (sample, total) in enumerate(zip(answers.samples, totals, strict=True), start=1):
        smallest = next((depth for depth, count in enumerate(answers.counts, start=1) if count >= index), None)
        yield row(f"iid/{index}", "leader", sample, total, depth=smallest, index=index)
    for depth, (index, count) in enumerate(zip(best, answers.counts, strict=bool(best)), start=1):
        columns = {"depth": depth, "index": index + 1, "samples": count}
        yield row(f"best_of_n/{depth}", "leader", answers.samples[index], totals[count - 1], **columns)


def alpaca_eval_outputs(rows: Sequence[Row], dataset: str) -> dict[str, list[Row]]:
    """Outputs of chains and best samples in AlpacaEval's format, by file name; only for prompts of a single user message.
    dataset: the source of the prompts."""
    files: dict[str, list[Row]] = {}
    for row in rows:
        (first, *later), depth = row["prompt"], row["depth"]
        if row["method"] == "iid" or later or first["role"] != "user":
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
    """Means over the prompts, a row per depth; preferences with their standard errors. Unmeasured figures are None."""
    rows = []
    for level in range(len(answers[0].chain)):
        current = [record.chain[level] for record in answers]
        chains = [record.chain[: level + 1] for record in answers]
        controls = [record.samples[: record.counts[level]] for record in answers if record.samples]
        row: Row = {
            "depth": level + 1,
            "answer_tokens": fmean(sample.tokens for sample in current),
            "truncated": fmean(sample.truncated for sample in current),
            "total_tokens": fmean(sum(sample.tokens for sample in chain) for chain in chains),
            "samples": fmean(map(len, controls)) if controls else None,
            "sample_tokens": fmean(sum(sample.tokens for sample in samples) for samples in controls)
            if controls
            else None,
        }
        for name in (f"over_{opponent}" for opponent in OPPONENTS):
            values = [item[name] for item in preferences if item["depth"] == level + 1 and item[name] is not None]
            row[name] = fmean(values) if values else None
            row[f"{name}_error"] = standard_error(values)
        rows.append(row)
    return rows


def refinement_table(rows: Sequence[Row]) -> str:
    """One line per depth, without empty columns."""
    shown = [name for name in _TITLES if any(row[name] is not None for row in rows)]
    lines = [["depth", *(_TITLES[name] for name in shown)]]
    for row in rows:
        lines.append([str(row["depth"]), *(_cell(row, name) for name in shown)])
    return "\n".join([*aligned(lines, left=()), _NOTE]) + "\n"


def _cell(row: Row, name: str) -> str:
    if not name.startswith("over_"):
        return plus_minus(row[name], None, 1)
    return plus_minus(row[name], half_of(row, name), 3)
