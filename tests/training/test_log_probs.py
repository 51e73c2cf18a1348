from __future__ import annotations

import pytest
import torch

from openrlhf_sgpo.data.tokens import Group


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_layouts_give_the_definition_and_its_gradient(make_config, groups, attention):
    from openrlhf_sgpo.openrlhf import build_strategy, load_actor
    from openrlhf_sgpo.training.log_probs import response_log_probs

    config = make_config(ds__attn_implementation=attention)
    actor = load_actor(config.model.model_name_or_path, config, build_strategy(config), trainable=True)
    # Three responses behind one prompt, one token only, and repeated responses.
    groups = [*groups[:3], Group(groups[3].prompt, (*groups[3].responses, (7,), groups[3].responses[0]))]
    weights = torch.linspace(-1, 1, sum(len(group.responses) for group in groups))

    def values_and_gradient(function):
        actor.zero_grad()
        values = function()
        (values * weights).sum().backward()
        return values.detach(), [p.grad.clone() for p in actor.parameters()]

    expected, expected_gradient = values_and_gradient(lambda: one_by_one(actor.model, groups))
    for layout in ("padded", "shared_prefix"):
        values, gradient = values_and_gradient(lambda: response_log_probs(actor, groups, layout, 0))  # noqa: B023
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-4)
        for found, wanted in zip(gradient, expected_gradient, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_response_does_not_see_its_siblings(make_config, groups):
    from openrlhf_sgpo.openrlhf import build_strategy, load_actor
    from openrlhf_sgpo.training.log_probs import response_log_probs

    config = make_config()
    actor = load_actor(config.model.model_name_or_path, config, build_strategy(config), trainable=False)
    prompt, (chosen, rejected) = groups[0].prompt, groups[0].responses
    alone = response_log_probs(actor, [Group(prompt, (rejected,))], "shared_prefix", 0)
    beside = response_log_probs(actor, [groups[1], Group(prompt, (chosen, rejected))], "shared_prefix", 0)
    torch.testing.assert_close(beside[-1:], alone, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_figures_by_token_are_rows_that_sum_to_those_of_the_response(make_config, groups, layout):
    from openrlhf_sgpo.openrlhf import build_strategy, load_actor
    from openrlhf_sgpo.training.log_probs import response_logits, token_divergence, token_log_probs

    config = make_config()
    actor = load_actor(config.model.model_name_or_path, config, build_strategy(config), trainable=False)
    logits = response_logits(actor, groups[:3], layout, 0)
    per_token = token_log_probs(logits, 1.0)
    rows = logits.rows(per_token)
    lengths = [len(response) for group in groups[:3] for response in group.responses]
    assert rows.shape == (6, max(lengths))
    assert [int((row != 0).sum()) for row in rows] == lengths
    assert all((row[length:] == 0).all() for row, length in zip(rows, lengths, strict=True))
    torch.testing.assert_close(rows.sum(-1), logits.log_probs())
    torch.testing.assert_close(torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)]), per_token)
    # A lower temperature sharpens: log-probabilities of its own argmax rise, and the distributions part.
    tempered = logits.values.div(0.5).log_softmax(-1).gather(-1, logits.targets[:, None])[:, 0]
    torch.testing.assert_close(token_log_probs(logits, 0.5), tempered)
    other = logits._replace(values=logits.values.flip(-1))
    distributions = [(one.values / 0.5).double().softmax(-1) for one in (logits, other)]
    expected = (distributions[0] * (distributions[0] / distributions[1]).log()).sum(-1)
    torch.testing.assert_close(token_divergence(logits, other, 0.5).double(), expected, rtol=1e-4, atol=1e-4)
    assert token_divergence(logits, logits).abs().max() < 1e-6


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
    found = prompt_embeddings(config.model.model_name_or_path, prompts, config, strategy)
    model = load_actor(config.model.model_name_or_path, config, strategy, trainable=False).model
    for row, prompt in zip(found, prompts, strict=True):
        hidden = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        torch.testing.assert_close(row, hidden, rtol=1e-5, atol=1e-5)


LAYOUTS = ("padded", "shared_prefix")


@pytest.fixture
def two_models(make_config, groups, tiny_model, other_tiny_model):
    """Frozen actors of both tiny models, and groups: of two responses, of one, of one token, of one that is repeated."""
    from openrlhf_sgpo.openrlhf import build_strategy, load_actor

    config = make_config()
    strategy = build_strategy(config)
    actors = [load_actor(str(folder), config, strategy, trainable=False) for folder in (tiny_model, other_tiny_model)]
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_give_the_same_log_probabilities(two_models, layout):
    from openrlhf_sgpo.training.log_probs import response_log_probs, response_logits

    (actor, _), groups = two_models
    logits = response_logits(actor, groups, layout, 0)
    lengths = [len(response) for group in groups for response in group.responses]
    assert logits.responses == len(lengths) and len(logits.values) == len(logits.targets) == sum(lengths)
    assert logits.values.dtype == torch.float32
    assert torch.bincount(logits.response_of).tolist() == lengths
    torch.testing.assert_close(logits.log_probs(), response_log_probs(actor, groups, layout, 0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.log_probs(), one_by_one(actor.model, groups), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("extrapolation", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_extrapolated_log_probabilities_token_by_token(two_models, layout, extrapolation):
    from openrlhf_sgpo.training.log_probs import extrapolated_log_probs, response_logits

    actors, groups = two_models
    policy, reference = (response_logits(actor, groups, layout, 0) for actor in actors)
    found = extrapolated_log_probs(policy, reference, extrapolation)
    expected = []
    both = zip(*(next_token_logits(actor.model, groups) for actor in actors), strict=True)
    for (response, ours), (_, theirs) in both:
        log_probs = ((1 + extrapolation) * ours - extrapolation * theirs).log_softmax(-1)
        expected.append(sum(log_probs[place, token] for place, token in enumerate(response)))
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=1e-5, atol=1e-3)
    if extrapolation == 0:
        assert torch.equal(found, policy.log_probs())
    else:
        assert (found - policy.log_probs()).abs().min() > 0.01, "the models are too alike to tell"


def test_extrapolation_has_no_gradient(two_models):
    from openrlhf_sgpo.training.log_probs import extrapolated_log_probs, response_logits

    actors, groups = two_models
    policy, reference = (response_logits(actor.requires_grad_(True), groups, "shared_prefix", 0) for actor in actors)
    assert policy.log_probs().requires_grad and reference.log_probs().requires_grad
    assert not extrapolated_log_probs(policy, reference, 0.5).requires_grad


def test_divergence_over_the_whole_vocabulary(two_models):
    from openrlhf_sgpo.training.log_probs import response_logits, sequence_divergence

    actors, groups = two_models
    expected = []
    both = zip(*(next_token_logits(actor.model, groups) for actor in actors), strict=True)
    for (_, ours), (_, theirs) in both:
        p, q = ours.softmax(-1), theirs.softmax(-1)
        expected.append((p * (p / q).log()).sum())
    expected = torch.stack(expected).float()
    assert expected.min() > 0.01, "the models are too alike to tell"
    for layout in LAYOUTS:
        policy, reference = (response_logits(actor, groups, layout, 0) for actor in actors)
        torch.testing.assert_close(sequence_divergence(policy, reference), expected, rtol=1e-4, atol=1e-4)
        assert sequence_divergence(policy, policy).tolist() == [0.0] * len(expected)
        # Not symmetric: the other way round is another figure.
        assert (sequence_divergence(reference, policy) - expected).abs().max() > 0.01
