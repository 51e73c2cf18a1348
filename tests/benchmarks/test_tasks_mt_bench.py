"""MT-Bench against a real server whose rule is known, against FastChat's own code, and against published judgements."""

from __future__ import annotations

import gzip
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import pytest
from judge_server import JudgeServer

from openrlhf_sgpo.benchmarks.judge import EvaluationJudge, EvaluationJudgeSettings
from openrlhf_sgpo.benchmarks.task import Responses
from openrlhf_sgpo.benchmarks.tasks.mt_bench import (
    FIGURES,
    PROMPT_NAMES,
    Judgement,
    MTBench,
    MTBenchSettings,
    category_scores,
    grading,
    mean_score,
    of_figure,
    prompt_name,
    score,
    score_interval,
    spread,
)
from openrlhf_sgpo.judge import client
from openrlhf_sgpo.judge.client import JudgeError

pytestmark = pytest.mark.skipif(not find_spec("fastchat"), reason="needs the package fschat")

DATA = Path(__file__).parents[3] / "shared" / "data" / "mt_bench"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data, which is not shipped")
CATEGORIES = ("writing", "math", "coding", "stem")
REFERENCED = ("math", "coding")


@pytest.fixture(scope="module")
def common():
    """FastChat's module, which takes seconds to import."""
    return import_module("fastchat.llm_judge.common")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_files(folder: Path, per_category: int = 2) -> Path:
    """Questions, prompts and references written here, in FastChat's layout."""
    questions = [
        {
            "question_id": 81 + number,
            "category": CATEGORIES[number // per_category],
            "turns": [f"first {{question}} {number}", f"second question {number}"],
        }
        for number in range(per_category * len(CATEGORIES))
    ]
    write_lines(folder / "question.jsonl", questions)
    references = [
        {
            "question_id": question["question_id"],
            "choices": [{"turns": [f"reference {turn}" for turn in question["turns"]]}],
        }
        for question in questions
        if question["category"] in REFERENCED
    ]
    write_lines(folder / "reference_answer" / "gpt-4.jsonl", references)
    prompts = []
    for name in PROMPT_NAMES:
        fields = ["question_1", "answer_1", "question_2", "answer_2"] if "multi" in name else ["question", "answer"]
        fields += ["ref_answer_1"] * ("math" in name) + ["ref_answer_2"] * ("math" in name and "multi" in name)
        prompts.append(
            {
                "name": name,
                "type": "single",
                "system_prompt": f"You grade by {name}.",
                "prompt_template": "\n".join(f"<{field}>{{{field}}}</{field}>" for field in fields),
                "output_format": "[[rating]]",
            }
        )
    write_lines(folder / "judge_prompts.jsonl", prompts)
    return folder


def task_of(tmp_path: Path, per_category: int = 2, **settings) -> MTBench:
    folder = write_files(tmp_path / "files", per_category)
    return MTBench(MTBenchSettings(folder=str(folder), unverified=True, **settings))


def answers(items) -> dict[str, Responses]:
    """Answers of 1 to 9 times good and then, in turn 2, once more."""
    return {
        item.id: Responses(item.id, ("good " * (int(item.id) % 9 + 1), "good " * (int(item.id) % 9 + 2)))
        for item in items
    }


def by_the_rule(text: str) -> list[tuple[str, float]]:
    """The judge's judgement: how often the last answer says good."""
    name = "answer_2" if "<answer_2>" in text else "answer"
    graded = text.split(f"<{name}>")[-1].split(f"</{name}>")[0]
    return [(f"It says good. Rating: [[{graded.count('good')}]]", 0.0)]


def judge_of(tmp_path: Path, url: str, partial: bool = False) -> EvaluationJudge:
    return EvaluationJudge(
        EvaluationJudgeSettings(base_url=url, model="rule", max_retries=2), tmp_path / "judged", partial
    )


@pytest.mark.slow
def test_scores_are_those_of_the_rule(tmp_path):
    task = task_of(tmp_path)
    items = task.items()
    responses = answers(items)
    with JudgeServer(judge=by_the_rule) as server:
        result = task.evaluate("mine", items, responses, judge_of(tmp_path, server.url), tmp_path / "out")
        bodies = server.bodies
    assert len(bodies) == 2 * len(items) == result.n == result.expected == 16
    assert all(body["temperature"] == 0 and body["max_tokens"] == 2048 and "logprobs" not in body for body in bodies)
    first = [int(item.id) % 9 + 1 for item in items]
    assert result.figures == pytest.approx(
        {"turn_1": fmean(first), "turn_2": fmean(first) + 1, "average": fmean(first) + 0.5}
    )
    assert list(result.figures) == list(FIGURES)
    for name, (low, high) in result.intervals.items():
        assert low < result.figures[name] < high
    assert result.categories == pytest.approx(
        {name: fmean(first[2 * index : 2 * index + 2]) + 0.5 for index, name in enumerate(CATEGORIES)}
    )
    assert result.average_length == pytest.approx(5 * (fmean(first) + 0.5))
    assert result.parse_failures == 0
    assert len(result.notes) == 3 and all("is not the published file" in note for note in result.notes)


def test_files_are_what_fastchat_reads(tmp_path, common):
    import pandas

    task = task_of(tmp_path)
    items = task.items()
    responses = answers(items)
    with JudgeServer(judge=by_the_rule) as server:
        result = task.evaluate("mine", items, responses, judge_of(tmp_path, server.url), tmp_path / "out")
    read = common.load_model_answers(str(tmp_path / "out"))["model_answer"]
    assert {str(key): tuple(row["choices"][0]["turns"]) for key, row in read.items()} == {
        key: response.turns for key, response in responses.items()
    }
    table = pandas.read_json(tmp_path / "out" / "judgments.jsonl", lines=True)
    # As display_result_single of FastChat has it.
    table = table[table["score"] != -1][["model", "score", "turn"]]
    assert table.groupby(["model", "turn"])["score"].mean().to_dict() == pytest.approx(
        {("mine", turn): result.figures[f"turn_{turn}"] for turn in (1, 2)}
    )
    assert table.groupby("model")["score"].mean()["mine"] == pytest.approx(result.figures["average"])
    assert task.read_responses(tmp_path / "out" / "model_answer.jsonl") == list(responses.values())


def test_a_judgement_without_a_score_is_kept_and_counted(tmp_path):
    task = task_of(tmp_path)
    items = task.items()

    def judge(text: str) -> list[tuple[str, float]]:
        return [("I cannot say.", 0.0)] if "<question>first {question} 3<" in text else by_the_rule(text)

    with JudgeServer(judge=judge) as server:
        result = task.evaluate("mine", items, answers(items), judge_of(tmp_path, server.url), tmp_path / "out")
        again = task.evaluate("mine", items, answers(items), judge_of(tmp_path, server.url), tmp_path / "out")
        assert len(server.asked) == 16
    assert again == result
    first = [int(item.id) % 9 + 1 for item in items]
    remaining = [value for number, value in enumerate(first) if number != 3]
    assert result.figures == pytest.approx(
        {
            "turn_1": fmean(remaining),
            "turn_2": fmean(first) + 1,
            "average": (sum(remaining) + sum(first) + 8) / 15,
        }
    )
    assert (result.n, result.expected, result.parse_failures) == (15, 16, 1)
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgments.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["score"] == -1]
    assert (row["question_id"], row["turn"], row["judgment"]) == (84, 1, "I cannot say.")


