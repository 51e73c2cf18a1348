"""Log-probabilities with their input embeddings, and second derivatives through both."""

import pytest
import torch

from openrlhf_sgpo.algorithms.base import PairBatch
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.w_dpo import WDPO, WDPOSettings


@pytest.fixture
def actor(make_config):
    from openrlhf_sgpo.openrlhf import build_strategy, load_actor

    config = make_config(ds__attn_implementation="eager")
    return load_actor(config.model.model_name_or_path, config, build_strategy(config), trainable=True)


def alone(actor, tokens, prompt):
    """(log-probability of what follows the prompt, its gradient by the embeddings), of one row without padding."""
    embeddings = actor.model.get_input_embeddings()(torch.tensor([tokens])).detach().requires_grad_()
    log_probs = actor.model(inputs_embeds=embeddings).logits[0, :-1].log_softmax(-1)
    total = log_probs.gather(-1, torch.tensor(tokens)[1:, None])[prompt - 1 :].sum()
    return total.detach(), torch.autograd.grad(total, embeddings)[0]


def test_values_and_gradients_are_those_of_rows_alone(actor, groups):
    from openrlhf_sgpo.training.embedded import embedded_log_probs

    log_probs, embeddings = embedded_log_probs(actor, groups[:3], 0)
    (gradient,) = torch.autograd.grad(log_probs.sum(), embeddings)
    rows = [(group.prompt + response, len(group.prompt)) for group in groups[:3] for response in group.responses]
    assert embeddings.shape[:2] == (6, max(len(tokens) for tokens, _ in rows))
    for row, (tokens, prompt) in enumerate(rows):
        expected, slopes = alone(actor, tokens, prompt)
        torch.testing.assert_close(log_probs[row], expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(gradient[row, : len(tokens)], slopes[0], rtol=1e-3, atol=1e-3)
        assert not gradient[row, len(tokens) :].any()


def test_the_gradient_of_the_penalty_is_that_of_finite_differences(actor, groups):
    from openrlhf_sgpo.training.embedded import embedded_log_probs

    algorithm, reference = WDPO(WDPOSettings(5.0), 0.1), torch.full((3,), -20.0)
    weight = actor.model.model.layers[0].mlp.up_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    def penalty():
        log_probs, embeddings = embedded_log_probs(actor, groups[:3], 0)
        batch = PairBatch(*log_probs.view(3, 2).T, reference, reference, embeddings=embeddings)
        return (algorithm.loss(batch) - dpo_loss(batch.margins(0.1))).mean()

    (gradient,) = torch.autograd.grad(penalty(), weight)
    values = []
    for step in (5e-4, -5e-4):
        with torch.no_grad():
            weight.add_(step * direction)
        values.append(penalty().item())
        with torch.no_grad():
            weight.sub_(step * direction)
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 1e-3, rel=0.02)
