"""Figures of responses under models on disk: log-probabilities, which oracle, follower, loss and evaluation share, rewards of
a reward model, and divergences of two policies."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from torch import distributed

from openrlhf_sgpo import ranks
from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.content_cache import keep_line, kept_lines
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.finite import NotFiniteError
from openrlhf_sgpo.memory import release_memory
from openrlhf_sgpo.openrlhf import Actor, DeepspeedStrategy, destroy, fits_whole, load_actor, load_reward_model
from openrlhf_sgpo.output import Progress
from openrlhf_sgpo.training.log_probs import figures_of, predictions, response_log_probs, sequence_divergence
from openrlhf_sgpo.training.packing import filled, padded_rows, token_budget

PART = 64  # batches per rank between two writes
SEPARATOR = array("I", [2**32 - 1])  # no token has this number
# Bytes per parameter of a model in training: weights, gradient and Adam's moments, 16 in float32 and 18 in half precision, and
# what a forward pass keeps.
TRAINING = 24


def tokens_key(prompt: tuple[int, ...], response: tuple[int, ...]) -> str:
    """Hash of the exact tokens of a prompt and a response."""
    tokens = array("I", prompt) + SEPARATOR + array("I", response)
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest()


class Scorer:
    """Scores groups under the models in folders. No response is scored twice.

    Results are kept per model by a hash of the tokens, in memory and in ``folder`` (one file per model), so a reference is
    evaluated once for all who ask, and a resumed run sees the same numbers as before. resident: a model that was loaded stays
    in memory, for the next that asks, until ``make_room`` or ``close``; otherwise there is one at a time.
    """

    figure: ClassVar[str] = "log-probability"

    def __init__(
        self,
        config: Inference,
        strategy: DeepspeedStrategy,
        pad_token_id: int,
        folder: Path | None = None,
        resident: bool = False,
    ):
        self.config = config
        self.strategy = strategy
        self.pad_token_id = pad_token_id
        self.folder = folder
        self.resident = resident
        self.tokens_scored = 0
        self.responses_scored = 0
        self._known: dict[str, dict[str, float]] = {}
        self._held: dict[str, Any] = {}

    def close(self) -> None:
        """Give back the models that are held in memory. Collective."""
        while self._held:
            destroy(self._held.popitem()[1])
        release_memory()

    def make_room(self, kept: str) -> None:
        """Give back the models that are held before another one is trained: all but ``kept``, and that too if the training of a
        model of its size would not fit beside it. Collective."""
        actor = self._held.pop(kept, None)
        self.close()
        if actor is None:
            return
        self._held[kept] = actor
        parameters = sum(getattr(weight, "ds_numel", weight.numel()) for weight in actor.parameters())
        needed = TRAINING * parameters * distributed.get_world_size()
        if not ranks.from_rank_0(psutil.virtual_memory().available > needed):
            del actor
            self.close()

    def forget(self, model: str) -> None:
        """Drop a model's results from memory."""
        self._known.pop(model, None)

    def discard(self, model: str) -> None:
        """Drop a model's results from memory and disk: the model is about to change. Collective."""
        self.forget(model)
        if model in self._held:
            destroy(self._held.pop(model))
        if self.folder and self.strategy.is_rank_0():
            self._file(model).unlink(missing_ok=True)
        ranks.barrier()

    def score(self, model: str, groups: list[Group], label: str) -> list[tuple[float, ...]]:
        """Summed log-probability of each response of each group, 0 where there is no ``model``. Collective: every rank calls
        it with the same groups. Raises NotFiniteError on every rank if one is not finite, and keeps none of that part."""
        if not model:
            return [(0.0,) * len(group.responses) for group in groups]
        known = self._known_of(model)
        keys = [[tokens_key(group.prompt, response) for response in group.responses] for group in groups]
        missing: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for group, row in zip(groups, keys, strict=True):
            missing |= {
                key: (group.prompt, response)
                for key, response in zip(row, group.responses, strict=True)
                if key not in known
            }
        self.responses_scored += len(missing)
        if missing:
            for scores in self._sweep([model], _by_prompt(list(missing.values())), label):
                known.update(scores)
                self._append(model, scores)
        return [tuple(known[key] for key in row) for row in keys]

    def take(self, model: str, log_probs: Mapping[str, float]) -> None:
        """Keep log-probabilities that were computed elsewhere, by ``tokens_key``, as if ``model`` had. Collective."""
        known = self._known_of(model)
        others = {key: value for key, value in log_probs.items() if known.get(key) != value}
        if others:
            known.update(others)
            self._append(model, others)

    def _known_of(self, model: str) -> dict[str, float]:
        if model not in self._known:
            # What is on disk is for one rank to say, or ranks could miss different responses.
            self._known[model] = ranks.on_rank_0(lambda: self._read(model))
        return self._known[model]

    def _file(self, model: str) -> Path:
        assert self.folder is not None
        # Policies of this run by their place in it, so that the run folder can be moved.
        if Path(model).is_relative_to(self.folder.parent):
            model = str(Path(model).relative_to(self.folder.parent))
        return self.folder / f"{hashlib.blake2b(model.encode(), digest_size=8).hexdigest()}.jsonl"

    def _read(self, model: str) -> dict[str, float]:
        known: dict[str, float] = {}
        if self.folder is not None:
            for part in kept_lines(self._file(model), f"delete the file, and {model} scores again"):
                known.update(part)
        return known

    def _append(self, model: str, scores: dict[str, float]) -> None:
        if self.folder is None:
            return
        if self.strategy.is_rank_0():
            # One line per part: if only some of its responses were kept, the others would be scored in other batches, and
            # differ in the last digit.
            keep_line(self._file(model), scores)
        ranks.barrier()

    def divergence(self, policy: str, reference: str, groups: list[Group], label: str) -> list[float]:
        """KL(policy || reference) of the first response of each group (see ``sequence_divergence``), in nats. Collective."""
        divergences: dict[str, float] = {}
        for part in self._sweep([policy, reference], groups, label):
            divergences |= part
        return [divergences[tokens_key(group.prompt, group.responses[0])] for group in groups]

    def _sweep(self, models: list[str], groups: list[Group], label: str) -> Iterator[dict[str, float]]:
        """One figure per response by its content key, in parts, so a killed run loses only the last part."""
        self.tokens_scored += sum(map(len, groups)) * len(models)
        # Neighbours of similar length waste the least padding; longest first, so memory runs out at once or never.
        groups = sorted(groups, key=len, reverse=True)
        world, rank = distributed.get_world_size(), distributed.get_rank()
        actors = [self._held.get(model) or self._prepared(model) for model in models]
        batches = self._batches(actors, groups)
        share = batches[rank::world]
        # ZeRO-3 gathers parameters collectively: every rank must run the same number of forwards.
        share += [batches[0]] * (-(-len(batches) // world) - len(share))
        if self.resident:
            self._held |= dict(zip(models, actors, strict=True))
        progress = Progress(
            total=len(share), desc=label, unit="batch", disable=not (label and self.strategy.is_rank_0())
        )
        try:
            for actor in actors:
                actor.eval()
            for start in range(0, len(share), PART):
                part = share[start : start + PART]
                figures = []
                with torch.no_grad():
                    for batch in part:
                        figures.append(self._figures(actors, batch))
                        progress.update()
                keys = [
                    tokens_key(group.prompt, response)
                    for batch in part
                    for group in batch
                    for response in group.responses
                ]
                gathered = ranks.gather(dict(zip(keys, torch.cat(figures).tolist(), strict=True)))
                scored = {key: value for part in gathered for key, value in part.items()}
                self._check(scored, models, label)
                yield scored
        finally:
            progress.close()
            if not self.resident:
                for actor in actors:
                    destroy(actor)
                del actor, actors  # the loop's name too would keep the last one alive
                release_memory()

    def _prepared(self, model: str) -> Any:
        """The model, whole on every rank if there is room: at ZeRO 3 every forward pass would gather all its weights. A model
        that stays in memory has to leave room for the others."""
        whole = self.config.ds.zero_stage == 3 and not self.resident and fits_whole(model, self.config)
        with self.strategy.unsharded(whole):
            return self.strategy.prepare(self._load(model))

    def _batches(self, actors: list[Any], groups: list[Group]) -> list[list[Group]]:
        """Filled with more tokens than in training, because nothing is kept for a backward pass."""
        budget = self.config.train.score_tokens or 2 * token_budget(self.config)
        if all(isinstance(actor, Actor) and actor.head for actor in actors):
            parts = filled(list(map(len, groups)), budget)
        else:
            # A row for each response, however many a prompt has; in an order that a resumed sweep finds again.
            groups = [Group(group.prompt, (response,)) for group in groups for response in group.responses]
            groups.sort(key=lambda group: (len(group), group.prompt, group.responses), reverse=True)
            rows = max(
                self.config.train.score_tokens // self.config.data.max_len, 2 * self.config.train.micro_batch_size
            )
            parts = [slice(start, start + rows) for start in range(0, len(groups), rows)]
        return [groups[part] for part in parts]

    def _check(self, scored: dict[str, float], models: list[str], label: str) -> None:
        wrong = [value for value in scored.values() if not math.isfinite(value)]
        if wrong:
            what = self.figure if len(models) == 1 else "divergence"
            precision = ", or the range of fp16 is too small for them (--ds.param_dtype bf16)"
            raise NotFiniteError(
                f"{label or 'scoring'}: {what} {wrong[0]} for {len(wrong)} of {len(scored)} responses under "
                f"{' and '.join(models)}; its weights are damaged or have diverged"
                f"{precision if self.config.ds.param_dtype == 'fp16' else ''}"
            )

    def _load(self, model: str) -> Any:
        return load_actor(model, self.config, self.strategy, trainable=False)

    def _figures(self, actors: list[Any], batch: list[Group]) -> torch.Tensor:
        """One figure per response of the batch: log-probability of one actor, or divergence of the first from the second."""
        policy, *others = actors
        if not others:
            return response_log_probs(policy, batch, self.pad_token_id)
        reference = predictions(others[0], batch, self.pad_token_id)
        return figures_of(policy, batch, self.pad_token_id, lambda states: sequence_divergence(states, reference))


class RewardScorer(Scorer):
    """The same for a reward model as OpenRLHF trains them: a figure is the reward of a response."""

    figure = "reward"

    def _load(self, model: str) -> Any:
        return load_reward_model(model, self.config, self.strategy)

    def _figures(self, actors: list[Any], batch: list[Group]) -> torch.Tensor:
        device = next(actors[0].parameters()).device
        tokens, attention, _ = padded_rows(batch, self.pad_token_id)
        return actors[0](tokens.to(device), attention_mask=attention.to(device)).float()


def _by_prompt(sequences: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Group]:
    """(prompt, response) pairs as groups, so a prompt is computed once for all its responses."""
    responses: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prompt, response in sequences:
        responses.setdefault(prompt, []).append(response)
    return [Group(prompt, tuple(several)) for prompt, several in responses.items()]
