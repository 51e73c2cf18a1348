"""Log-probabilities that an engine reported with its answers, in place of the trainer's where both agree.

Engine and trainer compute the same figure with different kernels. Their distance on fixed texts, the noise, is known of every
policy, because the probe that follows its training has measured it. What is made of the policy's log-probabilities, rewards and
margins, are differences of log policy - log reference between answers to one prompt; their spread is its standard deviation
within prompts. If noise and differences are independent and Gaussian, with standard deviations n and s of an answer, the noise
turns the sign of a difference with probability arctan(n / s) / pi, which is 3% at n = s / 10, and almost only of small ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from openrlhf_sgpo import ranks
from openrlhf_sgpo.data.messages import template_kwargs
from openrlhf_sgpo.data.tokens import ChatFormat, Group
from openrlhf_sgpo.run import Run
from openrlhf_sgpo.run_check import check_round
from openrlhf_sgpo.run_folder import RunFolder, read_json
from openrlhf_sgpo.training.scoring import tokens_key

Rows = tuple[list[dict[str, Any]], list[dict[str, Any]]]
AGREEMENT = 0.1  # noise by spread, at most


def reported(
    prompts: Iterable[Mapping[str, Any]], responses: Iterable[Mapping[str, Any]], chat: ChatFormat
) -> dict[str, float]:
    """What the engine reported of a round's answers, by ``tokens_key``, from the rows of prompts.jsonl and responses.jsonl. An
    answer that is cut for training, or that got other tokens than were sampled, is not among them."""
    contexts = {row["id"]: chat.prompt(row["prompt"], template_kwargs(row)) for row in prompts}
    return {
        tokens_key(contexts[row["id"]], tuple(answer["token_ids"])): answer["log_prob"]
        for row in responses
        for answer in row["responses"]
        if "log_prob" in answer
    }


def deviation_within(differences: Iterable[Sequence[float]]) -> float:
    """Standard deviation within prompts, sqrt(sum of (d - mean of its prompt)^2 / sum of (answers to a prompt - 1)); 0 if no
    prompt has two answers. differences: log policy - log reference of the answers to each prompt."""
    squares, freedom = 0.0, 0
    for row in filter(None, differences):
        mean = sum(row) / len(row)
        squares += sum((difference - mean) ** 2 for difference in row)
        freedom += len(row) - 1
    return (squares / freedom) ** 0.5 if freedom else 0.0


def noise_of(probe: Mapping[str, float], tokens: float) -> float:
    """The noise of an answer of so many tokens, from that of the probe's texts. Errors that point the same way at every token
    grow with the length of a text, independent ones with its root; this is the larger."""
    ratio = tokens / probe["tokens"]
    return probe["noise"] * max(ratio, ratio**0.5)


def take(run: Run, number: int, rows: Rows, groups: list[Group], reference: str) -> dict[str, Any]:
    """Have the scorer take what was ``reported``, if the noise is at most a tenth of the spread. rows: of prompts.jsonl and of
    responses.jsonl. groups: what the policy that enters the round is about to score. Returns the facts for the manifest.
    Collective."""
    label, known = f"round {number}", reported(*rows, run.chat)
    probe = ranks.on_rank_0(lambda: _probe(run.folder, number - 1))
    scores = run.scorer.score(reference, groups, f"{label}: reference")
    taken: dict[str, float] = {}
    differences, tokens = [], []
    for group, row in zip(groups, scores, strict=True):
        keys = [tokens_key(group.prompt, response) for response in group.responses]
        taken |= {key: known[key] for key in keys if key in known}
        differences.append([known[key] - score for key, score in zip(keys, row, strict=True) if key in known])
        tokens += [len(response) for key, response in zip(keys, group.responses, strict=True) if key in known]
    figures = {
        "noise": noise_of(probe, sum(tokens) / len(tokens)) if tokens else 0.0,
        "spread": deviation_within(differences),
    }
    agree = figures["spread"] > 0 and figures["noise"] <= AGREEMENT * figures["spread"]
    count = f"{len(tokens)} of {sum(len(group.responses) for group in groups)}"
    source = "engine" if agree else "trainer"
    run.say(
        f"{label}: log-probabilities of {count} answers come from the {source}: the engine's noise is {figures['noise']:.3g} "
        f"nats per answer, and may be a tenth of their spread within prompts, {figures['spread']:.3g}"
    )
    if agree:
        run.scorer.take(run.policy_before(number), taken)
    return {"engine_log_probs": {"taken": len(taken) if agree else 0, "reported": len(taken), **figures}}


def _probe(folder: RunFolder, number: int) -> dict[str, float]:
    """The probe of the policy after a round."""
    check_round(folder, number, ("evaluate",))
    return read_json(folder.round(number) / "evaluation.json")["probe"]
