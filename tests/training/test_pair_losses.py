"""Pair weights, soft labels and the likelihood term: what they do to a loss and its gradient."""

from dataclasses import replace

import pytest
import torch
from pair_batches import BETA, batch, draw

from openrlhf_sgpo.algorithms.base import NoSettings, PairBatch, Stage
from openrlhf_sgpo.algorithms.cdpo import CDPO, CDPOSettings
from openrlhf_sgpo.algorithms.dpo import DPO
from openrlhf_sgpo.algorithms.dr_dpo import DrDPO, DrDPOSettings
from openrlhf_sgpo.algorithms.ipo import IPO, IPOSettings
from openrlhf_sgpo.algorithms.kl_dpo import KLDPO
from openrlhf_sgpo.algorithms.rdpo import RDPO, RDPOSettings
from openrlhf_sgpo.algorithms.ropo import ROPO, ROPOSettings
from openrlhf_sgpo.algorithms.sgpo import SGPO
from openrlhf_sgpo.algorithms.sgpo_transport import SGPOTransport
from openrlhf_sgpo.algorithms.spa import SPA, SPASettings
from openrlhf_sgpo.algorithms.sym_po import SymPO, SymPOSettings
from openrlhf_sgpo.config import Config, RoundsSettings
from openrlhf_sgpo.data import Pair
from openrlhf_sgpo.sources.stored_pairs import check_labels
from openrlhf_sgpo.training.pairs import label_columns, pair_losses

ALGORITHMS = [
    DPO(NoSettings(), BETA),
    CDPO(CDPOSettings(), BETA),
    RDPO(RDPOSettings(), BETA),
    IPO(IPOSettings("mean"), BETA),
    ROPO(ROPOSettings(), BETA),
    SymPO(SymPOSettings(), BETA),
    DrDPO(DrDPOSettings(), BETA),
]
names = [algorithm.name for algorithm in ALGORITHMS]


def pairs(dtype=torch.float64, **labels):
    """Eight pairs with log-probabilities that all differ; a leaf (8, 2) of those of the policy."""
    policy = (draw(16, 1, dtype).view(8, 2) - 20).requires_grad_()
    reference = draw(16, 2, dtype).view(8, 2) - 20
    lengths = torch.arange(3, 19, dtype=dtype).view(8, 2)
    whole = PairBatch(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], torch.arange(8), *lengths.T)
    return replace(whole, **{name: torch.as_tensor(values, dtype=dtype) for name, values in labels.items()}), policy


def gradient(algorithm, nll_coef=0.0, dtype=torch.float64, **labels):
    """Losses (8,), and the gradient of their mean (8, 2)."""
    whole, policy = pairs(dtype, **labels)
    algorithm.begin_stage(Stage(whole.margins(BETA).detach()))
    losses = pair_losses(algorithm, whole, nll_coef)
    return losses.detach(), torch.autograd.grad(losses.mean(), policy)[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=names)
def test_labels_of_1_change_no_bit(algorithm):
    whole, policy = pairs(torch.float32)
    algorithm.begin_stage(Stage(whole.margins(BETA).detach()))
    expected = algorithm.loss(whole)
    (expected_gradient,) = torch.autograd.grad(expected.mean(), policy)
    ones = torch.ones(8)
    for labels in ({}, {"weight": ones}, {"chosen_probability": ones}, {"weight": ones, "chosen_probability": ones}):
        losses, slopes = gradient(algorithm, dtype=torch.float32, **labels)
        assert torch.equal(losses, expected) and torch.equal(slopes, expected_gradient)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=names)
@pytest.mark.parametrize("nll_coef", [0.0, 0.7])
def test_weights_multiply_losses_and_gradients(algorithm, nll_coef):
    """2 for all is twice the gradient; 0 takes the pair away, except from the number that the mean divides by."""
    losses, slopes = gradient(algorithm, nll_coef)
    doubled, doubled_slopes = gradient(algorithm, nll_coef, weight=torch.full((8,), 2.0))
    assert torch.equal(doubled, 2 * losses) and torch.equal(doubled_slopes, 2 * slopes)
    weight = torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 0])
    kept, kept_slopes = gradient(algorithm, nll_coef, weight=weight)
    assert torch.equal(kept, weight * losses) and torch.equal(kept_slopes, weight[:, None] * slopes)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=names)
def test_a_label_that_is_surely_wrong_is_the_other_label(algorithm):
    whole, policy = pairs()
    losses, slopes = gradient(algorithm, 0.3, chosen_probability=torch.zeros(8))
    expected = pair_losses(algorithm, whole.swapped(), 0.3)
    assert torch.equal(losses, expected.detach())
    assert torch.equal(slopes, torch.autograd.grad(expected.mean(), policy)[0])
    margins = whole.margins(BETA)
    assert torch.equal(whole.swapped().margins(BETA), -margins)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_a_constant_probability_is_label_smoothing(smoothing):
    probability = torch.full((8,), 1 - smoothing, dtype=torch.float64)
    soft = gradient(DPO(NoSettings(), BETA), chosen_probability=probability)
    smoothed = gradient(CDPO(CDPOSettings(smoothing), BETA))
    assert all(torch.allclose(*both, rtol=0, atol=1e-15) for both in zip(soft, smoothed, strict=True))


