"""What is measured between rounds: held-out pairs, proof that the engines hold the policy, and fresh samples from them."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch

from openrlhf_sgpo import ranks
from openrlhf_sgpo.algorithms.base import Algorithm
from openrlhf_sgpo.data.messages import template_columns
from openrlhf_sgpo.data.records import Pair
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.dro import saving, support_of
from openrlhf_sgpo.intervals import scores, share_error, standard_error
from openrlhf_sgpo.ledger import increase
from openrlhf_sgpo.oracle import Answer, Question
from openrlhf_sgpo.rollout import sampling_of
from openrlhf_sgpo.run import Run
from openrlhf_sgpo.run_folder import CERTIFICATE, RunFolder, read_json, read_jsonl, write_jsonl
from openrlhf_sgpo.training.log_probs import implicit_margins
from openrlhf_sgpo.training.probe import check_weights_arrived

PROBES = 16  # fixed texts that prove a weight sync


class Evaluator:
    """Evaluates policies of a run on the held-out pairs, and with samples where there are engines."""

    def __init__(self, run: Run):
        self.run = run
        self.config = run.config
        self.scorer = run.scorer
        self.held_out = self._held_out()
        self.probes = self._probes() if run.samples else []
        self._noise: float | None = None

    def sync(self, name: str, policy: str, previous: str | None) -> dict[str, float]:
        """Give the engines the policy, and prove that they hold it and not the ``previous`` one, None for the start. Returns
        the figures of the proof. Raises WeightSyncError. Collective."""
        engine = self.run.engine(policy)
        log_probs = self._probe(policy, f"{name}: probe")
        before = self._probe(previous, f"{name}: probe, before") if previous else None
        return check_weights_arrived(engine, self.probes, log_probs, before, self.config.ds.param_dtype, self._noise)

    def calibrate(self, start: dict[str, Any]) -> None:
        """Take the difference between engine and trainer on equal weights from the start's row, where nothing was trained."""
        self._noise = start.get("probe", {}).get("noise")

    def preferences(self, name: str, policy: str, path: Path) -> dict[str, Any]:
        """Accuracy and mean margin on the held-out pairs, each pair's in ``path``/held_out.jsonl; empty without such pairs.
        Collective."""
        if not self.held_out:
            return {}
        initial = self.config.ref.model_name_or_path
        groups = [group for _, group in self.held_out]
        reference = self.scorer.score(initial, groups, f"{name}: evaluate, reference")
        scored = self.scorer.score(policy, groups, f"{name}: evaluate")
        margins = implicit_margins(scored, reference, self.config.model.beta)
        if self.run.writes:
            rows = zip(self.held_out, margins.tolist(), strict=True)
            write_jsonl(path / "held_out.jsonl", ({"id": pair.id, "margin": margin} for (pair, _), margin in rows))
        values = margins.tolist()
        right = scores(values)
        return {
            "accuracy": mean(right),
            "accuracy_error": share_error(right),
            "margin": margins.mean().item(),
            "margin_error": standard_error(values),
            "pairs": len(margins),
        }

    def samples(self, name: str, policy: str, path: Path, cost: dict[str, float]) -> dict[str, Any]:
        """Length and truncation of one fresh sample per held-out prompt from the engines, which hold the policy, and its
        divergence from the initial reference, each in ``path``/samples.jsonl; with an oracle how often it is preferred to the
        start's. ``cost`` gets samples, tokens and judgements. Empty without held-out prompts. Collective."""
        longest = self.config.data.max_len - self.config.rollout.max_new_tokens
        asked = [(pair, group.prompt) for pair, group in self.held_out if len(group.prompt) <= longest]
        asked = asked[: self.config.eval.max_prompts or None]
        if not asked:
            return {}
        prompts = [prompt for _, prompt in asked]
        sampling = sampling_of(self.config.rollout, self.config.train.seed)
        samples = [sample for (sample,) in self.run.engine(policy).generate(prompts, sampling, f"{name}: sample")]
        cost["samples"] = len(samples)
        cost["tokens_generated"] = sum(sample.tokens for sample in samples)
        initial = self.config.ref.model_name_or_path
        divergences = [0.0] * len(samples)
        if policy != initial:
            groups = [
                Group(prompt, (sample.token_ids[: self.config.data.max_len - len(prompt)],))
                for prompt, sample in zip(prompts, samples, strict=True)
            ]
            divergences = self.scorer.divergence(policy, initial, groups, f"{name}: divergence")
        wins: dict[str, Any] = {}
        if self.run.has_oracle and path.name != "initial":
            wins = self._wins([pair for pair, _ in asked], samples, path.parent / "initial", name, cost)
        if self.run.writes:
            rows = zip(asked, samples, divergences, strict=True)
            write_jsonl(
                path / "samples.jsonl",
                (
                    {
                        "id": pair.id,
                        "prompt": pair.prompt,
                        **template_columns(pair.template_kwargs),
                        **sample.to_row(),
                        "kl": kl,
                    }
                    for (pair, _), sample, kl in rows
                ),
            )
        return {
            "prompts": len(samples),
            "response_length": mean(sample.tokens for sample in samples),
            "truncated": mean(sample.truncated for sample in samples),
            "kl": mean(divergences),
            "kl_error": standard_error(divergences),
            **wins,
        }

    def _held_out(self) -> list[tuple[Pair, Group]]:
        """The held-out pairs as the algorithm sees them, with their tokens."""
        known, chat = self.run.data.held_out, self.run.chat
        pairs = self.run.algorithm.pairs(known.pairs, chat)
        tokens = ((pair, known.tokens_of(pair) or chat.pair(pair)) for pair in pairs)
        return [(pair, group) for pair, group in tokens if group is not None]

    def _probes(self) -> list[Group]:
        """Fixed texts for the weight probe. An engine needs room for one more token."""
        data, longest = self.run.data, self.config.data.max_len - 1
        candidates = data.held_out.groups[:PROBES] or data.human.groups[:PROBES]
        if not candidates:
            # A run on prompts alone: the end of a prompt is as good a text.
            return [Group(ids[:-4], (ids[-4:],)) for ids in data.prompts.tokens[:PROBES]]
        return [Group(group.prompt, (group.responses[0][: longest - len(group.prompt)],)) for group in candidates]

    def _probe(self, policy: str, label: str) -> list[float]:
        return [log_prob for (log_prob,) in self.scorer.score(policy, self.probes, label)]

    def _wins(
        self, pairs: list[Pair], samples: list[Answer], start: Path, name: str, cost: dict[str, float]
    ) -> dict[str, Any]:
        """How often the oracle prefers these samples to those of the start, each prompt's preference counting. Over the prompts
        that the start answered too, which may be others since a run was resumed; nothing if there are none."""
        path = start / "samples.jsonl"
        rows = ranks.from_rank_0(read_jsonl(path) if self.run.writes and path.is_file() else [])
        before_training = {row["id"]: Answer.from_row(row) for row in rows}
        questions = [
            Question(pair.id, pair.prompt, (sample, before_training[pair.id]), pair.template_kwargs)
            for pair, sample in zip(pairs, samples, strict=True)
            if pair.id in before_training
        ]
        if not questions:
            return {}
        oracle = self.run.frozen_oracle()
        before = oracle.usage()
        wins = [matrix[0][1] for matrix in oracle.preferences(questions, f"{name}: compare")]
        cost |= increase(before, oracle.usage())
        return {"win_rate": mean(wins), "win_rate_error": standard_error(wins)}


