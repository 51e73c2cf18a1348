"""The stages of ``openrlhf-sgpo evaluate``.

    items -> answers, by the rollout engines or from files -> judgements -> results -> leaderboard

What is there is not made again: answers are kept by model and item, judgements by what was asked of which judge. So the same
command, stopped at any moment and started again, asks for what is missing only, and models can be added to a leaderboard.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from openrlhf_sgpo.evaluation import tasks
from openrlhf_sgpo.evaluation.answers import Answerer
from openrlhf_sgpo.evaluation.judge import EvaluationJudge
from openrlhf_sgpo.evaluation.leaderboard import write_leaderboard, write_result
from openrlhf_sgpo.evaluation.settings import Contestant, Loaded, run_config
from openrlhf_sgpo.evaluation.task import Responses, Result
from openrlhf_sgpo.openrlhf import build_strategy
from openrlhf_sgpo.rollout import check_rollout
from openrlhf_sgpo.run_folder import Ledger, RunFolder, write_jsonl


class Evaluation:
    """One evaluation. Everything that can be wrong with files, models' folders and the judge is found first."""

    def __init__(self, loaded: Loaded):
        self.settings = settings = loaded.settings
        self.contestants = loaded.contestants
        self.tasks = {name: tasks.get(name)(options) for name, options in loaded.options.items()}
        self.items = {name: task.items() for name, task in self.tasks.items()}
        self.config = run_config(settings)
        self.answerer = Answerer(self.config)
        self.given = {one.name: self._read(one) for one in self.contestants if one.file}
        self.chats = {
            one.name: self.answerer.check(one.name, one.folder, self.items) for one in self.contestants if one.folder
        }
        if self.chats:
            check_rollout(self.config)
        self.folder = RunFolder(settings.out, "out")
        self._take_folder()
        self.ledger = Ledger(self.folder.path / "ledger.json", writes=True)
        for name, items in self.items.items():
            rows = ({"id": one.id, "turns": one.turns, "category": one.category} for one in items)
            write_jsonl(self.folder.path / "items" / f"{name}.jsonl", rows)

    def execute(self) -> list[Result]:
        """Everything that is not there yet, then the leaderboard, which is printed and drawn; the rows of this call."""
        judge, judged = None, any(task.judged for task in self.tasks.values())
        try:
            if judged:
                judge = EvaluationJudge(self.settings.judge, self.folder.path, self.settings.partial)
            if judge and not judge.local:
                self._preflight(judge)
            responses = self._answers()
            if judge and judge.local:  # only now is there room for it
                self._preflight(judge)
            results = [
                self._result(name, one, responses[one.name, name], judge)
                for name in self.tasks
                for one in self.contestants
            ]
        finally:
            self.answerer.close()
            if judge:
                judge.close()
        print(write_leaderboard(self.folder.path), flush=True)
        from openrlhf_sgpo.evaluation.report import write_report

        print(write_report(self.folder.path), flush=True)
        return results

    # Stages ---------------------------------------------------------------------------------------------------------

    def _answers(self) -> dict[tuple[str, str], dict[str, Responses]]:
        """By model and task."""
        found = {}
        if self.chats:
            build_strategy(self.config)  # engines are driven from a process group
        for one in self.contestants:
            for name, items in self.items.items():
                if one.file:
                    found[one.name, name] = self.given[one.name]
                    continue
                path = self.folder.path / one.name / "answers" / f"{name}.jsonl"
                with self.ledger.stage(f"{one.name}/{name}/answers", add=True) as cost:
                    found[one.name, name] = self.answerer.answer(
                        self.chats[one.name], one.folder, name, items, path, cost
                    )
        self.answerer.close()  # a judge may need its memory
        return found

    def _preflight(self, judge: EvaluationJudge) -> None:
        for task in self.tasks.values():
            for note in task.preflight(judge) if task.judged else []:
                print(f"{task.name}: {note}", flush=True)

    def _result(
        self, name: str, contestant: Contestant, responses: Mapping[str, Responses], judge: EvaluationJudge | None
    ) -> Result:
        """Written into the folder. Raises ValueError where judgements could not be read, unless the user allows it."""
        task = self.tasks[name]
        folder = self.folder.path / contestant.name / name
        if task.judged and judge:
            folder /= re.sub(r"[^\w.+-]", "_", str(judge.identity["model"]).strip("/"))
        answered = [one for one in self.items[name] if one.id in responses]
        with self.ledger.stage(f"{contestant.name}/{name}/judge", add=True) as cost:
            before = judge.usage() if judge else {}
            try:
                result = task.evaluate(contestant.name, answered, responses, judge if task.judged else None, folder)
            finally:
                cost |= {key: total - before[key] for key, total in judge.usage().items()} if judge else {}
        if result.parse_failures and not self.settings.partial:
            raise ValueError(
                f"{contestant.name}, {name}: {result.parse_failures} of {result.expected} judgements cannot be read; "
                "--partial accepts that, and the row then says so"
            )
        expected = result.expected * len(self.items[name]) // len(answered)
        notes = [*result.notes, *_truncation(responses)]
        decoding = {"answers": contestant.file} if contestant.file else self.answerer.decoding()
        if not contestant.file and all(one.temperature is not None for one in answered):
            decoding["temperature"] = "the benchmark's"
        result = replace(result, expected=expected, notes=notes, decoding=decoding)
        write_result(result, folder)
        return result

    # What there is --------------------------------------------------------------------------------------------------

    def _read(self, contestant: Contestant) -> dict[str, Responses]:
        """Of a file of answers, those to items that are asked for. Raises ValueError if there is not one to each."""
        ((name, task),) = self.tasks.items()
        found = {one.id: one for one in task.read_responses(Path(contestant.file))}
        asked = {one.id for one in self.items[name]}
        missing = sorted(asked - found.keys())
        if not asked & found.keys() or (missing and not self.settings.partial):
            raise ValueError(
                f"--models {contestant.file}: no answer to {len(missing)} of {len(asked)} items of {name}, such as "
                f"{', '.join(missing[:5])}; add them, or give --partial"
            )
        return {key: one for key, one in found.items() if key in asked}

    def _take_folder(self) -> None:
        """Raises ValueError if the folder is in use, or is something else's."""
        path = self.folder.path
        if path.exists() and any(path.iterdir()) and not (path / "items").exists():
            raise ValueError(f"--out {path} is not empty and no leaderboard: choose another folder")
        self.folder.lock()


def _truncation(responses: Mapping[str, Responses]) -> Sequence[str]:
    cut = sum(any(one.truncated) for one in responses.values())
    return [f"{cut} of {len(responses)} answers were cut at --rollout.max_new_tokens"] if cut else []