@pytest.mark.slow
def test_empty_judgements_are_failures(tmp_path):
    task = task_of(tmp_path)
    items = task.items()

    def judge(text: str) -> list[tuple[str, float]]:
        return [(" ", 0.0)] if "second question 5" in text else by_the_rule(text)

    with JudgeServer(judge=judge) as server:
        with pytest.raises(JudgeError, match="the judge wrote nothing"):
            task.evaluate("mine", items, answers(items), judge_of(tmp_path, server.url), tmp_path / "out")
        judge = judge_of(tmp_path, server.url, partial=True)
        result = task.evaluate("mine", items, answers(items), judge, tmp_path / "out")
    assert (result.n, result.parse_failures) == (15, 1)
    assert len((tmp_path / "out" / "judgments.jsonl").read_text().splitlines()) == 15


def test_a_limit_takes_from_each_category_in_turn():
    questions = [{"category": name, "place": place} for place, name in enumerate("aabbac")]

    def taken(limit):
        return [row["place"] for row in spread(questions, limit)]

    assert taken(2) == [0, 2]  # the first of a and of b
    assert taken(3) == [0, 2, 5]  # of every category one
    assert taken(4) == [0, 1, 2, 5]  # then the second of a
    assert taken(0) == taken(6) == taken(9) == list(range(6))


