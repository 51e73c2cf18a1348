"""Dr. DPO and KLDPO: the weights of the two sides of a KL ball, what they optimise, and how the level follows training."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pair_batches import BETA, batch, close, draw, gradient_of

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms.base import Stage
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.dr_dpo import DrDPO, DrDPOSettings
from openrlhf_sgpo.algorithms.kl_ball import tilted_level, tilted_loss
from openrlhf_sgpo.algorithms.kl_dpo import KLDPO, KLDPOSettings
from openrlhf_sgpo.algorithms.sym_po import SymPO, SymPOSettings

TEMPERATURES = st.floats(0.05, 50) | st.floats(-50, -0.05)


def best(temperature=1.0, **options):
    return DrDPO(DrDPOSettings(temperature, **options), BETA)


def worst(temperature=1.0, max_weight=1e6, **options):
    return KLDPO(KLDPOSettings(temperature, max_weight, **options), BETA)


def log_mean_exp(losses, temperature):
    return temperature * ((losses / temperature).logsumexp(0) - math.log(len(losses)))


@pytest.mark.parametrize(("side", "sign"), [(best, -1), (worst, 1)])
@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_value_and_gradient_are_those_of_log_mean_exp(side, sign, temperature):
    """On the margins whose level it has; batch by batch as well, since a pair's loss needs no other pair."""
    margins = draw(60)
    algorithm = side(temperature)
    algorithm.begin_stage(Stage(margins))
    variable = margins.clone().requires_grad_()
    objective = log_mean_exp(dpo_loss(variable), sign * temperature)
    (expected,) = torch.autograd.grad(objective, variable)
    assert torch.allclose(gradient_of(algorithm, margins), expected, rtol=0, atol=1e-12)
    assert algorithm.loss(batch(margins)).mean().item() == close(objective.item())
    parts = torch.cat([algorithm.loss(batch(part)) for part in margins.split(7)])
    assert torch.equal(parts, algorithm.loss(batch(margins)))


