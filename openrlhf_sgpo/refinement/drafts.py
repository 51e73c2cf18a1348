"""First answers from elsewhere: answers of other models, which a chain then revises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_sgpo.data.files import DataError, listing, read_rows
from openrlhf_sgpo.data.inspection import prompt_key
from openrlhf_sgpo.data.messages import Messages, checked_text, question, template_kwargs
from openrlhf_sgpo.data.records import Prompt, Records

_TEXTS = ("text", "output", "answer", "response", "completion")
_PROMPTS = ("prompt", "instruction")  # the second is AlpacaEval's


@dataclass(frozen=True)
class Draft:
    """generator: who wrote it. truncated: a length limit stopped it."""

    text: str
    generator: str
    truncated: bool = False


@dataclass(frozen=True)
class _Row:
    id: str | None
    messages: Messages | None
    template_kwargs: dict[str, Any]
    draft: Draft


def load_drafts(source: str, prompts: Records[Prompt] | None) -> tuple[Records[Prompt], dict[str, Draft]]:
    """The prompts, and the draft of each by the prompt's id.

    A row has an answer, as ``text``, ``output``, ``answer``, ``response`` or ``completion``, and its prompt, as ``prompt`` or
    ``instruction``, or only the ``id`` of one of ``prompts``. Of this package's own records the first answers of chains count.
    prompts: None if they are to be those of the rows. Raises DataError for rows that cannot be used, two answers to one
    prompt, and prompts without an answer.
    """
    rows, problems = [], []
    found = read_rows(source)
    for place, row in found.entries:
        try:
            if isinstance(row, DataError):
                raise row
            parsed = _parse(row, Path(source).stem)
            if parsed is not None and parsed.messages is None and prompts is None:
                raise DataError(f"missing column prompt; found {_columns(row)}; add it, or give --prompts")
            rows += [parsed] if parsed is not None else []
        except DataError as error:
            problems.append((place, str(error)))
    if problems:
        lines, single = listing(source, found.unit, problems)
        raise DataError(f"{len(problems)} unusable drafts (correct or remove them):\n  " + "\n  ".join(lines), single)
    if not rows:
        raise DataError(f"--drafts {source}: no answers; of records of this command the first answers of chains count")
    if prompts is not None:
        return prompts, _joined(source, rows, prompts)
    drafts: dict[str, Draft] = {}
    own = []
    for number, row in enumerate(rows):
        name = row.id or f"row-{number}"
        name = f"{name}#{number}" if name in drafts else name
        drafts[name] = row.draft
        own.append(Prompt(name, row.messages or [], template_kwargs=row.template_kwargs))
    return Records(own), drafts


def _parse(row: Any, name: str) -> _Row | None:
    """None for a row of this package's records that is no first answer of a chain."""
    if not isinstance(row, dict):
        raise DataError(f"expected an object, found {type(row).__name__}")
    if "method" in row and (row["method"], row.get("depth")) != ("chain", 1):
        return None
    answer = next((column for column in _TEXTS if isinstance(row.get(column), str)), None)
    if answer is None:
        raise DataError(f"missing column {' or '.join(_TEXTS)}; found {_columns(row)}")
    column = next((column for column in _PROMPTS if row.get(column) is not None), None)
    if column is None and row.get("id") is None:
        raise DataError(f"missing column prompt or id; found {_columns(row)}")
    generator = checked_text(str(row.get("generator") or name), "generator")
    draft = Draft(checked_text(row[answer], answer), generator, row.get("truncated") is True)
    messages = None if column is None else question(row, column)
    return _Row(
        None if row.get("id") is None else checked_text(str(row["id"]), "id"), messages, template_kwargs(row), draft
    )


def _columns(row: dict[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))) or "nothing"


def _joined(source: str, rows: list[_Row], prompts: Records[Prompt]) -> dict[str, Draft]:
    """By what the prompts say; by their ids only where a row does not say its prompt."""
    known: dict[Any, Draft] = {}
    for row in rows:
        key = prompt_key(row.messages) if row.messages is not None else row.id
        if key in known:
            raise DataError(
                f"--drafts {source}: two answers to one prompt ({row.id or row.messages}); keep one of them"
            )
        known[key] = row.draft
    drafts = {one.id: known.get(prompt_key(one.messages), known.get(one.id)) for one in prompts}
    lacking = [name for name, draft in drafts.items() if draft is None]
    if lacking:
        raise DataError(
            f"--drafts {source}: no answer to {len(lacking)} of {len(prompts)} prompts, such as {', '.join(lacking[:5])}; add "
            "them, or leave --prompts out to refine what is there"
        )
    return {name: draft for name, draft in drafts.items() if draft is not None}