def test_scores_out_of_range_are_said(tmp_path):
    task = task_of(tmp_path, limit=1)
    items = task.items()
    with JudgeServer(judge=lambda _: [("[[85]]", 0.0)]) as server:
        result = task.evaluate("mine", items, answers(items), judge_of(tmp_path, server.url), tmp_path / "out")
    assert result.figures["average"] == 85
    assert result.notes[-1] == "2 scores are not between 1 and 10, and count as they are"


def test_preflight_says_what_the_judge_writes(tmp_path):
    task = task_of(tmp_path)
    for written, said in (("Fine. [[7]]", "score is 7"), ("Fine.", "no score as [[5]]: 'Fine.'")):
        with JudgeServer(judge=lambda _, written=written: [(written, 0.0)]) as server:
            (note,) = task.preflight(judge_of(tmp_path / written, server.url))
            assert said in note
            assert server.bodies[0]["messages"][0]["content"] == "You grade by single-v1."
    with JudgeServer(judge=lambda _: [("", 0.0)]) as server:
        with pytest.raises(ValueError, match="the judge wrote nothing"):
            task.preflight(judge_of(tmp_path / "empty", server.url))
        with pytest.raises(ValueError, match="request for a judgement is empty"):
            task.preflight(judge_of(tmp_path / "empty", server.url, partial=True))


def fastchat_messages(monkeypatch, common, item, prompt: dict, turns: tuple[str, str], turn: int) -> list[dict]:
    """The messages that FastChat would send: its own function, but for the call of the vendor's API."""
    seen = []

    def api(model, conversation, temperature, max_tokens):
        seen.append((conversation.to_openai_api_messages(), temperature, max_tokens))
        return "[[1]]"

    monkeypatch.setattr(common, "chat_completion_openai", api)
    referenced = item.category in common.NEED_REF_CATS
    common.run_judge_single(
        {"turns": list(item.turns)},
        {"choices": [{"turns": list(turns)}]},
        common.Judge("gpt-4", prompt, ref_based=referenced, multi_turn=turn == 2),
        {"choices": [{"turns": list(item.facts["reference"])}]} if referenced else None,
        multi_turn=turn == 2,
    )
    ((messages, temperature, most),) = seen
    assert (temperature, most) == (0, 2048)
    return messages


def check_messages(monkeypatch, common, task: MTBench, judge_prompts: Path) -> None:
    from fastchat.llm_judge.gen_judgment import make_judge_single

    prompts = common.load_judge_prompts(str(judge_prompts))
    judges = make_judge_single("gpt-4", prompts)
    for item in task.items():
        turns = (f"An {{answer}} to {item.id}", "Another.")
        for turn in (1, 2):
            kind = ("math" if item.category in common.NEED_REF_CATS else "default") + ("-mt" if turn == 2 else "")
            assert judges[kind].prompt_template["name"] == prompt_name(item, turn)
            expected = fastchat_messages(monkeypatch, common, item, judges[kind].prompt_template, turns, turn)
            assert grading(prompts[prompt_name(item, turn)], item, turns) == expected


