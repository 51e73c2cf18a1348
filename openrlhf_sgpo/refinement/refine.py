"""The stages of ``openrlhf-sgpo refine``.

    prompts -> y_1 -> y_2 -> ... -> y_depth        a chain: y_1 ~ pi(.|x) or a draft, y_i ~ omega(.|x, y_{i-1}), which is pi
                                                   in its second role, or a follower with weights of its own
    prompts -> independent y ~ pi(.|x)             until their tokens are those of the chain
    both -> oracle -> preferences -> table         if there is an oracle

A stage's rows are taken from its file if that is there, so that a stopped refinement goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path

from openrlhf_sgpo import flags
from openrlhf_sgpo.data.records import Prompt, fingerprint, load_prompts
from openrlhf_sgpo.inference import Policy
from openrlhf_sgpo.output import say
from openrlhf_sgpo.refinement.budget import affordable, further
from openrlhf_sgpo.refinement.drafts import Draft, load_drafts
from openrlhf_sgpo.refinement.preferences import Answers, chain_preferences, choose
from openrlhf_sgpo.refinement.results import (
    Row,
    Writers,
    alpaca_eval_outputs,
    answer_rows,
    figures_by_depth,
    refinement_table,
)
from openrlhf_sgpo.refinement.settings import RefineSettings, inference
from openrlhf_sgpo.rollout import Sample, sampling_of
from openrlhf_sgpo.rollout.base import prompt_seed
from openrlhf_sgpo.rollout.roles import Tokens, follower_context, follower_messages, follower_room
from openrlhf_sgpo.run_folder import write_json, write_jsonl, write_text
from openrlhf_sgpo.staged_command import StagedCommand

WHOLE = 2**31  # tokens, more than any text has


class Refinement(StagedCommand):
    """One refinement."""

    def __init__(self, settings: RefineSettings, policy: Policy):
        self.settings = settings
        self.policy = policy
        records = load_prompts(settings.prompts, settings.split) if settings.prompts else None
        self.drafts: dict[str, Draft] = {}
        if settings.drafts:
            records, self.drafts = load_drafts(settings.drafts, records)
        assert records is not None
        config = inference(settings, policy.folder)
        super().__init__(settings, config, policy.folder, "model")
        new = config.rollout.max_new_tokens
        self.longest = config.data.max_len - new  # context of an answer, in tokens
        name = f"--prompts {settings.prompts}" if settings.prompts else f"--drafts {settings.drafts}"
        room = follower_room(self.chat, settings.follower_prompt, new) if settings.depth > 1 else new
        self.read_prompts(records, name, room)
        digests = {"--prompts": fingerprint(records)}
        if self.drafts:
            digests["--drafts"] = fingerprint(list(self.drafts.values()))  # type: ignore[arg-type]
        self.begin(flags.dump({"": replace(settings, resume=False)}), digests)

    def execute(self) -> Row:
        """All stages that are not finished yet, and the results; returns the summary."""
        try:
            chains = self._chains()
            budgets = [list(accumulate(sample.tokens for sample in chain)) for chain in chains]
            samples = self._independent([budget[-1] for budget in budgets])
        finally:
            self.close_engine()
        answers = []
        for prompt, chain, own, budget in zip(self.prompts, chains, samples, budgets, strict=True):
            lengths = [one.tokens for one in own]
            counts = [affordable(lengths, total) for total in budget]
            answers.append(Answers(prompt, chain, own, counts, self._draft_by(prompt)))
        best, preferences = self._judged(answers) if self.settings.oracle else ([], [])
        return self._write(answers, best, preferences)

    def _chains(self) -> list[list[Sample]]:
        """For each prompt its answers by depth."""
        seed, instruction = self.config.train.seed, self.settings.follower_prompt
        if self.drafts:
            chains = [[self._draft(prompt)] for prompt in self.prompts]
        else:
            chains = self._generate("depth_1", self.policy.folder, [(tokens, 1) for tokens in self.tokens], seed)
        for depth in range(2, self.settings.depth + 1):
            contexts = [
                follower_context(self.chat, prompt, chain[-1], instruction, self.longest)
                for prompt, chain in zip(self.prompts, chains, strict=True)
            ]
            requests = [(context, 1) for context in contexts]
            found = self._generate(f"depth_{depth}", self.policy.follower, requests, prompt_seed(seed, (depth,)))
            for chain, (one,) in zip(chains, found, strict=True):
                chain.append(one)
        return chains

    def _draft(self, prompt: Prompt) -> Sample:
        draft = self.drafts[prompt.id]
        return Sample(draft.text, draft.truncated, self.chat.response(draft.text, draft.truncated, WHOLE))

    def _draft_by(self, prompt: Prompt) -> str:
        return self.drafts[prompt.id].generator if self.drafts else ""

    def _drafts_cut(self) -> int:
        """How many drafts are too long to be shown whole."""
        told = self.settings.follower_prompt
        drafts = [(prompt, self.drafts[prompt.id].text) for prompt in self.prompts] if self.drafts else []
        contexts = (
            self.chat.prompt(follower_messages(prompt.messages, text, told), prompt.template_kwargs, complete=False)
            for prompt, text in drafts
        )
        return sum(len(context) > self.longest for context in contexts)

    def _independent(self, budgets: list[int]) -> list[list[Sample]]:
        """For each prompt independent answers, until they have as many tokens as its chain."""
        samples: list[list[Sample]] = [[] for _ in budgets]
        if not self.settings.controls:
            return samples
        depth, most = self.settings.depth, self.settings.control_samples
        for wave in count(1):
            wanted = [
                further([one.tokens for one in own], budget, depth, most)
                for own, budget in zip(samples, budgets, strict=True)
            ]
            if not any(wanted):
                return samples
            requests = list(zip(self.tokens, wanted, strict=True))
            # Depth 0, so to speak: other random numbers than those of the chains.
            wave_seed = prompt_seed(self.config.train.seed, (0, wave))
            found = self._generate(f"independent_{wave}", self.policy.folder, requests, wave_seed)
            for own, new in zip(samples, found, strict=True):
                own += new
        raise AssertionError  # count has no end

    def _judged(self, answers: Sequence[Answers]) -> tuple[list[list[int]], list[Row]]:
        """By prompt and depth the best of the samples, empty if that is not asked for; and the rows of preferences."""
        config, controls = self.config, self.settings.controls or []
        judge = self.make_oracle()
        best: list[list[int]] = []
        try:
            if "best_of_n" in controls:
                chosen = self.stage("best_of_n", lambda _: choose(judge, answers), judge.usage)
                best = [row["best"] for row in chosen]
            return best, self.stage(
                "preferences",
                lambda _: chain_preferences(judge, answers, "iid" in controls, best, config.train.seed),
                judge.usage,
            )
        finally:
            judge.close()

    def _generate(
        self, name: str, folder: str, requests: Sequence[tuple[Tokens, int]], seed: int
    ) -> list[list[Sample]]:
        """n samples for each (context, n) that is asked for, by the weights in a folder."""

        def work(cost: dict[str, float]) -> list[Row]:
            engine = self.engine(folder)
            found: dict[int, list[Sample]] = {}
            for n in sorted({n for _, n in requests} - {0}):
                numbers = [number for number, (_, wanted) in enumerate(requests) if wanted == n]
                contexts = [requests[number][0] for number in numbers]
                label = name.replace("_", " ") + (f", {n} each" if n > 1 else "")
                samples = engine.generate(contexts, sampling_of(self.config.rollout, seed, n), label)
                found |= dict(zip(numbers, samples, strict=True))
                cost["tokens_prompt"] = cost.get("tokens_prompt", 0) + sum(map(len, contexts))
            cost["samples"] = sum(map(len, found.values()))
            cost["tokens_generated"] = sum(one.tokens for own in found.values() for one in own)
            return [
                {
                    "id": prompt.id,
                    "context_tokens": len(context),
                    "samples": [
                        {"text": one.text, "truncated": one.truncated, "token_ids": one.token_ids}
                        for one in found.get(number, [])
                    ],
                }
                for number, (prompt, (context, _)) in enumerate(zip(self.prompts, requests, strict=True))
            ]

        return [
            [Sample(one["text"], one["truncated"], tuple(one["token_ids"])) for one in row["samples"]]
            for row in self.stage(name, work)
        ]

    def _samples_cut(self, one: Answers) -> bool:
        """Whether the chain would have paid for more than ``--control_samples``."""
        spent = sum(sample.tokens for sample in one.samples)
        return len(one.samples) == self.settings.control_samples and spent < sum(sample.tokens for sample in one.chain)

    def _write(self, answers: Sequence[Answers], best: list[list[int]], preferences: list[Row]) -> Row:
        settings, path = self.settings, self.folder.path
        by = Writers(self.policy.name, Path(settings.prompts or settings.drafts).stem, settings.follower_prompt)
        found = [
            row for number, one in enumerate(answers) for row in answer_rows(one, best[number] if best else [], by)
        ]
        write_jsonl(path / "answers.jsonl", found)
        for name, outputs in alpaca_eval_outputs(found, by.dataset).items():
            write_json(path / name, outputs)
        summary: Row = {
            "model": self.policy.name,
            "policy": self.policy.folder,
            "follower": self.policy.follower,
            "prompts": len(answers),
            "drafts": settings.drafts,
            "drafts_cut": self._drafts_cut(),
            "oracle": settings.oracle,
            "samples_cut": sum(self._samples_cut(one) for one in answers),
            "depths": figures_by_depth(answers, preferences),
        }
        write_json(path / "summary.json", summary)
        text = refinement_table(summary["depths"])
        write_text(path / "table.txt", text)
        say(text)
        return summary
