"""The stages of ``openrlhf-sgpo evaluate``.

    items -> answers, by the rollout engines or from files -> judgements -> results -> leaderboard

What is there is not made again: answers are kept by model and item, judgements by what was asked of which judge. So the same
command, stopped at any moment and started again, asks for what is missing only, and models can be added to a leaderboard.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openrlhf_sgpo.benchmarks import tasks
from openrlhf_sgpo.benchmarks.answers import SETTINGS, Answerer, identity, positions, write_responses
from openrlhf_sgpo.benchmarks.benchmark_files import read_fields
from openrlhf_sgpo.benchmarks.judge import EvaluationJudge
from openrlhf_sgpo.benchmarks.leaderboard import judge_name, write_leaderboard, write_result
from openrlhf_sgpo.benchmarks.settings import Contestant, Loaded
from openrlhf_sgpo.benchmarks.task import Responses, Result, Task
from openrlhf_sgpo.config import ModelSettings
from openrlhf_sgpo.data.template import refuse_unread_variables
from openrlhf_sgpo.ledger import Ledger
from openrlhf_sgpo.output import log_to, say
from openrlhf_sgpo.rollout import check_rollout
from openrlhf_sgpo.run_folder import LOCK, MOMENT, RunFolder, read_json, write_jsonl


class Evaluation:
    """One evaluation. Everything that can be wrong with files, models' folders and the judge is found first."""

    def __init__(self, loaded: Loaded):
        self.settings = settings = loaded.settings
        self.contestants = loaded.contestants
        self.tasks = {name: tasks.get(name)(options) for name, options in loaded.options.items()}
        self.items = {name: task.items() for name, task in self.tasks.items()}
        self.config = settings.inference(ModelSettings(trust_remote_code=settings.trust_remote_code))
        if not loaded.max_len_given:
            # Engines have one length for all models: the default is no longer than the shortest of them.
            folders = [one.folder for one in self.contestants if one.folder]
            shortest = min([settings.data.max_len, *(positions(one, self.config) for one in folders)])
            self.config = replace(self.config, data=replace(settings.data, max_len=shortest))
        self.answerer = Answerer(self.config)
        self.given = {one.name: self._read(one) for one in self.contestants if one.file}
        self.folder = RunFolder(settings.out, "out")
        moment = self.folder.moment()
        self.chats = {one.name: self.answerer.chat(one.folder, moment) for one in self.contestants if one.folder}
        refuse_unread_variables([chat.template for chat in self.chats.values()])
        # By model and task, what it has room to answer.
        self.fitting = {
            (name, task): self.answerer.fitting(chat, name, task, items, settings.partial)
            for name, chat in self.chats.items()
            for task, items in self.items.items()
        }
        if self.chats:
            check_rollout(self.config)
        self._take_folder()
        log_to(self.folder.path)
        for one in self.contestants:
            self._check_name(one)
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
            unread = [one for one in results if one.parse_failures and not self.settings.partial]
            for one in results:
                if one not in unread:
                    write_result(one, self._result_folder(one.model, one.task, one.judge))
        finally:
            self.answerer.close()
            if judge:
                judge.close()
        say(write_leaderboard(self.folder.path))
        from openrlhf_sgpo.report import write_report

        say(write_report(self.folder.path))
        if unread:
            listed = ", ".join(f"{one.model} {one.task} {one.parse_failures} of {one.expected}" for one in unread)
            raise ValueError(
                f"judgements that cannot be read: {listed}. These rows are not in the leaderboard; --partial accepts them, and "
                "the rows then say so"
            )
        return results

    def _answers(self) -> dict[tuple[str, str], dict[str, Responses]]:
        """By model and task."""
        found = {}
        if self.chats:
            from openrlhf_sgpo.openrlhf import build_strategy

            build_strategy(self.config)  # engines are driven from a process group
        for one in self.contestants:
            for name in self.tasks:
                path = self._answers_of(one.name, name)
                if one.file:
                    found[one.name, name] = self.given[one.name]
                    write_responses(path, self.items[name], found[one.name, name], _file_identity(one))
                    continue
                with self.ledger.stage(f"{one.name}/{name}/answers", add=True) as cost:
                    items = self.fitting[one.name, name]
                    found[one.name, name] = self.answerer.answer(
                        self.chats[one.name], one.folder, name, items, path, cost
                    )
        self.answerer.close()  # a judge may need its memory
        return found

    def _preflight(self, judge: EvaluationJudge) -> None:
        for task in self.tasks.values():
            for note in task.preflight(judge) if task.judged else []:
                say(f"{task.name}: {note}")

    def _result(
        self, name: str, contestant: Contestant, responses: Mapping[str, Responses], judge: EvaluationJudge | None
    ) -> Result:
        """With files in the benchmark's own formats, but not written itself."""
        task, items = self.tasks[name], self.items[name]
        answered = [one for one in items if one.id in responses]
        identity = _identity(task, judge)
        folder = self._result_folder(contestant.name, name, identity)
        with self.ledger.stage(f"{contestant.name}/{name}/judge", add=True) as cost:
            before = judge.usage() if judge else {}
            try:
                result = task.evaluate(contestant.name, answered, responses, judge if task.judged else None, folder)
            finally:
                cost |= {key: total - before[key] for key, total in judge.usage().items()} if judge else {}
        decoding = {"answers": contestant.file} if contestant.file else self.answerer.decoding()
        if not contestant.file and all(one.temperature is not None for one in answered):
            decoding["temperature"] = "the benchmark's"
        return replace(
            result,
            expected=result.expected * len(items) // len(answered),
            notes=[*result.notes, *_remarks(len(items), responses)],
            judge=identity,
            decoding=decoding,
        )

    def _answers_of(self, model: str, task: str) -> Path:
        return self.folder.path / model / "answers" / f"{task}.jsonl"

    def _result_folder(self, model: str, task: str, judge: Mapping[str, Any] | None) -> Path:
        """MODEL/TASK, and for judged tasks a folder for the judge, by its identity, in it."""
        folder = self.folder.path / model / task
        return folder / re.sub(r"[^\w.+-]+", "_", judge_name(judge).strip("/")) if judge else folder

    def _read(self, contestant: Contestant) -> dict[str, Responses]:
        """Of a file of answers, those to items that are asked for. Raises ValueError if there is not one to each."""
        ((name, task),) = self.tasks.items()
        path = Path(contestant.file)
        try:
            found = {one.id: one for one in task.read_responses(path)}
        except ValueError as error:
            if others := _formats(path) - {name}:
                raise ValueError(
                    f"--models {path} has the format of {' or '.join(sorted(others))}, not of {name}, whose rows have "
                    f"{', '.join(task.answer_fields)}: give --tasks {min(others)}, or another file"
                ) from error
            raise
        asked = {one.id for one in self.items[name]}
        missing = sorted(asked - found.keys())
        if not asked & found.keys() or (missing and not self.settings.partial):
            raise ValueError(
                f"--models {contestant.file}: no answer to {len(missing)} of {len(asked)} items of {name}, such as "
                f"{', '.join(missing[:5])}; add them, or give --partial"
            )
        return {key: one for key, one in found.items() if key in asked}

    def _check_name(self, contestant: Contestant) -> None:
        """Raises ValueError if another model's answers are under this name, so that its rows are not replaced."""
        for settings in sorted((self.folder.path / contestant.name / "answers").glob(f"*{SETTINGS}")):
            task = settings.name.removesuffix(SETTINGS)
            answers, stored = self._answers_of(contestant.name, task), read_json(settings)
            # A file says nothing of the model that wrote it: it stands for its own benchmark only.
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
        """Raises ValueError if the folder is in use, or is something else's."""
        path = self.folder.path
        own = {LOCK, MOMENT, "items"}  # a process that was killed at once left no more than these
        others = {entry.name.removesuffix(".partial") for entry in path.glob("*")} - own
        if others and not (path / "items").exists():
            raise ValueError(f"--out {path} is not empty and no leaderboard: choose another folder")
        self.folder.lock()
        for chat in self.chats.values():
            self.folder.keep_moment(chat.template, begun=(path / "ledger.json").exists())


def _file_identity(contestant: Contestant) -> dict[str, Any]:
    """By which a file of answers is known again, wherever it lies."""
    return {"file": hashlib.blake2b(Path(contestant.file).read_bytes(), digest_size=16).hexdigest()}


def _formats(path: Path) -> set[str]:
    """The benchmarks in whose format of answers a file may be."""
    found = set()
    for name in tasks.names():
        try:
            read_fields(path, tasks.get(name).answer_fields)
        except ValueError:
            continue
        found.add(name)
    return found


def _identity(task: Task, judge: EvaluationJudge | None) -> dict[str, Any] | None:
    """Of the judge, as far as it matters to the task."""
    if judge is None or not task.judged:
        return None
    return {name: value for name, value in judge.identity.items() if name != "logprobs" or task.reads_logprobs}


def _remarks(items: int, responses: Mapping[str, Responses]) -> list[str]:
    cut = sum(any(one.truncated) for one in responses.values())
    missing = items - len(responses)
    return [f"{cut} of {len(responses)} answers were cut at --rollout.max_new_tokens"] * bool(cut) + [
        f"{missing} of {items} items have no answer"
    ] * bool(missing)
