"""The best case of SGPO's ball: its certificate, gradient, refresh and limits."""

import json
import math

import pytest
import torch
from pair_batches import BETA, batch, close, draw, gradient_of

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms.base import Stage
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.sgpo import SaturatedBallError
from openrlhf_sgpo.algorithms.sgpo_best import SGPOBest, SGPOBestSettings
from openrlhf_sgpo.dro import solve_best_case

FOLLOWERS = [{"radius": 0.3}, {"space": "probability", "radius": 0.05}]


def sgpo_best(**options):
    assert SGPOBest.option_problems(SGPOBestSettings(**options)) == []
    return SGPOBest(SGPOBestSettings(**options), BETA)


def best_case(margins, options):
    return solve_best_case(margins, options["radius"], space=options.get("space", "margin"))


@pytest.mark.parametrize("options", FOLLOWERS)
def test_certificate_and_value(options):
    margins = draw(25)
    algorithm = sgpo_best(**options)
    certificate = algorithm.begin_stage(Stage(margins))
    assert certificate["bound"] - 1e-12 <= certificate["value"] < certificate["empirical"]
    assert abs(certificate["gap"]) < 1e-12
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    assert (certificate["ball"], certificate["pairs"]) == ("best", 25)
    assert certificate["budget_used"] == pytest.approx(1.0) and "edge" not in certificate
    best = best_case(margins, options)
    for name in (
        "value",
        "dual_value",
        "empirical",
        "bound",
        "slope",
        "level",
        "threshold",
        "fraction_moved",
        "radius",
    ):
        assert certificate[name] == getattr(best, name), name
    # V = mean psi - slope * radius.
    mean = float(algorithm.loss(batch(margins)).mean())
    assert mean - certificate["slope"] * options["radius"] == close(certificate["value"])


@pytest.mark.parametrize("options", FOLLOWERS)
@pytest.mark.parametrize("margins", [draw(20), torch.zeros(10).double(), torch.tensor([-0.3]).double()])
def test_gradient_is_that_of_the_value(options, margins):
    algorithm = sgpo_best(**options)
    algorithm.begin_stage(Stage(margins))
    gradient = gradient_of(algorithm, margins)
    step = 1e-5 * torch.eye(len(margins), dtype=torch.float64)

    def value(point):
        return best_case(point, options).value

    differences = margins.new_tensor([(value(margins + change) - value(margins - change)) / 2e-5 for change in step])
    assert torch.allclose(gradient, differences, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", FOLLOWERS)
def test_gentler_than_dpo_where_the_policy_ranks_badly(options):
    algorithm = sgpo_best(**options)
    threshold = algorithm.begin_stage(Stage(draw(40)))["threshold"]
    later = draw(40, seed=1)
    gradient = gradient_of(algorithm, later) * 40
    low = later < threshold
    assert 3 < low.sum() < 37
    assert (gradient[low].abs() < torch.sigmoid(-later[low])).all()
    assert torch.allclose(gradient[~low], -torch.sigmoid(-later[~low]))


@pytest.mark.parametrize("space", ["margin", "probability"])
def test_radius_0_is_dpo_to_the_last_bit(space):
    algorithm = sgpo_best(space=space, radius=0.0)
    certificate = algorithm.begin_stage(Stage(draw(10)))
    later = draw(10, seed=1)
    assert torch.equal(algorithm.loss(batch(later)), dpo_loss(later))
    assert certificate["value"] == close(certificate["empirical"])
    assert certificate["threshold"] is None
    json.dumps(certificate, allow_nan=False)


@pytest.mark.parametrize("options", FOLLOWERS)
def test_refreshes_and_resumes(options):
    start, steps, later = draw(16), [draw(4, seed) - 0.3 for seed in (1, 2, 3)], torch.linspace(-5, 5, 16).double()
    settings = {**options, "refresh_steps": 2, "refresh_window": 24}
    algorithm, resumed = sgpo_best(**settings), sgpo_best(**settings)
    algorithm.begin_stage(Stage(start))
    before = algorithm.loss(batch(later))
    assert algorithm.after_step(steps[0]) == {}
    assert torch.equal(algorithm.loss(batch(later)), before)
    resumed.begin_stage(Stage(start))
    resumed.load_state_dict(algorithm.state_dict())
    assert torch.equal(resumed.loss(batch(later)), before)
    metrics = algorithm.after_step(steps[1])
    best = best_case(torch.cat([start, *steps[:2]]), options)
    after = algorithm.loss(batch(later))
    assert torch.allclose(after, best.robust_loss(later), rtol=0, atol=1e-12)
    assert float((after - before).abs().max()) > 1e-6
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in metrics.values())
    for name in ("value", "empirical", "bound", "slope", "level", "threshold", "gap"):
        assert metrics[f"sgpo_best/{name}"] == close(getattr(best, name))
    assert resumed.after_step(steps[1]) == metrics
    assert torch.equal(resumed.loss(batch(later)), after)


def test_saturated_best_case():
    margins = draw(9)
    enough = float(torch.sigmoid(-margins).mean())
    with pytest.raises(SaturatedBallError, match="all 9 margins to probability 1, .* no gradient") as caught:
        sgpo_best(space="probability", radius=enough + 1e-9).begin_stage(Stage(margins))
    for part in ("Lower --sgpo_best.radius.", "--rounds.loss_reference previous"):
        assert part in str(caught.value)
    assert "window_pad" not in str(caught.value)
    sgpo_best(space="probability", radius=enough - 1e-9).begin_stage(Stage(margins))
    sgpo_best(radius=100.0).begin_stage(Stage(margins))  # the line has no end to move to


def test_pairs_that_training_has_brought_to_probability_1_do_not_end_it():
    algorithm = sgpo_best(space="probability", radius=0.1)
    algorithm.begin_stage(Stage(draw(9)))
    before = algorithm.after_step(draw(9))
    fitted = torch.full((300,), 5.0, dtype=torch.float64)
    assert algorithm.after_step(fitted) == before, "the answer before stays"
    assert torch.isfinite(algorithm.loss(batch(fitted))).all()
    with pytest.raises(SaturatedBallError):
        algorithm.begin_stage(Stage(fitted))


def test_check_names_its_own_flags():
    (problem,) = flags.out_of_range({"sgpo_best": SGPOBestSettings(radius=-1.0)})
    assert problem == "--sgpo_best.radius: -1.0 is out of range, use at least 0"