def test_messages_are_fastchats(monkeypatch, common, tmp_path):
    task = task_of(tmp_path)
    check_messages(monkeypatch, common, task, tmp_path / "files" / "judge_prompts.jsonl")
    assert {prompt_name(item, turn) for item in task.items() for turn in (1, 2)} == set(PROMPT_NAMES)


@needs_data
def test_messages_of_the_published_questions_are_fastchats(monkeypatch, common):
    check_messages(monkeypatch, common, MTBench(MTBenchSettings(folder=str(DATA))), DATA / "judge_prompts.jsonl")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Rating: [[7]]", 7),
        ("[[7.5]]", 7.5),
        ("[3] and [[8]]", 8),
        ("Rating: [4]", 4),
        ("[[1]] [[2]]", 1),
        ("Rating: 7", None),
        ("[[seven]]", None),
        ("[[-1]]", None),
    ],
)
def test_scores_are_read_as_fastchat_reads_them(monkeypatch, common, text, value):
    monkeypatch.setattr(common, "chat_completion_openai", lambda *_, **__: text)
    prompt = {"system_prompt": "", "prompt_template": "", "output_format": "[[rating]]"}
    question, answer = {"turns": ["q"]}, {"choices": [{"turns": ["a"]}]}
    rating, _, _ = common.run_judge_single(question, answer, common.Judge("gpt-4", prompt), None)
    assert score(text) == value == (None if rating == -1 else rating)


def test_temperatures_are_fastchats(tmp_path, common):
    for item in task_of(tmp_path).items():
        assert item.temperature == common.temperature_config[item.category]


def test_an_interval_draws_both_turns_of_a_question_together():
    """Two equal turns say no more than one: the interval is that of one turn."""
    scores = [1.0, 4.0, 4.0, 7.0, 9.0, 2.0]
    first_turns = [Judgement(str(number), "math", 1, value) for number, value in enumerate(scores)]
    both_turns = [*first_turns, *(judgement._replace(turn=2) for judgement in first_turns)]
    assert (
        score_interval(of_figure(both_turns, "average"))
        == score_interval(of_figure(both_turns, "turn_1"))
        == score_interval(first_turns)
    )
    low, high = score_interval(first_turns)
    # Six values: the normal interval is close.
    spread = 1.96 * (fmean((value - fmean(scores)) ** 2 for value in scores) / 6) ** 0.5
    assert (low, high) == pytest.approx((fmean(scores) - spread, fmean(scores) + spread), abs=0.4)


def test_nothing_scored_is_no_figure():
    nothing = [Judgement("1", "math", 1, None)]
    assert mean_score(nothing) is None and score_interval(nothing) is None and category_scores(nothing) == {}


def test_answers_of_other_tools_are_matched_by_question(tmp_path):
    task = task_of(tmp_path, limit=3)
    rows = [{"question_id": 81 + number, "turns": ["a", f"b{number}"]} for number in range(8)]
    rows[1] = {"question_id": 82, "choices": [{"index": 0, "turns": ["a", "b1"]}]}
    path = tmp_path / "answers.jsonl"
    write_lines(path, rows[::-1])
    numbers = [int(item.id) - 81 for item in task.items()]
    assert len(numbers) == 3
    assert {response.id: response.turns for response in task.read_responses(path)} == {
        str(81 + number): ("a", f"b{number}") for number in numbers
    }


def test_answers_that_do_not_fit_are_named(tmp_path):
    task = task_of(tmp_path)
    path = tmp_path / "answers.jsonl"
    fine = {"question_id": 81, "turns": ["a", "b"]}
    for bad, message in (
        ({"question_id": 5, "turns": ["a", "b"]}, "unknown question .*'5'"),
        (fine, "question answered twice .*'81'"),
        ({"question_id": 82, "turns": ["a"]}, "question 82 needs the texts of two answers"),
        ({"question_id": 82, "choices": [{"turns": ["a", None]}]}, "question 82 needs the texts of two answers"),
        ({"question_id": 82, "choices": []}, "question 82 needs the texts of two answers"),
        ({"question_id": 82, "choices": "none"}, "question 82 needs the texts of two answers"),
        ({"question_id": 82, "choices": [[1]]}, "question 82 needs the texts of two answers"),
        ({"question_id": 82, "turns": "ab"}, "question 82 needs the texts of two answers"),
        ({"question_id": [82], "turns": ["a", "b"]}, "line 2: question_id is not an integer"),
        ({"turns": ["a", "b"]}, "line 2: no field question_id"),
    ):
        write_lines(path, [fine, bad])
        with pytest.raises(ValueError, match=message):
            task.read_responses(path)


