"""Sweeps over models on disk: what is stored, what an interruption costs, and divergences."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

from openrlhf_sgpo.data.tokens import Group

pytestmark = pytest.mark.slow
PADDED = {"train__layout": "padded"}  # batches of four responses


@pytest.fixture
def make_scorer(make_config):
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.training.scoring import Scorer

    class Recorder(Scorer):
        """A scorer that remembers its batches."""

        def _figures(self, actors, batch):
            self.batches = [*getattr(self, "batches", []), batch]
            return super()._figures(actors, batch)

    def make(folder=None, **changes):
        config = make_config(**changes)
        return Recorder(config, build_strategy(config), pad_token_id=0, folder=folder)

    return make


def test_batches_are_filled_to_a_budget_of_tokens(make_scorer, groups, tiny_model):
    """Twice that of training, in which a prompt counts once for all its responses; the figures are those of single ones."""
    single, several = make_scorer(train__max_tokens=1), make_scorer(train__max_tokens=150)
    expected = single.score(str(tiny_model), groups, "test")
    assert all(len(batch) == 1 for batch in single.batches)
    scores = several.score(str(tiny_model), groups, "test")
    assert [pytest.approx(row, rel=1e-5) for row in expected] == scores
    sizes = [sum(map(len, batch)) for batch in several.batches]
    assert max(sizes) <= 300 and all(
        size + len(batch[0]) > 300 for size, batch in zip(sizes[:-1], several.batches[1:], strict=True)
    )
    assert several.tokens_scored == sum(sizes) == sum(map(len, groups))


@pytest.mark.parametrize("free", [2**40, 0])
def test_before_training_the_reference_stays_only_where_memory_allows(
    make_scorer, groups, tiny_model, other_tiny_model, monkeypatch, free
):
    scorer = make_scorer()
    scorer.resident = True
    for model in (tiny_model, other_tiny_model):
        scorer.score(str(model), groups, "test")
    assert set(scorer._held) == {str(tiny_model), str(other_tiny_model)}
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    scorer.make_room(str(tiny_model))
    assert set(scorer._held) == ({str(tiny_model)} if free else set())
    scorer.close()
    assert not scorer._held


def test_rows_that_are_only_scored_have_a_budget_of_their_own(make_scorer, groups, tiny_model):
    expected = make_scorer().score(str(tiny_model), groups, "test")
    for layout, most in ({}, 500), (PADDED, 2 * 256):
        scorer = make_scorer(train__score_tokens=most, data__max_len=64, **layout)
        scores = scorer.score(str(tiny_model), groups, "test")
        assert [pytest.approx(row, rel=1e-5) for row in expected] == scores
        sizes = [sum(map(len, batch)) for batch in scorer.batches]
        assert (max(sizes) > 300 and max(sizes) <= most) if not layout else max(map(len, scorer.batches)) == 8


def test_many_responses_of_a_prompt_are_several_padded_batches(make_scorer, tiny_model):
    group = Group((5, 6, 7), tuple((number, *range(10 + number)) for number in range(9)))
    packed, padded = make_scorer(), make_scorer(**PADDED)
    (expected,), (scores,) = (scorer.score(str(tiny_model), [group], "test") for scorer in (packed, padded))
    assert [len(batch) for batch in padded.batches] == [4, 4, 1] and scores == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("free", [0, 2**40])
def test_a_model_that_fits_is_scored_whole_at_zero_3(make_scorer, groups, tiny_model, monkeypatch, free):
    """Its weights are then not gathered in every forward pass; the scores are the same."""
    import psutil

    expected = make_scorer().score(str(tiny_model), groups, "test")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free, total=free))
    scorer = make_scorer(ds__zero_stage=3)
    stages = []
    prepared = type(scorer)._prepared
    monkeypatch.setattr(
        type(scorer),
        "_prepared",
        lambda self, model: stages.append((actor := prepared(self, model)).model.zero_optimization_stage()) or actor,
    )
    assert [pytest.approx(row, rel=1e-5) for row in expected] == scorer.score(str(tiny_model), groups, "test")
    assert stages == [0 if free else 3] and scorer.strategy.stage == 3


@pytest.mark.parametrize("cut", ["half of the last line", "the last line", "a digit"])
def test_an_interrupted_sweep_loses_its_last_part_only(make_scorer, groups, tiny_model, tmp_path, monkeypatch, cut):
    """Parts of 3 batches of 4 responses: 24 pairs are 4 lines, each scored in the batches of an undisturbed sweep."""
    from openrlhf_sgpo.training import scoring

    monkeypatch.setattr(scoring, "PART", 3)
    model, folder = str(tiny_model), tmp_path / "log_probs"
    first = make_scorer(folder, **PADDED)
    expected = first.score(model, groups, "whole")
    (file,) = folder.iterdir()
    parts = [json.loads(line) for line in file.read_text().split("\n") if line]
    assert [len(part) for part in parts] == [12 + 1] * 4, "with a hash of each"

    whole = file.read_text().rstrip("\n")
    start = whole.rindex("\n") + 1
    digit = re.compile(r"(?<=: -)\d").search(whole, start)
    assert digit
    changed = whole[: digit.start()] + str(9 - int(digit[0])) + whole[digit.end() :] + "\n"
    half = whole[: start + (len(whole) - start) // 2]
    file.write_text({"half of the last line": half, "the last line": whole[:start], "a digit": changed}[cut])
    resumed = make_scorer(folder, **PADDED)
    assert resumed.score(model, groups, "resumed") == expected
    # The same batches: a response in other company may differ in its last digit.
    assert len(first.batches) == 12 and resumed.batches == first.batches[-3:]
    lost = [(group.prompt, response) for batch in resumed.batches for group in batch for response in group.responses]
    assert {scoring.tokens_key(*row) for row in lost} | {"blake2b"} == parts[-1].keys()
    tokens = sum(map(len, scoring._by_prompt(lost)))
    assert resumed.tokens_scored == tokens < first.tokens_scored == sum(map(len, groups))

    # What the resumed sweep added is on disk again, beside the torn line.
    again = make_scorer(folder)
    assert again.score(model, groups, "again") == expected and again.tokens_scored == 0


def test_scores_are_kept_by_model_and_discarded_with_it(make_scorer, groups, tiny_model, other_tiny_model, tmp_path):
    scorer = make_scorer(tmp_path / "log_probs")
    scores, other_scores = (scorer.score(str(model), groups[:4], "test") for model in (tiny_model, other_tiny_model))
    assert scores != other_scores and len(list((tmp_path / "log_probs").iterdir())) == 2
    scorer.discard(str(tiny_model))
    assert len(list((tmp_path / "log_probs").iterdir())) == 1
    before = scorer.tokens_scored
    assert scorer.score(str(other_tiny_model), groups[:4], "test") == other_scores and scorer.tokens_scored == before
    assert scorer.score(str(tiny_model), groups[:4], "test") == scores and scorer.tokens_scored > before


def test_log_probabilities_from_elsewhere_are_kept_like_those_of_a_sweep(make_scorer, groups, tiny_model, tmp_path):
    """Only the other responses are scored. A resumed run that takes the same again writes nothing."""
    from openrlhf_sgpo.training.scoring import tokens_key

    folder, model = tmp_path / "log_probs", str(tiny_model)
    taken = {tokens_key(group.prompt, group.responses[0]): -float(place) for place, group in enumerate(groups)}
    scorer = make_scorer(folder)
    scorer.take(model, taken)
    (file,) = folder.iterdir()
    written = file.read_text()
    again = make_scorer(folder)
    again.take(model, taken)
    assert file.read_text() == written and again.tokens_scored == 0
    rows = again.score(model, groups, "test")
    assert [row[0] for row in rows] == list(taken.values())
    exact = make_scorer().score(model, groups, "test")
    assert [row[1:] for row in rows] == [pytest.approx(row[1:], rel=1e-5) for row in exact]
    assert again.tokens_scored == sum(len(group) - len(group.responses[0]) for group in groups)


def test_divergence_is_that_of_the_first_responses(make_scorer, groups, tiny_model, other_tiny_model):
    """In the order of the groups, however the sweep sorts them; two models are two forwards."""
    from transformers import AutoModelForCausalLM

    scorer = make_scorer()
    spoken = [Group(group.prompt, group.responses[:1]) for group in groups[:7]]
    divergences = scorer.divergence(str(tiny_model), str(other_tiny_model), spoken, "test")
    assert scorer.tokens_scored == 2 * sum(map(len, spoken))
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tiny_model, other_tiny_model)]
    for group, value in zip(spoken, divergences, strict=True):
        tokens = torch.tensor([group.prompt + group.responses[0]])
        with torch.no_grad():
            p, q = (model(tokens).logits[0, len(group.prompt) - 1 : -1].double().softmax(-1) for model in models)
        assert value == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-4)
        assert value > 0
    assert len(set(divergences)) == len(divergences), "equal figures would hide a wrong order"
    assert scorer.divergence(str(tiny_model), str(tiny_model), spoken[:3], "test") == [0.0] * 3


def test_figures_that_are_not_finite_are_neither_kept_nor_read(make_scorer, groups, tiny_model, tmp_path, monkeypatch):
    from openrlhf_sgpo.finite import NotFiniteError
    from openrlhf_sgpo.training import scoring

    monkeypatch.setattr(scoring, "PART", 3)
    folder, model = tmp_path / "log_probs", str(tiny_model)
    scorer = make_scorer(folder, **PADDED)
    expected = scorer.score(model, groups, "whole")
    (file,) = folder.iterdir()
    text = file.read_text()
    file.unlink()

    figures = type(scorer)._figures
    calls = []

    def poisoned(self, actors, batch):
        calls.append(batch)
        values = figures(self, actors, batch)
        return values * torch.nan if len(calls) == 5 else values

    monkeypatch.setattr(type(scorer), "_figures", poisoned)
    again = make_scorer(folder, **PADDED)
    with pytest.raises(
        NotFiniteError, match=f"round 1: policy: log-probability nan for 4 of 12 responses under {model}"
    ):
        again.score(model, groups, "round 1: policy")
    # The part before is kept, and the rest is scored once the cause is gone.
    assert "NaN" not in file.read_text() and len(file.read_text().split("\n\n")) == 1
    assert again.score(model, groups, "again") == expected

    key = next(iter(json.loads(text.split("\n")[1])))
    file.write_text(text + "\n" + json.dumps({key: float("nan")}) + "\n")
    line = file.read_text().rstrip("\n").count("\n") + 1
    with pytest.raises(ValueError, match=f"{file}, line {line}: it holds NaN.*delete the file"):
        make_scorer(folder).score(model, groups, "resumed")
