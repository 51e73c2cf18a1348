"""The findings of the data report that can stop a run: each field is a finding, its limit, and the flag that moves it."""

from __future__ import annotations

from dataclasses import dataclass

from openrlhf_sgpo.flags import setting


@dataclass
class DataLimits:
    """The largest share of rows that may show a finding. ``docs/data.md`` defines the findings."""

    malformed: float = setting(
        0.05, "rows of a hub dataset that cannot be read, at most (in a file there may be none)", low=0, high=1
    )
    refused: float = setting(0.01, "conversations that the chat template refuses, at most", low=0, high=1)
    empty: float = setting(0.05, "pairs with an empty prompt or response, at most", low=0, high=1)
    identical: float = setting(0.05, "pairs whose responses are the same, at most", low=0, high=1)
    too_long: float = setting(
        0.5, "prompts that leave no room for a response within --data.max_len, at most", low=0, high=1
    )
    truncated: float = setting(
        0.6, "pairs with a response that is cut by --data.max_len or marked as cut, at most", low=0, high=1
    )
    missing_eos: float = setting(
        0.05, "pairs with an uncut response that does not end in an end of turn, at most", low=0, high=1
    )
    double_bos: float = setting(
        0.01, "conversations in which the begin-of-sequence token is doubled, at most", low=0, high=1
    )
    double_eos: float = setting(0.01, "conversations whose texts hold the end-of-turn token, at most", low=0, high=1)
    open_thought: float = setting(
        0.01,
        "pairs with an uncut response that does not close the thought that the chat template opens, at most",
        low=0,
        high=1,
    )
    near_identical: float = setting(0.2, "pairs whose responses differ in next to nothing, at most", low=0, high=1)
    repeats_prompt: float = setting(0.05, "pairs with a response that begins with the prompt, at most", low=0, high=1)
    duplicate: float = setting(0.1, "rows that repeat an earlier one, at most", low=0, high=1)
    contradictory: float = setting(0.02, "pairs that prefer the opposite of an earlier pair, at most", low=0, high=1)
    benchmark: float = setting(
        0.01, "conversations that begin with a prompt of AlpacaEval or MT-Bench, at most", low=0, high=1
    )
    held_out: float = setting(0.01, "prompts of --eval.dataset that --data.dataset has too, at most", low=0, high=1)
