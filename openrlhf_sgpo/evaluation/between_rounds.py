"""What is measured of a policy between rounds: held-out pairs, fresh samples, and that the engines really hold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from openrlhf_sgpo import ranks
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.messages import template_columns
from openrlhf_sgpo.data.records import Pair
from openrlhf_sgpo.data.tokens import ChatFormat, Group
from openrlhf_sgpo.intervals import scores, share_error, standard_error
from openrlhf_sgpo.oracle import Answer, Oracle, Question
from openrlhf_sgpo.rollout import Rollout, Sample
from openrlhf_sgpo.run_folder import read_jsonl, write_json, write_jsonl
from openrlhf_sgpo.training.probe import check_weights_arrived
from openrlhf_sgpo.training.scoring import Scorer


def margins(policy: Sequence[tuple[float, ...]], reference: Sequence[tuple[float, ...]], beta: float) -> torch.Tensor:
    """beta * [(log-ratio of chosen) - (log-ratio of rejected)], shape (pairs,), float64, from summed log-probabilities."""
    ratio = torch.tensor(policy, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    return beta * (ratio[:, 0] - ratio[:, 1])


class Evaluator:
    """Evaluates policies on the held-out pairs, and with samples where there are engines.

    held_out: pairs with their token groups (prompt, [chosen, rejected]). probes: fixed texts that prove a weight sync.
    engine: starts the engines or gives them another policy; None where the run does not sample. oracle: of a run in which it
    stays the same; then answers are also compared with those of the start.
    """

    def __init__(
        self,
        config: Config,
        scorer: Scorer,
        chat: ChatFormat,
        held_out: list[tuple[Pair, Group]],
        probes: list[Group],
        engine: Callable[[str], Rollout] | None,
        oracle: Callable[[], Oracle] | None,
        writes: bool,
    ):
        self.config = config
        self.scorer = scorer
        self.chat = chat
        self.held_out = held_out
        self.probes = probes
        self.engine = engine
        self.oracle = oracle
        self.writes = writes
        self._noise: float | None = None

    def evaluate(
        self, name: str, policy: str, previous: str | None, path: Path, cost: dict[str, float]
    ) -> dict[str, Any]:
        """The figures of the policy folder ``policy``, also written to ``path``/evaluation.json. Collective.

        Held-out accuracy and margin (each pair's in held_out.jsonl); with engines also length and truncation of one fresh
        sample per held-out prompt and its divergence from the initial reference (each in samples.jsonl), with an oracle how
        often it is preferred to the start's, and the probe, at which it is proved that the engines took over the policy from
        the ``previous`` one, which is None for the start. ``cost`` gets samples, tokens and judgements.
        """
        row: dict[str, Any] = {"name": name}
        if self.held_out:
            row |= self._preferences(name, policy, path)
        if self.engine:
            engine = self.engine(policy)
            log_probs = self._probe(policy, f"{name}: probe")
            before = self._probe(previous, f"{name}: probe, before") if previous else None
            row["probe"] = check_weights_arrived(
                engine, self.probes, log_probs, before, self.config.ds.param_dtype, self._noise
            )
            if self.held_out:
                row |= self._samples(name, policy, previous, path, engine, cost)
        if self.writes:
            write_json(path / "evaluation.json", row)
        ranks.barrier()
        return row

    def calibrate(self, start: dict[str, Any]) -> None:
        """How far engine and trainer are apart on the same weights, from the row of the start, before there is a sync."""
        self._noise = start.get("probe", {}).get("noise")

    def _probe(self, policy: str, label: str) -> list[float]:
        return [one for (one,) in self.scorer.score(policy, self.probes, label)]

    def _preferences(self, name: str, policy: str, path: Path) -> dict[str, Any]:
        initial = self.config.ref.model_name_or_path
        groups = [group for _, group in self.held_out]
        reference = self.scorer.score(initial, groups, f"{name}: evaluate, reference")
        scored = self.scorer.score(policy, groups, f"{name}: evaluate")
        found = margins(scored, reference, self.config.model.beta)
        if self.writes:
            rows = zip(self.held_out, found.tolist(), strict=True)
            write_jsonl(path / "held_out.jsonl", ({"id": pair.id, "margin": margin} for (pair, _), margin in rows))
        values = found.tolist()
        right = scores(values)
        return {
            "accuracy": mean(right),
            "accuracy_error": share_error(right),
            "margin": found.mean().item(),
            "margin_error": standard_error(values),
            "pairs": len(found),
        }

    def _samples(
        self, name: str, policy: str, previous: str | None, path: Path, engine: Rollout, cost: dict[str, float]
    ) -> dict[str, Any]:
        longest = self.config.data.max_len - self.config.rollout.max_new_tokens
        asked = [(pair, group.prompt) for pair, group in self.held_out if len(group.prompt) <= longest]
        asked = asked[: self.config.eval.max_prompts or None]
        if not asked:
            return {}
        prompts = [prompt for _, prompt in asked]
        samples = [one for (one,) in engine.generate(prompts, 1, self.config.train.seed, f"{name}: sample")]
        cost["samples"] = len(samples)
        cost["tokens_generated"] = sum(one.tokens for one in samples)
        room = self.config.data.max_len
        responses = [
            self.chat.response(one.text, one.truncated, room - len(prompt))
            for prompt, one in zip(prompts, samples, strict=True)
        ]
        initial = self.config.ref.model_name_or_path
        if policy == initial:
            divergences = [0.0] * len(samples)
        else:
            # An empty response has no tokens on which two policies could differ.
            spoken = [
                Group(prompt, (response,)) for prompt, response in zip(prompts, responses, strict=True) if response
            ]
            found = iter(self.scorer.divergence(policy, initial, spoken, f"{name}: divergence") if spoken else [])
            divergences = [next(found) if response else 0.0 for response in responses]
        wins: dict[str, Any] = {}
        if self.oracle and previous is not None:
            wins = self._wins([pair for pair, _ in asked], samples, path.parent / "initial", name, cost)
        if self.writes:
            rows = zip(asked, samples, divergences, strict=True)
            write_jsonl(
                path / "samples.jsonl",
                (
                    {
                        "id": pair.id,
                        "prompt": pair.prompt,
                        **template_columns(pair.template_kwargs),
                        **one.to_row(),
                        "kl": kl,
                    }
                    for (pair, _), one, kl in rows
                ),
            )
        return {
            "prompts": len(samples),
            "response_length": mean(one.tokens for one in samples),
            "truncated": mean(one.truncated for one in samples),
            "kl": mean(divergences),
            "kl_error": standard_error(divergences),
            **wins,
        }

    def _wins(
        self, pairs: list[Pair], samples: list[Sample], start: Path, name: str, cost: dict[str, float]
    ) -> dict[str, Any]:
        """How often the oracle prefers these samples to those of the start, each prompt's preference counting. Over the prompts
        that the start answered too, which may be others since a run was resumed; nothing if there are none."""
        assert self.oracle is not None
        path = start / "samples.jsonl"
        rows = ranks.from_rank_0(read_jsonl(path) if self.writes and path.is_file() else [])
        before_training = {row["id"]: Answer(row["text"], row["truncated"]) for row in rows}
        questions = [
            Question(
                pair.id,
                pair.prompt,
                (Answer(one.text, one.truncated), before_training[pair.id]),
                pair.template_kwargs,
            )
            for pair, one in zip(pairs, samples, strict=True)
            if pair.id in before_training
        ]
        if not questions:
            return {}
        oracle = self.oracle()
        before = oracle.usage()
        found = [matrix[0][1] for matrix in oracle.preferences(questions, f"{name}: compare")]
        cost |= {one: total - before[one] for one, total in oracle.usage().items()}
        return {"win_rate": mean(found), "win_rate_error": standard_error(found)}