@given(temperature=TEMPERATURES, seed=st.integers(0, 5))
def test_the_value_is_that_of_the_ball(temperature, seed):
    """No other distribution of the pairs is better for the adversary or the helper: E_Q[l] - t KL(Q || P) at the weights is the
    value, and 20 other distributions do not exceed it (t > 0), or undercut it (t < 0)."""
    losses = dpo_loss(draw(30, seed))
    level = tilted_level(losses, temperature)

    def objective(shares):
        return (shares * losses).sum() - temperature * (shares * (30 * shares).log()).nan_to_num(0.0).sum()

    weights = ((losses - level) / temperature).exp()
    assert weights.mean().item() == close(1.0)
    value = objective(weights / 30)
    assert tilted_loss(losses, level, temperature).mean().item() == pytest.approx(value.item(), abs=1e-9)
    others = torch.rand(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mixed = 0.9 * weights / 30 + 0.1 * others / others.sum(1, keepdim=True)
    reached = torch.stack([objective(shares) for shares in mixed])
    assert bool((math.copysign(1, temperature) * (reached - value) <= 1e-12).all())


@given(temperature=st.floats(0.02, 5), cap=st.floats(1.01, 40), seed=st.integers(0, 5))
def test_capped_weights_are_optimal_too(temperature, cap, seed):
    """Weights of mean 1 and at most ``cap``, equal to exp((l - c) / t) below it: the conditions of Karush, Kuhn and Tucker."""
    losses = dpo_loss(3 * draw(30, seed))
    level = tilted_level(losses, temperature, cap)
    variable = losses.clone().requires_grad_()
    total = tilted_loss(variable, level, temperature, cap)
    (weights,) = torch.autograd.grad(total.sum(), variable)
    free = ((losses - level) / temperature).exp()
    assert weights.mean().item() == pytest.approx(1.0, abs=1e-9)
    assert torch.allclose(weights, free.clamp(max=cap), rtol=1e-9)
    entropy = (weights * weights.clamp_min(1e-300).log()).mean()
    assert total.mean().item() == pytest.approx(((weights * losses).mean() - temperature * entropy).item(), abs=1e-9)


def test_a_small_temperature_with_a_cap_averages_the_largest_losses():
    """The limit is the conditional value at risk: with a cap of 4 the mean of the largest quarter."""
    losses = dpo_loss(3 * draw(40))
    value = tilted_loss(losses, tilted_level(losses, 1e-6, 4.0), 1e-6, 4.0).mean()
    assert value.item() == pytest.approx(losses.sort().values[-10:].mean().item(), abs=1e-4)


@pytest.mark.parametrize("side", [best, worst])
def test_a_large_temperature_is_dpo(side):
    margins = draw(50)
    for dtype, temperature, tolerance in ((torch.float64, 1e7, 1e-6), (torch.float32, 1e5, 1e-4)):
        algorithm = side(temperature)
        algorithm.begin_stage(Stage(margins.to(dtype)))
        loss = algorithm.loss(batch(margins.to(dtype)))
        assert torch.allclose(loss, dpo_loss(margins.to(dtype)), rtol=0, atol=tolerance)
        gradient = gradient_of(algorithm, margins.to(dtype))
        assert torch.allclose(gradient, -torch.sigmoid(-margins).to(dtype) / 50, rtol=0, atol=tolerance)


def test_dr_dpo_at_1_has_the_direction_of_sym_po():
    margins = draw(50)
    algorithm = best(1.0)
    algorithm.begin_stage(Stage(margins))
    gradient, symmetric = gradient_of(algorithm, margins), gradient_of(SymPO(SymPOSettings(), BETA), margins)
    assert torch.allclose(gradient * torch.sigmoid(margins).mean(), symmetric, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [best, worst])
def test_a_level_that_lags_scales_all_weights_alike(side):
    margins = draw(40)
    stale, fresh = side(0.8), side(0.8)
    stale.begin_stage(Stage(margins - 1.0))
    fresh.begin_stage(Stage(margins))
    ratio = gradient_of(stale, margins) / gradient_of(fresh, margins)
    assert torch.allclose(ratio, ratio[0].expand(40), rtol=1e-12)
    assert abs(ratio[0].item() - 1) > 0.1


@pytest.mark.parametrize("side", [best, worst])
def test_the_level_follows_the_latest_margins_and_survives_a_checkpoint(side):
    algorithm = side(2.0, window=24)
    algorithm.begin_stage(Stage(draw(100)))
    steps = [draw(8, seed) for seed in range(1, 5)]
    for step in steps:
        metrics = algorithm.after_step(step)
    sign = -1 if side is best else 1
    expected = log_mean_exp(dpo_loss(torch.cat(steps[1:])), sign * 2.0).item()
    assert metrics[f"{algorithm.name}/level"] == close(expected)
    weights = ((dpo_loss(steps[-1]) - expected) / (sign * 2.0)).exp()
    assert metrics[f"{algorithm.name}/largest_weight"] == close(weights.max().item())
    resumed = side(2.0, window=24)
    resumed.begin_stage(Stage(draw(100)))
    resumed.load_state_dict(algorithm.state_dict())
    assert torch.equal(resumed.loss(batch(draw(9, 7))), algorithm.loss(batch(draw(9, 7))))


def test_the_first_level_does_not_depend_on_the_order_of_steps_only_on_the_seed():
    margins = draw(300)
    levels = []
    for seed in (1, 1, 2):
        algorithm = worst(window=50)
        algorithm.begin_stage(Stage(margins, seed=seed))
        levels.append(algorithm.loss(batch(torch.zeros(1, dtype=torch.float64))).item())
    assert levels[0] == levels[1] != levels[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_stay_finite(dtype):
    margins = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], dtype=dtype)
    for algorithm in (best(0.01), worst(0.01), worst(0.01, max_weight=10.0)):
        algorithm.begin_stage(Stage(torch.zeros(5, dtype=dtype)))
        assert algorithm.loss(batch(margins)).isfinite().all()
        assert gradient_of(algorithm, margins).isfinite().all()
        assert all(map(math.isfinite, algorithm.after_step(margins).values()))


def test_gradient():
    values = draw(9).exp().requires_grad_()
    assert torch.autograd.gradcheck(lambda losses: tilted_loss(losses, 0.9, -0.7), values)
    assert torch.autograd.gradcheck(lambda losses: tilted_loss(losses, 0.9, 0.7, 3.0), values)


def test_without_a_stage_there_is_no_level():
    with pytest.raises(ValueError, match="begin_stage"):
        best().loss(batch(draw(3)))


def test_ranges():
    problems = flags.out_of_range({"dr_dpo": DrDPOSettings(0.0, 0), "kl_dpo": KLDPOSettings(0.0, 1.0, 0)})
    assert [problem.partition(":")[0] for problem in problems] == [
        *("--dr_dpo.beta", "--dr_dpo.window", "--kl_dpo.tau", "--kl_dpo.max_weight", "--kl_dpo.window"),
    ]
