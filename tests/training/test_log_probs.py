from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openrlhf_sgpo.data.tokens import Group

LAYOUTS = ("padded", "auto")


def one_by_one(model, groups):
    """The definition: log softmax of the logits before each response token, summed; one sequence per forward."""
    sums = []
    for group in groups:
        for response in group.responses:
            tokens = torch.tensor([group.prompt + response])
            log_probs = model(tokens).logits[0, :-1].log_softmax(-1)
            picked = log_probs.gather(-1, tokens[0, 1:, None])[:, 0]
            sums.append(picked[len(group.prompt) - 1 :].sum())
    return torch.stack(sums)


@pytest.fixture
def load(make_config):
    """An actor of a folder (default: the tiny model) in a layout."""
    from openrlhf_sgpo.openrlhf import build_strategy, load_actor

    def load(layout, folder=None, trainable=False, **changes):
        config = make_config(train__layout=layout, **changes)
        return load_actor(
            str(folder or config.model.model_name_or_path), config, build_strategy(config), trainable=trainable
        )

    return load


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_give_the_definition_and_its_gradient(load, groups, layout):
    from openrlhf_sgpo.training.log_probs import response_log_probs

    actor = load(layout, trainable=True)
    assert (actor.head is None) == (layout == "padded")
    # Three responses behind one prompt, one token only, and repeated responses.
    groups = [*groups[:3], Group(groups[3].prompt, (*groups[3].responses, (7,), groups[3].responses[0]))]
    weights = torch.linspace(-1, 1, sum(len(group.responses) for group in groups))

    def values_and_gradient(function):
        actor.zero_grad()
        values = function()
        (values * weights).sum().backward()
        return values.detach(), [p.grad.clone() for p in actor.parameters()]

    expected, expected_gradient = values_and_gradient(lambda: one_by_one(actor.model, groups))
    values, gradient = values_and_gradient(lambda: response_log_probs(actor, groups, 0))
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-4)
    for actual, wanted in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)


def test_a_response_does_not_see_its_siblings(load, groups):
    from openrlhf_sgpo.training.log_probs import response_log_probs

    actor = load("auto")
    prompt, (chosen, rejected) = groups[0].prompt, groups[0].responses
    alone = response_log_probs(actor, [Group(prompt, (rejected,))], 0)
    beside = response_log_probs(actor, [groups[1], Group(prompt, (chosen, rejected))], 0)
    torch.testing.assert_close(beside[-1:], alone, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_by_token_are_rows_that_sum_to_those_of_the_response(load, groups, layout):
    from openrlhf_sgpo.training.log_probs import predictions, response_log_probs, token_divergence

    actor = load(layout)
    predicted = predictions(actor, groups[:3], 0)
    per_token = predicted.log_probs()
    rows = predicted.rows(per_token)
    lengths = [len(response) for group in groups[:3] for response in group.responses]
    assert rows.shape == (6, max(lengths))
    assert [int((row != 0).sum()) for row in rows] == lengths
    assert all((row[length:] == 0).all() for row, length in zip(rows, lengths, strict=True))
    torch.testing.assert_close(rows.sum(-1), response_log_probs(actor, groups[:3], 0))
    torch.testing.assert_close(torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)]), per_token)
    # A lower temperature sharpens: log-probabilities of its own argmax rise, and the distributions part.
    logits = predicted.head(predicted.states)
    tempered = logits.div(0.5).log_softmax(-1).gather(-1, predicted.targets[:, None])[:, 0]
    torch.testing.assert_close(predicted.log_probs(0.5), tempered, rtol=1e-5, atol=1e-5)
    other = replace(predicted, states=predicted.states.flip(0))
    p, q = ((each.head(each.states) / 0.5).double().softmax(-1) for each in (predicted, other))
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(token_divergence(predicted, other, 0.5).double(), expected, rtol=1e-4, atol=1e-4)
    assert token_divergence(predicted, predicted).abs().max() < 1e-6


@pytest.mark.slow
def test_scorer_scores_each_response_once(make_config, groups):
    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.training.scoring import Scorer

    config = make_config()
    scorer = Scorer(config, build_strategy(config), pad_token_id=0)
    first = scorer.score(config.model.model_name_or_path, groups[:5], "test")
    scored = scorer.tokens_scored
    again = scorer.score(config.model.model_name_or_path, [groups[4], groups[0]], "test")
    assert again == [first[4], first[0]]
    assert scorer.tokens_scored == scored == sum(len(group) for group in groups[:5])
    scorer.forget(config.model.model_name_or_path)
    scorer.score(config.model.model_name_or_path, groups[:1], "test")
    assert scorer.tokens_scored == scored + len(groups[0])


def test_prompt_embeddings_are_the_last_hidden_states(make_config, groups):
    from openrlhf_sgpo.openrlhf import build_strategy, load_actor
    from openrlhf_sgpo.training.embeddings import prompt_embeddings

    config = make_config()
    strategy = build_strategy(config)
    prompts = [group.prompt for group in groups[:3]]
    embeddings = prompt_embeddings(config.model.model_name_or_path, prompts, config, strategy)
    model = load_actor(config.model.model_name_or_path, config, strategy, trainable=False).model
    for row, prompt in zip(embeddings, prompts, strict=True):
        hidden = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        torch.testing.assert_close(row, hidden, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=LAYOUTS)
