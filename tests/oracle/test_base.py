"""The two kinds of oracles, foreign ones included, and the check of what they say."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_sgpo import oracle
from openrlhf_sgpo.algorithms.dpo import DPO
from openrlhf_sgpo.algorithms.slhf import SLHF
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.oracle import Answer, PreferenceOracle, Question, Resources, RewardOracle
from openrlhf_sgpo.oracle.base import check_preferences, sigmoid

PROMPT = [{"role": "user", "content": "?"}]


def question(*texts: str, name: str = "q") -> Question:
    return Question(name, PROMPT, tuple(map(Answer, texts)))


def resources(folder: Path, config: Config | None = None) -> Resources:
    return Resources(config or Config(), None, None, None, folder)


class Length(RewardOracle):
    name = "length"

    def score(self, prompt, answer):
        return len(answer) / 2


class First(PreferenceOracle):
    """Prefers longer answers, and the first place."""

    name = "first"

    def prefer(self, prompt, first, second):
        return sigmoid(len(first) - len(second) + 1)


class Game(PreferenceOracle):
    name = "game"
    BEATS = (("rock", "scissors"), ("scissors", "paper"), ("paper", "rock"))

    def prefer(self, prompt, first, second):
        return 0.5 if first == second else float((first, second) in self.BEATS)


TEXTS = st.lists(st.text("ab", max_size=4), min_size=2, max_size=5)


# the first call imports torch
@given(TEXTS)
def test_rewards_become_bradley_terry_preferences(texts):
    (matrix,) = Length().preferences([question(*texts)], "")
    for i, first in enumerate(texts):
        for j, second in enumerate(texts):
            expected = 0.5 if first == second else 1 / (1 + math.exp((len(second) - len(first)) / 2))
            assert matrix[i][j] == pytest.approx(expected, abs=1e-12)


@given(TEXTS)
def test_both_orders_make_preferences_antisymmetric(texts):
    """A judge with a liking for the first place: averaged, p(a, b) + p(b, a) = 1, and p(a, a) = 1/2 without a call."""
    asked = question(*texts)
    judge = First()
    (matrix,) = judge.preferences([asked], "")
    for i, first in enumerate(texts):
        for j, second in enumerate(texts):
            assert matrix[i][j] + matrix[j][i] == pytest.approx(1, abs=1e-12)
            gain = len(first) - len(second)
            expected = 0.5 if first == second else (sigmoid(gain + 1) + 1 - sigmoid(1 - gain)) / 2
            assert matrix[i][j] == pytest.approx(expected, abs=1e-12)
    distinct = len(set(texts))
    assert judge.calls == distinct * (distinct - 1), "equal texts are one text"
    rewards = judge.rewards([asked], "")[0]
    assert sum(rewards) == pytest.approx(len(texts) / 2)
    for i in range(len(texts)):
        others = [matrix[i][j] for j in range(len(texts)) if j != i]
        assert rewards[i] == pytest.approx(sum(others) / len(others))


def test_circles_are_preferences_too():
    (matrix,) = Game().preferences([question("rock", "paper", "scissors")], "test")
    assert matrix == [[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]]
    # No reward orders them so.
    assert not any(list(order) == sorted(order) for order in permutations([0.5, 0, 1]) if list(order) == matrix[0])
    assert Game().rewards([question("rock", "paper", "scissors")], "test") == [[0.5, 0.5, 0.5]]


@pytest.mark.parametrize(("kind", "calls"), [(Length, 3), (First, 6)])
def test_calls_are_counted_once_per_content_and_kept(kind, calls, tmp_path):
    asked = [question("a", "bb", "ccc"), question("ccc", "a", name="again")]
    judge = kind(resources(tmp_path))
    matrices = judge.preferences(asked, "test")
    assert judge.calls == calls and judge.usage() == {"judge_calls": calls}
    assert judge.preferences(asked, "test") == matrices and judge.calls == calls
    assert matrices[1][0][1] == pytest.approx(matrices[0][2][0], abs=1e-12)
    again = kind(resources(tmp_path))  # as another process
    assert again.preferences(asked, "test") == matrices and again.calls == 0
    assert (tmp_path / "judgements" / f"{kind.name}.jsonl").exists()


@pytest.mark.parametrize(
    ("kind", "base", "value", "message"),
    [
        ("score", RewardOracle, "raise", "oracle odd, question q: score failed .ZeroDivisionError: division by zero"),
        ("score", RewardOracle, "None", "score failed .TypeError"),
        ("score", RewardOracle, "nan", "score returned nan"),
        ("prefer", PreferenceOracle, "raise", "oracle odd, question q: prefer failed .ZeroDivisionError"),
        ("prefer", PreferenceOracle, "inf", "prefer returned inf"),
        ("prefer", PreferenceOracle, "1.5", "oracle odd, question q: prefer returned 1.5, not a probability"),
    ],
)
def test_a_foreign_failure_is_an_error_and_no_preference(kind, base, value, message, tmp_path):
    def foreign(self, *_):
        return 1 / 0 if value == "raise" else None if value == "None" else float(value)

    foreign.__name__ = kind
    odd = type("Odd", (base,), {"name": "odd", kind: foreign})(resources(tmp_path))
    with pytest.raises(ValueError, match=message):
        odd.preferences([question("a", "b")], "test")
    assert not (tmp_path / "judgements").exists(), "a failure is never kept"


def test_foreign_rewards_of_another_shape():
    odd = type("Odd", (RewardOracle,), {"name": "odd", "scores": lambda self, questions, label: [[1.0]]})()
    with pytest.raises(ValueError, match=r"oracle odd, question q: expected 2 finite rewards, got \[1.0\]"):
        odd.preferences([question("a", "b")], "test")


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5, 0.7], [0.4, 0.5]], "preference [0][1] is 0.7, [1][0] is 0.4; they must"),
        ([[0.6, 0.7], [0.3, 0.5]], "preference [0][0] is 0.6, [0][0] is 0.6; equal answers"),
        ([[0.5, 1.2], [-0.2, 0.5]], "[0][1] is 1.2, [1][0] is -0.2"),
        ([[0.5, math.nan], [math.nan, 0.5]], "[0][1] is nan"),
        ([[0.5, 0.7]], "must be a 2 x 2 matrix"),
        ([[0.5], [0.5]], "must be a 2 x 2 matrix"),
    ],
)
def test_what_is_no_preference_is_named(matrix, message):
    odd = type("Odd", (PreferenceOracle,), {"name": "odd", "matrices": lambda self, questions, label: [matrix]})()
    with pytest.raises(ValueError, match="oracle odd, question q") as caught:
        odd.preferences([question("a", "b")], "test")
    assert message in str(caught.value)


def test_rounding_is_forgiven_and_equal_texts_are_not():
    check_preferences("fine", [question("a", "b")], [[[0.5, 0.7 + 1e-7], [0.3, 0.5]]])
    with pytest.raises(
        ValueError, match=r"preference \[0\]\[1\] is 0.7, \[1\]\[0\] is 0.3; equal answers must have 1/2"
    ):
        check_preferences("odd", [question("a", "a")], [[[0.5, 0.7], [0.3, 0.5]]])
    with pytest.raises(ValueError, match="oracle odd: got 0 preference matrices for 1 questions"):
        check_preferences("odd", [question("a", "b")], [])


def test_names_and_classes():
    assert oracle.names()[:5] == ["implicit", "reward_model", "reward_heads", "preference_model", "judge"]
    for name in oracle.BUILT_INS:
        built_in = oracle.get(name)
        assert built_in.name == name and built_in.problems(Config()), "without further settings none of them works"
    assert oracle.get(f"{__name__}:Length") is sys.modules[__name__].Length
    with pytest.raises(ValueError, match=r"unknown oracle 'rewardmodel'; did you mean reward_model\? known: implicit"):
        oracle.get("rewardmodel")
    with pytest.raises(ValueError, match=r"'PROMPT' is not a subclass of openrlhf_sgpo.oracle.base.Oracle"):
        oracle.get(f"{__name__}:PROMPT")


def test_make_gives_the_oracle_of_the_settings(tmp_path):
    config = Config(oracle=f"{__name__}:Length")
    made = oracle.get(config.oracle)(resources(tmp_path, config))
    assert made.name == "length" and made.rewards([question("aa", "b")], "test") == [[1.0, 0.5]]


def test_settings_are_checked_without_torch():
    code = (
        "import sys; from openrlhf_sgpo import oracle, run_settings, config; "
        "[oracle.get(name).problems(config.Config()) for name in oracle.names()]; "
        "loaded = [m for m in ('torch', 'transformers', 'openai') if m in sys.modules]; assert not loaded, loaded"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.returncode == 0, process.stderr


def test_rounds_of_pairs_judge_themselves_and_plays_ask_a_frozen_policy():
    assert oracle.judges_itself(Config(), DPO) and not oracle.judges_itself(Config(), SLHF)
    assert not oracle.judges_itself(Config(oracle="judge"), DPO)


def test_the_implicit_reward_is_frozen_where_no_policy_is_given(tmp_path):
    from openrlhf_sgpo.oracle.implicit import ImplicitReward

    config = Config()
    config.reward.model_name_or_path, config.ref.model_name_or_path = "seed/policy", "initial"
    shared = Resources(config, None, None, SimpleNamespace(), tmp_path)
    frozen, round_two = ImplicitReward(shared), ImplicitReward(shared, "round_1/policy", "round_0/policy")
    assert (frozen.policy, frozen.reference) == ("seed/policy", "initial")
    assert (round_two.policy, round_two.reference) == ("round_1/policy", "round_0/policy")


BAD = [math.nan, math.inf, -math.inf]


class SaysReward(RewardOracle):
    """Foreign code whose figures are what the test wants."""

    name = "says"
    value: object = 0.5

    def score(self, prompt, answer):
        return self.value


class SaysPreference(PreferenceOracle):
    name = "says"
    value: object = 0.5

    def prefer(self, prompt, first, second):
        return self.value


@pytest.mark.parametrize(
    ("kind", "values"), [(SaysReward, [*BAD, None, "much"]), (SaysPreference, [*BAD, None, "much", -0.01, 1.01])]
)
def test_what_is_no_figure_is_an_error_and_never_kept(kind, values, tmp_path):
    asked = [question("a", "b")]
    for value in values:
        oracle = kind(resources(tmp_path))
        oracle.value = value
        with pytest.raises(ValueError, match="oracle says, question q: "):
            oracle.preferences(asked, "")
    assert not (tmp_path / "judgements").exists()
    oracle = kind(resources(tmp_path))
    assert oracle.preferences(asked, "") == [[[0.5, 0.5], [0.5, 0.5]]], "once the cause is gone it is asked again"


@pytest.mark.parametrize("value", [*BAD, None, "much", -0.01, 1.01])
def test_what_many_at_once_return_is_checked_too(value):
    class Rewards(RewardOracle):
        name = "many"

        def scores(self, questions, label):
            return [[0.0, value] for _ in questions]

    class Compares(PreferenceOracle):
        name = "many"

        def compare(self, comparisons, label):
            return [value for _ in comparisons]

    class Matrices(PreferenceOracle):
        name = "many"

        def matrices(self, questions, label):
            return [[[0.5, value], [value, 0.5]] for _ in questions]

    for kind in [Compares, Matrices, *([Rewards] if value not in (-0.01, 1.01) else [])]:
        for ask in (kind().preferences, kind().rewards):
            with pytest.raises(ValueError, match="oracle many, question q: "):
                ask([question("a", "b")], "")


def test_results_of_another_number_are_an_error():
    class Compares(PreferenceOracle):
        name = "many"

        def compare(self, comparisons, label):
            return [0.5]

    class Rewards(RewardOracle):
        name = "many"

        def scores(self, questions, label):
            return []

    with pytest.raises(ValueError, match="oracle many: got 1 preferences for 2 comparisons"):
        Compares().preferences([question("a", "b")], "")
    with pytest.raises(ValueError, match="oracle many: got rewards for 0 of 1 questions"):
        Rewards().rewards([question("a", "b")], "")


def test_a_kept_figure_that_is_not_finite_is_refused_with_its_line(tmp_path):
    oracle = SaysReward(resources(tmp_path))
    oracle.rewards([question("a", "b")], "")
    (file,) = (tmp_path / "judgements").iterdir()
    file.write_text(file.read_text().replace("0.5", "NaN"))
    with pytest.raises(ValueError, match=f"{file}, line 2: it holds NaN.*request it again"):
        SaysReward(resources(tmp_path)).rewards([question("a", "b")], "")
