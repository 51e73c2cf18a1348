"""Inspects and tokenizes every row once, and decides which rows are used."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from openrlhf_sgpo.config import DataLimits
from openrlhf_sgpo.data.benchmarks import benchmarks_with, normalised
from openrlhf_sgpo.data.messages import common_prefix_length, digest
from openrlhf_sgpo.data.records import LABEL_COLUMNS, Messages, Pair, Prompt, Records
from openrlhf_sgpo.data.report import COUNTED, LEFT_OUT, DataReport, Tally, quantiles
from openrlhf_sgpo.data.tokens import ChatFormat, Group, PairTokens

NEARLY = 0.95  # share of common words at which responses count as near-identical
BATCH = 512  # rows per call of the tokenizer
# Openings of well-known chat templates: a text that begins with one has already been rendered.
_HEADERS = (
    *("<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>"),
    *("[INST]", "<s>[INST]"),
)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class InspectedPairs:
    """The pairs that are used, their tokens, and the report on all pairs."""

    pairs: list[Pair]
    groups: list[Group]
    report: DataReport

    @cached_property
    def _by_id(self) -> dict[str, tuple[Pair, Group]]:
        return {pair.id: (pair, group) for pair, group in zip(self.pairs, self.groups, strict=True)}

    def tokens_of(self, pair: Pair) -> Group | None:
        """Tokens of one of these pairs, labels flipped or not; None for any other pair."""
        inspected, group = self._by_id.get(pair.id, (None, None))
        if inspected is None or group is None or pair.prompt != inspected.prompt:
            return None
        if pair.template_kwargs != inspected.template_kwargs:
            return None
        if (pair.chosen, pair.rejected) == (inspected.chosen, inspected.rejected):
            return group
        flipped = (pair.chosen, pair.rejected) == (inspected.rejected, inspected.chosen)
        return Group(group.prompt, group.responses[::-1]) if flipped else None


@dataclass(frozen=True)
class InspectedPrompts:
    """The prompts that are used, their tokens, and the report on all prompts."""

    prompts: list[Prompt]
    tokens: list[tuple[int, ...]]
    report: DataReport

    @cached_property
    def _by_id(self) -> dict[str, tuple[int, ...]]:
        return {prompt.id: ids for prompt, ids in zip(self.prompts, self.tokens, strict=True)}

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        return self._by_id[prompt.id]


def near_identical(first: str, second: str) -> bool:
    """Whether two texts have the same letters and digits, or share at least 95% of their words.

    Common words: 2 |A and B| / (|A| + |B|) of the multisets A and B of words, in any order.
    """
    # Characters are normalised one by one, so texts have the same letters only if their beginnings have.
    a, b = (normalised(text[:100]) for text in (first, second))
    alike = a.startswith(b) or b.startswith(a)
    if alike and (letters := normalised(first)) and letters == normalised(second):
        return True
    words = [_WORD.findall(text.casefold()) for text in (first, second)]
    total = sum(map(len, words))
    if not total or 2 * min(map(len, words)) < NEARLY * total:
        return False
    return 2 * (Counter(words[0]) & Counter(words[1])).total() >= NEARLY * total


def unfinished(text: str) -> bool:
    """Whether a response of at least 20 words seems to stop mid-sentence.

    A guess: the last line is prose (five words, no list item) and ends in a letter, a comma or a semicolon.
    """
    last = text.rstrip().rpartition("\n")[2].strip()
    prose = len(last.split()) >= 5 and not re.match(r"[-*+|>#\u2022]|\d+[.)]", last)
    return prose and (last[-1].isalpha() or last[-1] in ",;") and len(text.split()) >= 20


def repeats_prompt(pair: Pair) -> list[str]:
    """The responses that begin with the prompt's last question, ignoring white space.

    Both count if their common prefix contains it: some datasets repeat the whole conversation, or the rendered prompt.
    """
    question = next((message["content"] for message in reversed(pair.prompt) if message["role"] == "user"), "")
    words = " ".join(question.split())
    if not words:
        return []
    if words in " ".join(pair.chosen[: common_prefix_length(pair.chosen, pair.rejected)].split()):
        return ["chosen", "rejected"]
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    return [side for side, text in sides.items() if " ".join(text[: 2 * len(question)].split()).startswith(words)]


def prompt_key(messages: Messages) -> bytes:
    """A hash that is equal for conversations that differ only in white space."""
    return digest(*(message | {"content": " ".join(message["content"].split())} for message in messages))


class _SpecialTokens:
    """Finds special tokens that a conversation contains and the chat template adds again."""

    def __init__(self, chat: ChatFormat):
        tokenizer = chat.tokenizer
        self.bos_id = tokenizer.bos_token_id
        self.bos = tokenizer.bos_token
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self.is_end = chat.end_of_turn[-1] in special
        ends = {tokenizer.eos_token, tokenizer.decode(chat.end_of_turn)} if self.is_end else {tokenizer.eos_token}
        self.ends = [text for text in ends if text]

    def findings(self, prompt: tuple[int, ...], texts: Sequence[str]) -> Iterator[str]:
        twice = self.bos_id is not None and prompt[:2] == (self.bos_id, self.bos_id)
        rendered = any(text.lstrip().startswith(_HEADERS) for text in texts)
        if twice or rendered or (self.bos and any(self.bos in text for text in texts)):
            yield "double_bos"
        if any(end in text for end in self.ends for text in texts):
            yield "double_eos"


def inspect_pairs(
    pairs: Sequence[Pair],
    chat: ChatFormat,
    limits: DataLimits,
    *,
    name: str,
    held_out: Sequence[Messages] | None = None,
    trained_on: bool = True,
) -> InspectedPairs:
    """Tokenizes pairs and counts the findings of ``docs/data.md``. Reports exceeded limits; ``require`` raises for them.

    name: of the data, in the report. held_out: prompts that should not occur; None if there are no held-out prompts.
    trained_on: false for pairs that are only evaluated, which may come from a benchmark.
    """
    tally, special = Tally(), _SpecialTokens(chat)
    left_out = _count_left_out(pairs, tally)
    kept: list[Pair] = []
    groups: list[Group] = []
    lengths: dict[str, list[int]] = {column: [] for column in ("prompt", "chosen", "rejected", "needed")}
    longer: Counter[str] = Counter()
    seen: set[bytes] = set()
    held_out_keys = set(map(prompt_key, held_out or []))
    seen_held_out: set[bytes] = set()
    for pair, tokens in _encoded(pairs, chat):
        if tokens is None:
            tally.add("refused", f"{pair.id} ({chat.refusal(pair.prompt, pair.template_kwargs)})")
            continue
        prompt, chosen, rejected = len(tokens.prompt), *map(len, tokens.responses)
        end = len(chat.end_of_turn)
        needed = prompt + max(chosen, rejected) + end
        for column, length in zip(lengths, (prompt, chosen + end, rejected + end, needed), strict=True):
            lengths[column].append(length)
        group = chat.group(pair, tokens)
        if (defect := _defect(pair)) or group is None:
            reason, parts = (defect, []) if defect else _lost(tokens, chat)
            tally.add(reason, pair.id, parts)
            continue
        kept.append(pair)
        groups.append(group)
        longer["chosen"] += chosen > rejected
        longer["equal"] += chosen == rejected

        cut = _cut(pair, tokens, chat.max_len)
        whole = [side for side in ("chosen", "rejected") if side not in cut]
        if cut:
            tally.add("truncated", pair.id, cut)
        responses = dict(zip(("chosen", "rejected"), group.responses, strict=True))
        if unended := [side for side in whole if not (special.is_end and responses[side][-end:] == chat.end_of_turn)]:
            tally.add("missing_eos", pair.id, unended)
        texts = [message["content"] for message in pair.prompt] + [pair.chosen, pair.rejected]
        for finding in special.findings(tokens.prompt, texts):
            tally.add(finding, pair.id)
        if (tag := chat.open_thought(tokens.prompt)) and (
            thoughts := [side for side in whole if tag not in getattr(pair, side)]
        ):
            tally.add("open_thought", pair.id, thoughts)
        if near_identical(pair.chosen, pair.rejected):
            tally.add("near_identical", pair.id)
        if repeating := repeats_prompt(pair):
            tally.add("repeats_prompt", pair.id, repeating)
        key, chosen_text, rejected_text = prompt_key(pair.prompt), pair.chosen.strip(), pair.rejected.strip()
        rendered_key = digest(key, pair.template_kwargs)
        if (row := digest(rendered_key, chosen_text, rejected_text)) in seen:
            tally.add("duplicate", pair.id)
        if digest(rendered_key, rejected_text, chosen_text) in seen:
            tally.add("contradictory", pair.id)
        seen.add(row)
        if open_ended := [side for side in whole if unfinished(getattr(pair, side))]:
            tally.add("unfinished", pair.id, open_ended)
        if benchmarks := benchmarks_with(pair.prompt):
            tally.add("benchmark", pair.id, benchmarks)
        # The count is of held-out prompts, so further pairs of the same prompt do not add to it.
        if key in held_out_keys and key not in seen_held_out:
            seen_held_out.add(key)
            tally.add("held_out", pair.id)
    rows = len(pairs) + left_out
    names = [*LEFT_OUT, *(finding for finding in COUNTED if finding != "held_out" or held_out is not None)]
    report = DataReport(
        name=name,
        kind="pairs",
        rows=rows,
        kept=len(kept),
        findings=tally.findings(
            names, rows, limits, of={"held_out": len(held_out_keys)}, unlimited=[] if trained_on else ["benchmark"]
        ),
        lengths={column: quantiles(values) for column, values in lengths.items() if values},
        longer={side: longer[side] / len(kept) for side in ("chosen", "equal")} if kept else {},
        labels=_label_figures(kept),
    )
    return InspectedPairs(kept, groups, report)


def _label_figures(pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    columns = {column: [getattr(pair, column) for pair in pairs] for column in LABEL_COLUMNS}
    return {
        column: {"min": min(values), "mean": fmean(values), "max": max(values)}
        for column, values in columns.items()
        if set(values) - {1.0}
    }


def inspect_prompts(
    prompts: Sequence[Prompt],
    chat: ChatFormat,
    limits: DataLimits,
    *,
    name: str,
    room: int,
    held_out: Sequence[Messages] | None = None,
) -> InspectedPrompts:
    """Tokenizes and inspects prompts. room: tokens that a prompt must leave for a response.

    Held-out prompts are counted without a limit and kept: the run leaves them out itself.
    """
    tally, special = Tally(), _SpecialTokens(chat)
    left_out = _count_left_out(prompts, tally)
    kept: list[Prompt] = []
    encoded: list[tuple[int, ...]] = []
    lengths: list[int] = []
    seen: set[bytes] = set()
    held_out_keys = set(map(prompt_key, held_out or []))
    for prompt, tokens in _encoded_prompts(prompts, chat):
        if tokens is None:
            tally.add("refused", f"{prompt.id} ({chat.refusal(prompt.messages, prompt.template_kwargs)})")
            continue
        lengths.append(len(tokens))
        if _is_blank(prompt.messages) or len(tokens) + room > chat.max_len:
            tally.add("empty" if _is_blank(prompt.messages) else "too_long", prompt.id)
            continue
        kept.append(prompt)
        encoded.append(tokens)
        for finding in special.findings(tokens, [message["content"] for message in prompt.messages]):
            tally.add(finding, prompt.id)
        key = prompt_key(prompt.messages)
        rendered_key = digest(key, prompt.template_kwargs)
        if rendered_key in seen:
            tally.add("duplicate", prompt.id)
        seen.add(rendered_key)
        if benchmarks := benchmarks_with(prompt.messages):
            tally.add("benchmark", prompt.id, benchmarks)
        if key in held_out_keys:
            tally.add("held_out", prompt.id)
    rows = len(prompts) + left_out
    names = ["malformed", "refused", "empty", "too_long", "double_bos", "double_eos", "duplicate", "benchmark"]
    names += [] if held_out is None else ["held_out"]
    findings = tally.findings(names, rows, limits, unlimited=["held_out"])
    report = DataReport(name, "prompts", rows, len(kept), findings, {"prompt": quantiles(lengths)} if lengths else {})
    return InspectedPrompts(kept, encoded, report)


def _count_left_out(records: Sequence[Pair] | Sequence[Prompt], tally: Tally) -> int:
    rows = records.left_out if isinstance(records, Records) else ()
    for row in rows:
        tally.add("malformed", row)
    return len(rows)


def _encoded(pairs: Sequence[Pair], chat: ChatFormat) -> Iterator[tuple[Pair, PairTokens | None]]:
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        yield from zip(batch, chat.encode(batch), strict=True)


def _encoded_prompts(prompts: Sequence[Prompt], chat: ChatFormat) -> Iterator[tuple[Prompt, tuple[int, ...] | None]]:
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        arguments = [prompt.template_kwargs for prompt in batch]
        yield from zip(batch, chat.prompts([prompt.messages for prompt in batch], arguments), strict=True)


def _is_blank(messages: Messages) -> bool:
    return not messages[-1]["content"].strip()


def _defect(pair: Pair) -> str | None:
    """Why the pair cannot be used, judging by its texts alone."""
    chosen, rejected = pair.chosen.strip(), pair.rejected.strip()
    if chosen == rejected:
        return "identical"
    return None if chosen and rejected and not _is_blank(pair.prompt) else "empty"


def _lost(tokens: PairTokens, chat: ChatFormat) -> tuple[str, list[str]]:
    """Why a pair with valid texts does not fit the length limit: the finding and its parts."""
    if not chat.fits(tokens.prompt):
        return "too_long", []
    return ("identical", ["once cut"]) if all(tokens.responses) else ("empty", [])


def _cut(pair: Pair, tokens: PairTokens, max_len: int) -> list[str]:
    """The responses that are marked as truncated, or are longer than the limit allows."""
    room = max_len - len(tokens.prompt)
    marked = {"chosen": pair.chosen_truncated, "rejected": pair.rejected_truncated}
    return [side for side, ids in zip(marked, tokens.responses, strict=True) if marked[side] or len(ids) > room]