def two_models(request, load, groups, other_tiny_model):
    """Frozen actors of both tiny models, and groups: of two responses, of one, of one token, of one that is repeated."""
    actors = [load(request.param), load(request.param, other_tiny_model)]
    first, second, third, last = groups[:4]
    some = [first, Group(second.prompt, second.responses[:1]), third]
    return actors, [*some, Group(last.prompt, (*last.responses, (7,), last.responses[0]))]


def next_token_logits(model, groups):
    """By definition, one sequence per forward: of each response its tokens, and the logits before each of them."""
    rows = []
    for group in groups:
        for response in group.responses:
            with torch.no_grad():
                logits = model(torch.tensor([group.prompt + response])).logits[0]
            rows.append((response, logits[len(group.prompt) - 1 : -1].double()))
    return rows


def test_predictions_are_of_the_response_tokens(two_models):
    from openrlhf_sgpo.training.log_probs import predictions, response_log_probs

    (actor, _), groups = two_models
    predicted = predictions(actor, groups, 0)
    lengths = [len(response) for group in groups for response in group.responses]
    logits = predicted.head(predicted.states)
    assert predicted.responses == len(lengths) and len(logits) == len(predicted.targets) == sum(lengths)
    assert logits.dtype == torch.float32
    assert torch.bincount(predicted.response_of).tolist() == lengths
    expected = torch.cat([logits for _, logits in next_token_logits(actor.model, groups)])
    torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-4)
    sums = predicted.sums(predicted.log_probs())
    torch.testing.assert_close(sums, response_log_probs(actor, groups, 0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums, one_by_one(actor.model, groups), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("extrapolation", [0.0, 0.5, 3.0])
def test_extrapolated_log_probabilities_token_by_token(two_models, extrapolation):
    from openrlhf_sgpo.training.log_probs import extrapolated_log_probs, predictions

    actors, groups = two_models
    policy, reference = (predictions(actor, groups, 0) for actor in actors)
    extrapolated = extrapolated_log_probs(policy, reference, extrapolation)
    expected = []
    both = zip(*(next_token_logits(actor.model, groups) for actor in actors), strict=True)
    for (response, logits), (_, reference_logits) in both:
        log_probs = ((1 + extrapolation) * logits - extrapolation * reference_logits).log_softmax(-1)
        expected.append(sum(log_probs[place, token] for place, token in enumerate(response)))
    torch.testing.assert_close(extrapolated, torch.stack(expected).float(), rtol=1e-5, atol=1e-3)
    plain = policy.sums(policy.log_probs())
    if extrapolation == 0:
        torch.testing.assert_close(extrapolated, plain, rtol=1e-6, atol=1e-5)
    else:
        assert (extrapolated - plain).abs().min() > 0.01, "the models are too alike to tell"


def test_extrapolation_has_no_gradient(two_models):
    from openrlhf_sgpo.training.log_probs import extrapolated_log_probs, figures_of, predictions

    (policy, reference), groups = two_models
    fixed = predictions(reference, groups, 0)
    policy.requires_grad_(True)
    log_probs, extrapolated = figures_of(
        policy, groups, 0, lambda predicted: (predicted.log_probs(), extrapolated_log_probs(predicted, fixed, 0.5))
    )
    assert log_probs.requires_grad and not extrapolated.requires_grad


def test_divergence_over_the_whole_vocabulary(two_models, monkeypatch):
    from openrlhf_sgpo.packed import head
    from openrlhf_sgpo.training.log_probs import figures_of, predictions, sequence_divergence

    actors, groups = two_models
    expected = []
    both = zip(*(next_token_logits(actor.model, groups) for actor in actors), strict=True)
    for (_, logits), (_, reference_logits) in both:
        p, q = logits.softmax(-1), reference_logits.softmax(-1)
        expected.append((p * (p / q).log()).sum())
    expected = torch.stack(expected).float()
    assert expected.min() > 0.01, "the models are too alike to tell"
    policy, reference = (predictions(actor, groups, 0) for actor in actors)
    torch.testing.assert_close(sequence_divergence(policy, reference), expected, rtol=1e-4, atol=1e-4)
    assert sequence_divergence(policy, policy).tolist() == [0.0] * len(expected)
    # Not symmetric: the other way round is another figure.
    assert (sequence_divergence(reference, policy) - expected).abs().max() > 0.01

    # In chunks of three rows, with the same gradient.
    weights, gradients = torch.linspace(-1, 1, len(expected)), []
    actors[0].requires_grad_(True)
    for elements in (head.ELEMENTS["cpu"], 3 * policy.head.vocabulary // 16 + 1):
        monkeypatch.setitem(head.ELEMENTS, "cpu", elements)
        actors[0].zero_grad()
        values = figures_of(actors[0], groups, 0, lambda predicted: sequence_divergence(predicted, reference))
        (values * weights).sum().backward()
        torch.testing.assert_close(values.detach(), expected, rtol=1e-4, atol=1e-4)
        gradients.append([weight.grad.clone() for weight in actors[0].parameters()])
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)
