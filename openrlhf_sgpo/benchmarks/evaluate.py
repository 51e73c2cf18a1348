"""The stages of ``openrlhf-sgpo evaluate``.

    items -> answers, by the rollout engines or from files -> judgements -> results -> leaderboard

Stored work is reused: answers are kept by model and item, judgements by judge and request. A stopped command that is started
again only makes what is missing, and models can be added to a leaderboard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from openrlhf_sgpo import flags
from openrlhf_sgpo.benchmarks import tasks
from openrlhf_sgpo.benchmarks.anchors import choose_anchors, name_conflicts
from openrlhf_sgpo.benchmarks.answers import SETTINGS, Answerer, identity, positions, write_responses
from openrlhf_sgpo.benchmarks.benchmark_files import read_fields
from openrlhf_sgpo.benchmarks.judge import EvaluationJudge
from openrlhf_sgpo.benchmarks.leaderboard import RESULT, judge_folder, pools, write_leaderboard
from openrlhf_sgpo.benchmarks.settings import Contestant, Loaded
from openrlhf_sgpo.benchmarks.task import Responses, Result, Task
from openrlhf_sgpo.config import ModelSettings
from openrlhf_sgpo.data.template import refuse_unread_variables
from openrlhf_sgpo.integrity import hash_of
from openrlhf_sgpo.ledger import Ledger, increase
from openrlhf_sgpo.output import log_to, say
from openrlhf_sgpo.rollout import check_rollout
from openrlhf_sgpo.run_folder import LOCK, MOMENT, RunFolder, read_json, write_json, write_jsonl


class Evaluation:
    """One evaluation. Problems with files and model folders are raised on construction, before anything expensive."""

    def __init__(self, loaded: Loaded):
        self.settings = settings = loaded.settings
        self.contestants = loaded.contestants
        policies = [contestant for contestant in self.contestants if contestant.folder]
        self.tasks = {name: tasks.get(name)(options) for name, options in loaded.options.items()}
        self.items = {name: task.items() for name, task in self.tasks.items()}
        if settings.anchors:
            (task,) = self.tasks.values()
            anchors = choose_anchors(task, settings.anchors, settings.anchors_from)
            flags.refuse(name_conflicts(self.contestants, anchors))
            self.contestants = [*self.contestants, *anchors]
        self.config = settings.inference(ModelSettings(trust_remote_code=settings.trust_remote_code))
        if not loaded.max_len_given:
            # All models share the engines' length, so the default is capped at the shortest model's.
            shortest = min([settings.data.max_len, *(positions(policy.folder, self.config) for policy in policies)])
            self.config = replace(self.config, data=replace(settings.data, max_len=shortest))
        self.answerer = Answerer(self.config)
        self.file_answers = {entry.name: self._read(entry) for entry in self.contestants if entry.file}
        self.folder = RunFolder(settings.out, "out")
        moment = self.folder.moment()
        self.chats = {policy.name: self.answerer.chat(policy.folder, moment) for policy in policies}
        refuse_unread_variables([chat.template for chat in self.chats.values()])
        # The items that fit, by model and task.
        self.fitting = {
            (name, task): self.answerer.fitting(chat, name, task, items, settings.partial)
            for name, chat in self.chats.items()
            for task, items in self.items.items()
        }
        if self.chats:
            check_rollout(self.config)
        self._take_folder()
        log_to(self.folder.path)
        for contestant in self.contestants:
            self._check_name(contestant)
        self.ledger = Ledger(self.folder.path / "ledger.json", writes=True)
        for name, items in self.items.items():
            rows = ({"id": item.id, "turns": item.turns, "category": item.category} for item in items)
            write_jsonl(self.folder.path / "items" / f"{name}.jsonl", rows)

    def execute(self) -> list[Result]:
        """Make all missing answers and judgements, then print and draw the leaderboard; returns the rows of this call."""
        judge, judged = None, any(task.judged for task in self.tasks.values())
        try:
            if judged:
                judge = EvaluationJudge(self.settings.judge, self.folder.path, self.settings.partial)
            if judge and not judge.local:
                self._state_cost(
                    judge, {(name, task): rows for name, rows in self.file_answers.items() for task in self.tasks}
                )
                self._preflight(judge)
            responses = self._answers()
            if judge and judge.local:  # the engines have freed its memory
                self._preflight(judge)
            if judge and self.chats:
                self._state_cost(judge, responses)
            results = [
                self._result(name, contestant, responses[contestant.name, name], judge)
                for name in self.tasks
                for contestant in self.contestants
            ]
            unread = [result for result in results if result.parse_failures and not self.settings.partial]
            for result in results:
                file = self._result_folder(result.model, result.task, result.judge) / RESULT
                if result in unread:
                    file.unlink(missing_ok=True)  # of answers that have been replaced
                else:
                    write_json(file, asdict(result))
            for name, task in self.tasks.items():
                for rows in pools(self.folder.path, name):
                    for folder, result in task.pooled(rows).items():
                        write_json(folder / RESULT, asdict(result))
        finally:
            self.answerer.close()
            if judge:
                judge.close()
        say(write_leaderboard(self.folder.path))
        from openrlhf_sgpo.report import write_report

        say(write_report(self.folder.path))
        if unread:
            listed = ", ".join(f"{row.model} {row.task} {row.parse_failures} of {row.expected}" for row in unread)
            raise ValueError(
                f"judgements that cannot be read: {listed}. These rows are not in the leaderboard; --partial accepts them and "
                "notes it in the rows"
            )
        return results

    def _answers(self) -> dict[tuple[str, str], dict[str, Responses]]:
        """All responses, by model and task."""
        responses = {}
        if self.chats:
            from openrlhf_sgpo.openrlhf import build_strategy

            build_strategy(self.config)  # engines are driven from a process group
        for contestant in self.contestants:
            for name in self.tasks:
                path = self._answers_of(contestant.name, name)
                if contestant.file:
                    stored = responses[contestant.name, name] = self.file_answers[contestant.name]
                    write_responses(path, self.items[name], stored, _file_identity(contestant))
                    continue
                with self.ledger.stage(f"{contestant.name}/{name}/answers", add=True) as cost:
                    items = self.fitting[contestant.name, name]
                    responses[contestant.name, name] = self.answerer.answer(
                        self.chats[contestant.name], contestant.folder, name, items, path, cost
                    )
        self.answerer.close()  # a judge may need its memory
        return responses

    def _state_cost(self, judge: EvaluationJudge, responses: Mapping[tuple[str, str], Mapping[str, Responses]]) -> None:
        """Print what judging these responses, by model and task, may cost. Raises JudgeError if it may exceed the limit."""
        judge.state_cost(
            [
                task.requests([item for item in self.items[name] if item.id in rows], rows, judge)
                for (_, name), rows in responses.items()
                if (task := self.tasks[name]).judged
            ]
        )

    def _preflight(self, judge: EvaluationJudge) -> None:
        for task in self.tasks.values():
            for note in task.preflight(judge) if task.judged else []:
                say(f"{task.name}: {note}")

    def _result(
        self, name: str, contestant: Contestant, responses: Mapping[str, Responses], judge: EvaluationJudge | None
    ) -> Result:
        """One row of the leaderboard, not written yet; files in the benchmark's own formats are."""
        task, items = self.tasks[name], self.items[name]
        answered = [item for item in items if item.id in responses]
        identity = _identity(task, judge)
        folder = self._result_folder(contestant.name, name, identity)
        with self.ledger.stage(f"{contestant.name}/{name}/judge", add=True) as cost:
            before = judge.usage() if judge else {}
            try:
                result = task.evaluate(contestant.name, answered, responses, judge if task.judged else None, folder)
            finally:
                cost |= increase(before, judge.usage()) if judge else {}
        decoding = {"answers": contestant.file} if contestant.file else self.answerer.decoding()
        if contestant.published:
            decoding["answers"] = "published"
        if not contestant.file and all(item.temperature is not None for item in answered):
            decoding["temperature"] = "the benchmark's"
        return replace(
            result,
            expected=result.expected * len(items) // len(answered),
            notes=[*result.notes, *_remarks(len(items), responses)],
            judge=identity,
            decoding=decoding,
            published=dict(contestant.published),
        )

    def _answers_of(self, model: str, task: str) -> Path:
        return self.folder.path / model / "answers" / f"{task}.jsonl"

    def _result_folder(self, model: str, task: str, judge: Mapping[str, Any] | None) -> Path:
        """MODEL/TASK, or MODEL/TASK/JUDGE for judged tasks."""
        folder = self.folder.path / model / task
        return folder / judge_folder(judge)

    def _read(self, contestant: Contestant) -> dict[str, Responses]:
        """The responses to this evaluation's items in a file of answers. Raises ValueError if some are missing."""
        ((name, task),) = self.tasks.items()
        path = Path(contestant.file)
        try:
            answers = {response.id: response for response in task.read_responses(path)}
        except ValueError as error:
            if formats := _formats(path) - {name}:
                raise ValueError(
                    f"--models {path} has the format of {' or '.join(sorted(formats))}, not of {name}, whose rows have "
                    f"{', '.join(task.answer_fields)}: give --tasks {min(formats)}, or another file"
                ) from error
            raise
        expected = {item.id for item in self.items[name]}
        missing = sorted(expected - answers.keys())
        if not expected & answers.keys() or (missing and not self.settings.partial):
            raise ValueError(
                f"--models {contestant.file}: no answer to {len(missing)} of {len(expected)} items of {name}, such as "
                f"{', '.join(missing[:5])}; add them, or give --partial"
            )
        return {key: response for key, response in answers.items() if key in expected}

    def _check_name(self, contestant: Contestant) -> None:
        """Raises ValueError if this name already holds another model's answers, whose rows would be replaced."""
        for settings in sorted((self.folder.path / contestant.name / "answers").glob(f"*{SETTINGS}")):
            task = settings.name.removesuffix(SETTINGS)
            answers, stored = self._answers_of(contestant.name, task), read_json(settings)
            # A file of answers does not identify its model, so it only counts for its own benchmark.
            if not answers.exists() or (task not in self.tasks and (contestant.file or "file" in stored)):
                continue
            now = _file_identity(contestant) if contestant.file else identity(contestant.folder)
            if any(stored.get(name) != value for name, value in now.items()):
                raise ValueError(
                    f"--models: {contestant.name} is the name of another model in --out {self.folder.path}, whose answers to "
                    f"{task} came from {stored.get('model') or 'another file'}: choose another name, as in "
                    f"NAME={contestant.folder or contestant.file}, or another --out, or delete {answers}"
                )

    def _take_folder(self) -> None:
        """Lock the folder. Raises ValueError if it is in use or holds something else."""
        path = self.folder.path
        harmless = {LOCK, MOMENT, "items"}  # all that an evaluation killed at its start can leave
        entries = {entry.name.removesuffix(".partial") for entry in path.glob("*")} - harmless
        if entries and not (path / "items").exists():
            raise ValueError(f"--out {path} is not empty, and not a leaderboard: choose another folder")
        self.folder.lock()
        for chat in self.chats.values():
            self.folder.keep_moment(chat.template, begun=(path / "ledger.json").exists())


def _file_identity(contestant: Contestant) -> dict[str, Any]:
    """What identifies a file of answers, wherever it is."""
    return {"file": hash_of([Path(contestant.file).read_bytes()])}


def _formats(path: Path) -> set[str]:
    """The benchmarks whose answer format the file has."""
    formats = set()
    for name in tasks.names():
        try:
            read_fields(path, tasks.get(name).answer_fields)
        except ValueError:
            continue
        formats.add(name)
    return formats


def _identity(task: Task, judge: EvaluationJudge | None) -> dict[str, Any] | None:
    """The judge's identity, limited to what affects the task."""
    if judge is None or not task.judged:
        return None
    return {name: value for name, value in judge.identity.items() if name != "logprobs" or task.reads_logprobs}


def _remarks(items: int, responses: Mapping[str, Responses]) -> list[str]:
    cut = sum(any(response.truncated) for response in responses.values())
    missing = items - len(responses)
    return [f"{cut} of {len(responses)} answers were cut at --rollout.max_new_tokens"] * bool(cut) + [
        f"{missing} of {items} items have no answer"
    ] * bool(missing)
