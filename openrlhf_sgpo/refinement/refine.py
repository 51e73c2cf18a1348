"""The stages of ``openrlhf-sgpo refine``.

    prompts -> y_1 -> y_2 -> ... -> y_depth        a chain: y_1 ~ pi(.|x) or a draft, y_i ~ omega(.|x, y_{i-1}), where omega is
                                                   pi as its own follower, or a follower with separate weights
    prompts -> independent y ~ pi(.|x)             with as many tokens as the chain
    both -> oracle -> preferences -> table         with --oracle

A finished stage is read from its file, so a stopped refinement continues where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path

from openrlhf_sgpo import flags
from openrlhf_sgpo.data.records import Answer, Prompt, fingerprint, load_prompts
from openrlhf_sgpo.inference import Policy
from openrlhf_sgpo.output import say
from openrlhf_sgpo.refinement.budget import affordable, further
from openrlhf_sgpo.refinement.drafts import Draft, load_drafts
from openrlhf_sgpo.refinement.preferences import Answers, chain_preferences, choose
from openrlhf_sgpo.refinement.results import Row, alpaca_eval_outputs, answer_rows, figures_by_depth, refinement_table
from openrlhf_sgpo.refinement.settings import RefineSettings, inference
from openrlhf_sgpo.rollout import sampling_of
from openrlhf_sgpo.rollout.base import prompt_seed
from openrlhf_sgpo.rollout.roles import Tokens, follower_context, follower_room
from openrlhf_sgpo.run_folder import write_json, write_jsonl, write_text
from openrlhf_sgpo.staged_command import StagedCommand

WHOLE = 2**31  # tokens, more than any text has: no limit


class Refinement(StagedCommand):
    """One refinement."""

    def __init__(self, settings: RefineSettings, policy: Policy):
        self.settings = settings
        self.policy = policy
        records = load_prompts(settings.prompts, settings.split) if settings.prompts else None
        self.drafts: dict[str, Draft] = {}
        self.drafts_cut = 0  # how many are too long to be shown whole
        if settings.drafts:
            records, self.drafts = load_drafts(settings.drafts, records)
        assert records is not None
        config = inference(settings, policy.folder)
        super().__init__(settings, config, policy.folder, "model")
        new = config.rollout.max_new_tokens
        self.longest = config.data.max_len - new  # limit on the context of an answer, in tokens
        name = f"--prompts {settings.prompts}" if settings.prompts else f"--drafts {settings.drafts}"
        room = follower_room(self.chat, settings.follower_prompt, new) if settings.depth > 1 else new
        self.read_prompts(records, name, room)
        digests = {"--prompts": fingerprint(records)}
        if self.drafts:
            digests["--drafts"] = fingerprint(list(self.drafts.values()))  # type: ignore[arg-type]
        self.begin(flags.dump({"": replace(settings, resume=False)}), digests)

    def execute(self) -> Row:
        """Run all unfinished stages and write the results; returns the summary."""
        try:
            chains = self._chains()
            budgets = [list(accumulate(sample.tokens for sample in chain)) for chain in chains]
            samples = self._independent([budget[-1] for budget in budgets])
        finally:
            self.close_engine()
        answers = []
        for prompt, chain, independent, budget in zip(self.prompts, chains, samples, budgets, strict=True):
            lengths = [sample.tokens for sample in independent]
            counts = [affordable(lengths, total) for total in budget]
            draft_by = self.drafts[prompt.id].generator if self.drafts else ""
            answers.append(Answers(prompt, chain, independent, counts, draft_by))
        best, preferences = self._judged(answers) if self.settings.oracle else ([], [])
        return self._write(answers, best, preferences)

    def _chains(self) -> list[list[Answer]]:
        """The chain of each prompt: its answers by depth."""
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
            if self.drafts and depth == 2:
                self.drafts_cut = sum(cut for _, cut in contexts)
            requests = [(context, 1) for context, _ in contexts]
            revisions = self._generate(f"depth_{depth}", self.policy.follower, requests, prompt_seed(seed, (depth,)))
            for chain, revision in zip(chains, revisions, strict=True):
                chain += revision
        return chains

    def _draft(self, prompt: Prompt) -> Answer:
        draft = self.drafts[prompt.id]
        return Answer(draft.text, draft.truncated, self.chat.response(draft.text, draft.truncated, WHOLE))

    def _independent(self, budgets: list[int]) -> list[list[Answer]]:
        """Independent answers to each prompt, until they have as many tokens as its chain."""
        samples: list[list[Answer]] = [[] for _ in budgets]
        if not self.settings.controls:
            return samples
        depth, most = self.settings.depth, self.settings.control_samples
        for wave in count(1):
            needed = [
                further([sample.tokens for sample in drawn], budget, depth, most)
                for drawn, budget in zip(samples, budgets, strict=True)
            ]
            if not any(needed):
                return samples
            requests = list(zip(self.tokens, needed, strict=True))
            # As depth 0, to draw other random numbers than the chains.
            wave_seed = prompt_seed(self.config.train.seed, (0, wave))
            batches = self._generate(f"independent_{wave}", self.policy.folder, requests, wave_seed)
            for drawn, batch in zip(samples, batches, strict=True):
                drawn += batch
        raise AssertionError  # count has no end

    def _judged(self, answers: Sequence[Answers]) -> tuple[list[list[int]], list[Row]]:
        """The index of the best sample by prompt and depth, empty without best_of_n; and the rows of preferences."""
        controls = self.settings.controls or []
        best: list[list[int]] = []
        with closing(self.make_oracle()) as judge:
            if "best_of_n" in controls:
                chosen = self.stage("best_of_n", lambda _: choose(judge, answers), judge.usage)
                best = [row["best"] for row in chosen]
            return best, self.stage(
                "preferences",
                lambda _: chain_preferences(judge, answers, "iid" in controls, best, self.config.train.seed),
                judge.usage,
            )

    def _generate(
        self, name: str, folder: str, requests: Sequence[tuple[Tokens, int]], seed: int
    ) -> list[list[Answer]]:
        """n samples for each request (context, n), from the weights in ``folder``."""

        def work(cost: dict[str, float]) -> list[Row]:
            engine = self.engine(folder)
            drawn: dict[int, list[Answer]] = {}
            for n in sorted({n for _, n in requests} - {0}):
                numbers = [number for number, (_, size) in enumerate(requests) if size == n]
                contexts = [requests[number][0] for number in numbers]
                label = name.replace("_", " ") + (f", {n} each" if n > 1 else "")
                samples = engine.generate(contexts, sampling_of(self.config.rollout, seed, n), label)
                drawn |= dict(zip(numbers, samples, strict=True))
                cost["tokens_prompt"] = cost.get("tokens_prompt", 0) + sum(map(len, contexts))
            cost["samples"] = sum(map(len, drawn.values()))
            cost["tokens_generated"] = sum(sample.tokens for samples in drawn.values() for sample in samples)
            return [
                {
                    "id": prompt.id,
                    "context_tokens": len(context),
                    "samples": [
                        {"text": sample.text, "truncated": sample.truncated, "token_ids": sample.token_ids}
                        for sample in drawn.get(number, [])
                    ],
                }
                for number, (prompt, (context, _)) in enumerate(zip(self.prompts, requests, strict=True))
            ]

        return [list(map(Answer.from_row, row["samples"])) for row in self.stage(name, work)]

    def _samples_cut(self, answers: Answers) -> bool:
        """Whether the budget of the chain allows more samples than ``--control_samples``."""
        spent, budget = (sum(sample.tokens for sample in samples) for samples in (answers.samples, answers.chain))
        return len(answers.samples) == self.settings.control_samples and spent < budget

    def _write(self, answers: Sequence[Answers], best: list[list[int]], preferences: list[Row]) -> Row:
        settings, path = self.settings, self.folder.path
        model, instruction = self.policy.name, settings.follower_prompt
        rows = [
            row
            for number, of_prompt in enumerate(answers)
            for row in answer_rows(of_prompt, best[number] if best else [], model, instruction)
        ]
        write_jsonl(path / "answers.jsonl", rows)
        dataset = Path(settings.prompts or settings.drafts).stem
        for name, outputs in alpaca_eval_outputs(rows, dataset).items():
            write_json(path / name, outputs)
        summary: Row = {
            "model": model,
            "policy": self.policy.folder,
            "follower": self.policy.follower,
            "prompts": len(answers),
            "drafts": settings.drafts,
            "drafts_cut": self.drafts_cut,
            "oracle": settings.oracle,
            "samples_cut": sum(map(self._samples_cut, answers)),
            "depths": figures_by_depth(answers, preferences),
        }
        write_json(path / "summary.json", summary)
        text = refinement_table(summary["depths"])
        write_text(path / "table.txt", text)
        say(text)
        return summary