def test_files_that_are_missing_or_others_are_named(tmp_path):
    folder = write_files(tmp_path / "files")
    with pytest.raises(ValueError, match=r"--mt_bench\.folder: .*--mt_bench\.unverified"):
        MTBench(MTBenchSettings(folder=str(folder))).items()
    settings = MTBenchSettings(folder=str(folder), unverified=True)
    with pytest.raises(ValueError, match=r"--mt_bench\.limit: -1"):
        MTBench(MTBenchSettings(folder=str(folder), unverified=True, limit=-1)).items()
    references = folder / "reference_answer" / "gpt-4.jsonl"
    rows = references.read_text().splitlines(keepends=True)
    references.write_text("".join(rows[1:]))
    with pytest.raises(ValueError, match=r"no reference answer to question 83 \(math\)"):
        MTBench(settings).items()
    (folder / "reference_answer_gpt-4.jsonl").write_text("".join(rows))
    references.unlink()
    assert len(MTBench(settings).items()) == 8
    prompts = (folder / "judge_prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "judge_prompts.jsonl").write_text("".join(prompts[:-1]))
    with pytest.raises(ValueError, match="no prompt single-math-v1-multi-turn"):
        MTBench(settings).items()
    (folder / "judge_prompts.jsonl").unlink()
    with pytest.raises(ValueError, match=r"--mt_bench\.folder: .*judge_prompts\.jsonl: no such file"):
        MTBench(settings).items()
    (tmp_path / "judge_prompts.jsonl").write_text("".join(prompts))  # where FastChat has it
    assert len(MTBench(settings).items()) == 8


def published(name: str) -> list[dict]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@needs_data
def test_the_published_files_are_taken(common):
    items = MTBench(MTBenchSettings(folder=str(DATA))).items()
    assert [item.id for item in items] == [str(number) for number in range(81, 161)]
    assert sum(bool(item.facts["reference"]) for item in items) == 30
    assert {item.category for item in items} == common.temperature_config.keys() - {"arena-hard-200"}


@needs_data
def test_published_judgements_give_their_scores_and_means():
    categories = {item.id: item.category for item in MTBench(MTBenchSettings(folder=str(DATA))).items()}
    rows = published("gpt4_single_judgments")
    assert len(rows) == 800
    for row in rows:
        grade = score(row["judgment"])
        assert (-1 if grade is None else grade) == row["score"]
    # The figures that the four models' authors published, as the data's source has them.
    for model, mean in (
        ("mistral-orpo", 5.859),
        ("mistral-orpo-mix", 6.003),
        ("mistral-orpo-capybara", 6.819),
        ("mistral-orpo-trl", 7.166),
    ):
        judgements = [
            Judgement(str(row["question_id"]), categories[str(row["question_id"])], row["turn"], score(row["judgment"]))
            for row in rows
            if row["model"] == model
        ]
        assert round(mean_score(of_figure(judgements, "average")), 3) == mean
        low, high = score_interval(judgements)
        assert low < mean < high
        assert fmean(category_scores(judgements).values()) == pytest.approx(mean, abs=0.01)  # ten questions each


@needs_data
def test_stored_answers_of_other_models_are_read(tmp_path):
    task = MTBench(MTBenchSettings(folder=str(DATA)))
    rows = [row for row in published("model_answers_35models") if row["model"] == "vicuna-7b-v1.3"]
    write_lines(tmp_path / "answers.jsonl", rows)
    assert len(task.read_responses(tmp_path / "answers.jsonl")) == 80
