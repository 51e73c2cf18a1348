"""Drafts: answers of other models that a chain revises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_sgpo.data.files import DataError, listing, read_rows
from openrlhf_sgpo.data.inspection import prompt_key
from openrlhf_sgpo.data.messages import checked_text, question, template_kwargs
from openrlhf_sgpo.data.records import Prompt, Records, columns_of

_TEXTS = ("text", "output", "answer", "response", "completion")
_PROMPTS = ("prompt", "instruction")  # instruction: AlpacaEval's column


@dataclass(frozen=True)
class Draft:
    """An answer to revise. generator: the model that wrote it. truncated: a length limit stopped it."""

    text: str
    generator: str
    truncated: bool = False


def load_drafts(source: str, prompts: Records[Prompt] | None) -> tuple[Records[Prompt], dict[str, Draft]]:
    """The prompts, and the draft for each prompt id.

    A row has an answer, as ``text``, ``output``, ``answer``, ``response`` or ``completion``, and its prompt, as ``prompt`` or
    ``instruction``, or only the ``id`` of one of ``prompts``. From records of this package only the first answers of chains are
    read. prompts: None to take the prompts of the rows. Raises DataError for unusable rows, two answers to one prompt, and
    prompts without an answer.
    """
    rows: list[tuple[Prompt, Draft]] = []
    problems = []
    table = read_rows(source)
    for place, row in table.entries:
        try:
            if isinstance(row, DataError):
                raise row
            parsed = _parse(row, Path(source).stem)
            if parsed and not parsed[0].messages and prompts is None:
                raise DataError(f"missing column prompt; {columns_of(row)}; add it, or give --prompts")
            rows += [parsed] if parsed else []
        except DataError as error:
            problems.append((place, str(error)))
    if problems:
        lines, single = listing(source, table.unit, problems)
        raise DataError(f"{len(problems)} unusable drafts (correct or remove them):\n  " + "\n  ".join(lines), single)
    if not rows:
        raise DataError(
            f"--drafts {source}: no answers; from records of refine only the first answers of chains are read"
        )
    if prompts is not None:
        return prompts, _joined(source, rows, prompts)
    drafts: dict[str, Draft] = {}
    for number, (prompt, draft) in enumerate(rows):
        name = prompt.id or f"row-{number}"
        prompt.id = f"{name}#{number}" if name in drafts else name
        drafts[prompt.id] = draft
    return Records([prompt for prompt, _ in rows]), drafts


def _parse(row: Any, name: str) -> tuple[Prompt, Draft] | None:
    """The draft and its prompt, without id or messages where the row has none; None for a record of this package other than
    the first answer of a chain."""
    if not isinstance(row, dict):
        raise DataError(f"expected an object, found {type(row).__name__}")
    if "method" in row and (row["method"], row.get("depth")) != ("chain", 1):
        return None
    answer = next((column for column in _TEXTS if isinstance(row.get(column), str)), None)
    if answer is None:
        raise DataError(f"missing column {' or '.join(_TEXTS)}; {columns_of(row)}")
    column = next((column for column in _PROMPTS if row.get(column) is not None), None)
    if column is None and row.get("id") is None:
        raise DataError(f"missing column prompt or id; {columns_of(row)}")
    generator = checked_text(str(row.get("generator") or name), "generator")
    draft = Draft(checked_text(row[answer], answer), generator, row.get("truncated") is True)
    prompt_id = "" if row.get("id") is None else checked_text(str(row["id"]), "id")
    messages = [] if column is None else question(row, column)
    return Prompt(prompt_id, messages, template_kwargs=template_kwargs(row)), draft


def _joined(source: str, rows: list[tuple[Prompt, Draft]], prompts: Records[Prompt]) -> dict[str, Draft]:
    """The drafts by prompt id. Rows are matched by the text of their prompt, or by id if they have no prompt."""
    by_key: dict[Any, Draft] = {}
    for prompt, draft in rows:
        key = prompt_key(prompt.messages) if prompt.messages else prompt.id
        if key in by_key:
            raise DataError(
                f"--drafts {source}: two answers to one prompt ({prompt.id or prompt.messages}); keep one of them"
            )
        by_key[key] = draft
    drafts = {prompt.id: by_key.get(prompt_key(prompt.messages), by_key.get(prompt.id)) for prompt in prompts}
    missing = [name for name, draft in drafts.items() if draft is None]
    if missing:
        raise DataError(
            f"--drafts {source}: no answer to {len(missing)} of {len(prompts)} prompts, such as {', '.join(missing[:5])}; add "
            "them, or leave --prompts out to refine all drafts"
        )
    return {name: draft for name, draft in drafts.items() if draft is not None}