def test_the_minimum_of_ipo_on_soft_labels():
    """At a difference of (2 p - 1) / (2 tau), the population optimum for the preference p."""
    probability = torch.tensor([0.5, 0.6, 0.9], dtype=torch.float64)
    best = (2 * probability - 1) / (2 * BETA)
    differences = best.clone().requires_grad_()
    whole = replace(batch(BETA * differences), chosen_probability=probability)
    (slopes,) = torch.autograd.grad(pair_losses(IPO(IPOSettings(), BETA), whole).sum(), differences)
    assert torch.allclose(slopes, torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_dr_dpo_on_soft_labels_has_the_direction_of_the_objective_over_labels():
    """-b' log mean over pairs and labels of exp(-l / b'): the gradients differ by one factor."""
    probability = torch.linspace(0, 1, 8, dtype=torch.float64)
    _, slopes = gradient(DrDPO(DrDPOSettings(2.0), BETA), chosen_probability=probability)
    whole, policy = pairs()
    margins = whole.margins(BETA)
    kernel = probability * torch.sigmoid(margins) ** 0.5 + (1 - probability) * torch.sigmoid(-margins) ** 0.5
    (expected,) = torch.autograd.grad(-2 * kernel.mean().log(), policy)
    ratio = slopes / expected
    assert torch.allclose(ratio, ratio[0, 0].expand(8, 2), rtol=1e-9)


def test_the_likelihood_term_is_the_cross_entropy_of_chosen_responses():
    """Per token within a response, then over pairs; in the gradient of the logits as well."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(length, 7, dtype=torch.float64, generator=generator) for length in (3, 5)]
    targets = [torch.randint(7, (length,), generator=generator) for length in (3, 5)]
    variables = [values.requires_grad_() for values in logits]
    chosen = torch.stack(
        [
            values.log_softmax(-1).gather(-1, tokens[:, None]).sum()
            for values, tokens in zip(variables, targets, strict=True)
        ]
    )
    none, lengths = torch.zeros(2, dtype=torch.float64), torch.tensor([3.0, 5.0], dtype=torch.float64)
    whole = PairBatch(chosen, none - 9, none, none, None, lengths, lengths + 1)
    dpo = DPO(NoSettings(), BETA)
    term = (pair_losses(dpo, whole, 0.7) - dpo.loss(whole)).mean()
    cross_entropy = torch.nn.functional.cross_entropy
    expected = 0.7 * sum(map(cross_entropy, variables, targets)) / 2
    assert term.item() == pytest.approx(expected.item(), abs=1e-12)
    slopes = torch.autograd.grad(term, variables, retain_graph=True)
    expected_slopes = torch.autograd.grad(expected, variables)
    assert all(torch.allclose(*both, rtol=0, atol=1e-12) for both in zip(slopes, expected_slopes, strict=True))


@pytest.mark.parametrize(
    ("algorithm", "rounds", "data", "refused"),
    [
        (DPO, 0, "new", []),
        (KLDPO, 2, "all", ["weight", "chosen_probability"]),
        (DrDPO, 2, "all", []),
        (SGPO, 2, "new", []),  # the columns are read in its seed stage, which is DPO
        (SGPO, 2, "all", ["weight", "chosen_probability"]),
        (SGPOTransport, 2, "all", ["weight", "chosen_probability"]),
        (SPA, 2, "all", ["chosen_probability"]),
    ],
)
def test_columns_without_a_meaning_are_refused_before_a_model_is_loaded(algorithm, rounds, data, refused):
    config = Config(rounds=RoundsSettings(count=rounds, data=data))
    for column in ("weight", "chosen_probability"):
        rows = [Pair("a", [], "x", "y"), Pair("b", [], "x", "y", **{column: 0.5})]
        if column in refused:
            message = f"--algo {algorithm.name} cannot use the column '{column}'.* in 1 of 2 pairs .*, such as b:"
            with pytest.raises(ValueError, match=message):
                check_labels(config, algorithm, rows)
        else:
            check_labels(config, algorithm, rows)
        check_labels(config, algorithm, rows[:1])


def test_spa_takes_weights():
    _, slopes = gradient(SPA(SPASettings(extrapolation=[0.0], warmup_share=0.0), BETA), weight=torch.full((8,), 3.0))
    _, expected = gradient(SPA(SPASettings(extrapolation=[0.0], warmup_share=0.0), BETA))
    assert torch.equal(slopes, 3 * expected)


def test_columns_that_are_all_1_are_left_out():
    rows = [Pair("a", [], "x", "y", weight=2.0), Pair("b", [], "x", "y")]
    assert {name: values.tolist() for name, values in label_columns(rows).items()} == {"weight": [2.0, 1.0]}
    assert label_columns(rows[1:]) == {}