def worst_case(folder: RunFolder, algorithm: type[Algorithm[Any]], number: int | None) -> dict[str, Any]:
    """V of the policy after a round, and of DPO on the human pairs, which is the policy after round 0: on their held-out pairs,
    at the radius and with the space and tangents of the round's certificate, and without a follower (radius 0). The support
    reaches 1 beyond the margins of all policies so far. Only files are read.

    Empty for a round without a worst case, a run whose seed stage is not DPO, and without held-out pairs that all policies were
    measured on.
    """
    path = folder.round(number) / CERTIFICATE
    if not number or not algorithm.needs.rounds or not path.exists():
        return {}
    certificate = read_json(path)
    if certificate.get("ball") != "worst":
        return {}
    files = [folder.round(earlier) / "held_out.jsonl" for earlier in (None, *range(number + 1))]
    measured = [{row["id"]: row["margin"] for row in read_jsonl(file)} if file.exists() else {} for file in files]
    pairs = [key for key in measured[-1] if all(key in margins for margins in measured)]
    if not pairs:
        return {}
    tables = [torch.tensor([margins[key] for key in pairs], dtype=torch.float64) for margins in measured]
    _, dpo, *_, policy = tables
    problem = {
        "space": certificate["space"],
        "pieces": certificate["pieces"],
        "window": support_of(tables, certificate["space"]),
    }
    figures: dict[str, Any] = {"pairs": len(pairs), "radius": certificate["radius"], **problem}
    for name, radius in (("loss", 0.0), ("value", certificate["radius"])):
        value, of_dpo, saved, error = saving(policy, dpo, radius, **problem)
        figures |= {name: value, f"dpo_{name}": of_dpo, f"{name}_saved": saved, f"{name}_saved_error": error}
    return {"worst_case": figures}
