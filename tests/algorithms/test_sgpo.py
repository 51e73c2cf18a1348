"""SGPO's hooks: the loss that training minimises against the follower's answer, its gradient, refresh, and refusals."""

import json
import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from pair_batches import BETA, batch, close, draw, gradient_of

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms.base import PairBatch, Stage
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.sgpo import SGPO, SaturatedBallError, SGPOSettings
from openrlhf_sgpo.dro import solve_worst_case

MARGIN = {"space": "margin", "radius": 0.3}
PROBABILITY = {"space": "probability", "radius": 0.05}
TANGENTS = [{**MARGIN, "pieces": 6}, {**MARGIN, "pieces": 1}]
FOLLOWERS = [MARGIN, *TANGENTS, PROBABILITY, {**PROBABILITY, "radius": 0.15, "pieces": 3}]


def sgpo(**options):
    assert SGPO.option_problems(SGPOSettings(**options)) == []
    return SGPO(SGPOSettings(**options), BETA)


def follower(options):
    """The arguments of solve_worst_case that these settings ask for."""
    settings = SGPOSettings(**options)
    return {
        "radius": settings.radius,
        "space": settings.space,
        "pieces": settings.pieces or None,
        "window_pad": settings.window_pad,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radius_0_is_dpo_to_the_last_bit(dtype):
    algorithm = sgpo(radius=0.0)
    certificate = algorithm.begin_stage(Stage(draw(10, dtype=dtype)))
    margins = draw(10, seed=1, dtype=dtype)
    assert torch.equal(algorithm.loss(batch(margins)), dpo_loss(margins))
    for name in ("value", "dual_value", "bound"):
        assert certificate[name] == close(certificate["empirical"])
    assert certificate["threshold"] is None and certificate["fraction_moved"] == 0
    json.dumps(certificate, allow_nan=False)


@pytest.mark.parametrize("options", FOLLOWERS)
@pytest.mark.parametrize("start", [draw(40), 0.03 + draw(40) / 30])
@pytest.mark.parametrize("pad", [1.0, 0.0])
def test_loss_and_gradient_are_continuous_in_the_radius_down_to_0(options, start, pad):
    """As the radius falls to 0 the leader's loss and gradient approach those of radius 0: DPO's, with the exact loss, also at
    the edge, left of it, and far right of where the follower was solved. A pair above the threshold gets the very same ones;
    the threshold itself falls to the smallest margin."""
    options = {**options, "window_pad": pad}
    outside = [-9.0, 5.0] if options["space"] == "margin" else [5.0]  # nothing lies left of probability 0
    margins = torch.cat([start, start.new_tensor(outside)])
    without = sgpo(**{**options, "radius": 0.0})
    without.begin_stage(Stage(start))
    expected, expected_gradient = without.loss(batch(margins)), gradient_of(without, margins)
    if options["space"] == "margin" and "pieces" not in options:
        assert torch.equal(expected, dpo_loss(margins))
    distances = []
    for radius in (1e-2, 1e-4, 1e-6, 1e-8):
        algorithm = sgpo(**{**options, "radius": radius})
        algorithm.begin_stage(Stage(start))
        loss, gradient = algorithm.loss(batch(margins)), gradient_of(algorithm, margins)
        distances.append(float((loss - expected).abs().max() + (gradient - expected_gradient).abs().max()))
    assert all(later <= earlier + 1e-15 for earlier, later in pairwise(distances))
    # What is left is the smallest margin's gradient, of which a share of 40 * radius / (margin - edge) moves.
    assert distances[-1] < 1e-6


def test_margins_of_a_batch_are_those_of_the_paper():
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (draw(5, seed) for seed in range(4))
    pairs = PairBatch(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    expected = BETA * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    assert torch.allclose(pairs.margins(BETA), expected, rtol=0, atol=1e-12)
    algorithm = sgpo(radius=0.0)
    algorithm.begin_stage(Stage(expected))
    assert torch.allclose(algorithm.loss(pairs), -torch.log(torch.sigmoid(expected)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", FOLLOWERS)
def test_certificate(options):
    margins = draw(25)
    certificate = sgpo(**options).begin_stage(Stage(margins))
    assert certificate["empirical"] < certificate["value"] <= certificate["bound"] + 1e-12
    assert abs(certificate["gap"]) < 1e-12
    assert certificate["dual_value"] == close(certificate["value"])
    assert certificate["budget_used"] == pytest.approx(1.0)
    assert 0 < certificate["fraction_moved"] < 1
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    assert certificate["pairs"] == 25 and certificate["ball"] == "worst"
    worst = solve_worst_case(margins, **follower(options))
    for name in ("value", "empirical", "bound", "slope", "edge", "threshold", "fraction_moved", "radius", "space"):
        assert certificate[name] == getattr(worst, name), name


def test_the_value_is_never_below_the_loss_without_an_attack_unless_tangents_are_named():
    margins = 0.5 + draw(200) / 1.5
    plain = float(dpo_loss(margins).mean())
    algorithm = sgpo(radius=0.01)
    certificate = algorithm.begin_stage(Stage(margins))
    assert certificate["value"] > certificate["empirical"] == pytest.approx(plain)
    later = torch.cat([torch.full((500,), certificate["edge"] - 3.0), draw(524) + 5]).double()
    refreshed = algorithm.after_step(later)  # many pairs have left the support on both sides
    assert refreshed["sgpo/value"] > refreshed["sgpo/empirical"] == pytest.approx(float(dpo_loss(later).mean()))
    assert "delta_K" not in certificate
    with_tangents = sgpo(radius=0.01, pieces=6).begin_stage(Stage(margins))
    assert with_tangents["value"] < plain  # which is why the certificate says how much the tangents hide
    assert with_tangents["delta_K"] == close(certificate["value"] - with_tangents["value"])


@pytest.mark.parametrize("options", FOLLOWERS)
def test_what_the_leader_minimises_is_the_value(options):
    """V = slope * radius + mean phi (dual)."""
    margins = draw(25)
    algorithm = sgpo(**options)
    certificate = algorithm.begin_stage(Stage(margins))
    mean = float(algorithm.loss(batch(margins)).mean())
    assert certificate["slope"] * options["radius"] + mean == close(certificate["value"])


@pytest.mark.parametrize("options", FOLLOWERS)
def test_gradient_is_that_of_the_worst_case(options):
    """Danskin's theorem, against the follower's own gradient and against differences of its value."""
    margins = draw(12)
    algorithm = sgpo(**options)
    algorithm.begin_stage(Stage(margins))
    gradient = gradient_of(algorithm, margins)
    worst = solve_worst_case(margins, **follower(options))
    assert torch.allclose(gradient, worst.gradient, rtol=0, atol=1e-14)
    split = (worst.moved > 1e-3) & (worst.moved < 1 - 1e-3)
    assert int(split.sum()) == 1

    def value(point):
        keywords = {key: item for key, item in follower(options).items() if key != "window_pad"}
        return solve_worst_case(point, **keywords, window=worst.window).value

    step = 1e-5 * torch.eye(12, dtype=torch.float64)
    differences = margins.new_tensor([(value(margins + change) - value(margins - change)) / 2e-5 for change in step])
    assert torch.allclose(gradient, differences, rtol=0, atol=1e-6)


# Margins at which V has a kink, and the directions in which all samples of a tie move together.
TIED = {
    "all equal": (torch.zeros(10), 0.05),
    "a tie at the threshold": (torch.tensor([-1.0, 0.0, 0.0, 0.0, 2.0, 3.0]), 0.3),
    "two equal": (torch.tensor([0.5, 0.5]), 0.2),
    "one pair": (torch.tensor([-0.3]), 0.4),
    "all but one moved": (torch.tensor([-1.0, -0.5, 0.0, 4.0]), 0.6),
}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("space", ["margin", "probability"])
def test_gradient_at_ties_and_in_tiny_samples_is_that_of_the_value(case, space):
    margins, radius = TIED[case][0].double(), TIED[case][1]
    radius = radius if space == "margin" else radius / 5
    algorithm = sgpo(space=space, radius=radius)
    algorithm.begin_stage(Stage(margins))
    gradient = gradient_of(algorithm, margins)
    worst = solve_worst_case(margins, radius, space=space)
    assert torch.allclose(gradient, worst.gradient, rtol=0, atol=1e-15)

    def value(point):
        return solve_worst_case(point, radius, space=space, window=worst.window).value

    for level in margins.unique():
        direction = (margins == level).double()
        difference = (value(margins + 1e-6 * direction) - value(margins - 1e-6 * direction)) / 2e-6
        assert float(gradient @ direction) == pytest.approx(difference, abs=1e-7)


def test_gradient_at_the_edge_is_that_of_dpo():
    """V has a kink there: a margin that falls takes its own loss with it; one that rises costs the follower budget, and so
    lam. The leader gets the first, which is also the limit of both as the radius goes to 0."""
    margins = torch.tensor([-1.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    algorithm = sgpo(radius=0.2, window_pad=0.0)
    certificate = algorithm.begin_stage(Stage(margins))
    gradient = gradient_of(algorithm, margins)
    assert certificate["edge"] == -1.0
    assert float(gradient[0]) == pytest.approx(-1 / (1 + math.exp(-1.0)) / 4, abs=1e-15)

    def value(shift):
        raised = margins + torch.tensor([shift, 0, 0, 0], dtype=torch.float64)
        return solve_worst_case(raised, 0.2, window=(-1.0, 3.0)).value

    assert float(gradient[0]) == pytest.approx((value(0.0) - value(-1e-6)) / 1e-6, abs=1e-6)
    assert -certificate["slope"] / 4 == pytest.approx((value(1e-6) - value(0.0)) / 1e-6, abs=1e-6)


def test_bad_pairs_get_one_weight_and_a_changed_policy_keeps_it():
    """Between edge and threshold the loss is a straight chord; on both sides of them it is DPO's."""
    margins = draw(40)
    algorithm = sgpo(**MARGIN)
    certificate = algorithm.begin_stage(Stage(margins))
    moved_on = torch.cat([margins + 0.1 * draw(40, seed=1), margins.new_tensor([certificate["edge"] - 2])])
    gradient = gradient_of(algorithm, moved_on) * 41
    low = (moved_on > certificate["edge"]) & (moved_on < certificate["threshold"])
    assert low.sum() > 3 and (~low).sum() > 3
    assert torch.allclose(gradient[low], torch.tensor(-certificate["slope"], dtype=torch.float64))
    assert torch.allclose(gradient[~low], -torch.sigmoid(-moved_on[~low]))


@pytest.mark.parametrize("options", [MARGIN, {**PROBABILITY, "radius": 0.1}])
def test_refresh_answers_the_latest_margins_in_the_window_of_the_stage(options):
    start, later = draw(16), torch.linspace(-5, 5, 16, dtype=torch.float64)
    steps = [draw(4, seed) - 0.3 * seed for seed in range(1, 7)]
    algorithm = sgpo(**options, refresh_steps=3, refresh_window=20)
    window = algorithm.begin_stage(Stage(start, seed=3))["window"]
    shuffled = start[torch.randperm(16, generator=torch.Generator().manual_seed(3))]
    pairs = batch(later)
    before = algorithm.loss(pairs)
    for refresh in (1, 2):
        for step in steps[3 * refresh - 3 : 3 * refresh - 1]:
            assert algorithm.after_step(step) == {}
            assert torch.equal(algorithm.loss(pairs), before)
        metrics = algorithm.after_step(steps[3 * refresh - 1].clone().requires_grad_())
        recent = torch.cat([shuffled, *steps[: 3 * refresh]])[-20:]
        keywords = {key: item for key, item in follower(options).items() if key != "window_pad"}
        worst = solve_worst_case(recent, **keywords, window=tuple(window))
        after = algorithm.loss(pairs)
        assert torch.allclose(after, worst.robust_loss(later), rtol=0, atol=1e-12)
        assert float((after - before).abs().max()) > 1e-6
        before = after
        assert metrics["sgpo/pairs"] == 20 and metrics["sgpo/edge"] == window[0]
        for name in ("value", "empirical", "bound", "slope", "edge", "threshold", "gap"):
            assert metrics[f"sgpo/{name}"] == close(getattr(worst, name))
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in metrics.values())


def test_a_long_start_is_sampled_whatever_the_order_of_the_data():
    """Not the last pairs, which with --rounds.data all are the newest."""
    start = torch.cat([torch.zeros(500), torch.ones(500)]).double()
    algorithm = sgpo(radius=0.1, refresh_window=100)
    algorithm.begin_stage(Stage(start))
    algorithm.after_step(torch.zeros(0, dtype=torch.float64))
    share = float(algorithm._recent.mean())
    assert len(algorithm._recent) == 100 and 0.3 < share < 0.7


def test_margins_that_leave_the_window_are_answered():
    algorithm = sgpo(radius=0.1, refresh_window=4)
    edge = algorithm.begin_stage(Stage(draw(8)))["edge"]
    far_right = algorithm.after_step(torch.full((4,), 50.0, dtype=torch.float64))
    assert far_right["sgpo/edge"] == edge and far_right["sgpo/value"] < 0.1 * (50 - edge)
    with pytest.raises(SaturatedBallError, match="all 4 margins to the edge"):
        algorithm.after_step(torch.full((4,), edge - 1.0, dtype=torch.float64))


def test_a_buffer_that_the_caller_reuses_does_no_harm():
    algorithm, other = sgpo(**MARGIN), sgpo(**MARGIN)
    buffer = draw(4, seed=1)
    for each in (algorithm, other):
        each.begin_stage(Stage(draw(8)))
        each.after_step(buffer.clone() if each is other else buffer)
    buffer.fill_(5.0)
    assert algorithm.after_step(draw(4, seed=2)) == other.after_step(draw(4, seed=2))


@pytest.mark.parametrize("options", [{**MARGIN, "refresh_steps": 0}, {"radius": 0.0, "refresh_steps": 1}])
def test_without_refresh_the_answer_stays(options):
    algorithm = sgpo(**options)
    algorithm.begin_stage(Stage(draw(8)))
    before = algorithm.loss(batch(draw(8, seed=1)))
    for seed in range(3):
        assert algorithm.after_step(draw(8, seed=seed) - 3) == {}
    assert torch.equal(algorithm.loss(batch(draw(8, seed=1))), before)


@pytest.mark.parametrize("start", [draw(16), None], ids=["a stage", "no stage, as in other trainers"])
@pytest.mark.parametrize("refresh_steps", [0, 1, 3])
@pytest.mark.parametrize("steps", [2, 5])
def test_a_checkpoint_restores_the_answer(refresh_steps, start, steps):
    algorithm, resumed = (sgpo(**MARGIN, refresh_steps=refresh_steps, refresh_window=10) for _ in range(2))
    for each in (algorithm, resumed):
        each.begin_stage(Stage(start))
    for seed in range(steps):
        algorithm.after_step(draw(4, seed + 1))
    resumed.load_state_dict(algorithm.state_dict())
    later = draw(8, seed=9)
    assert torch.equal(resumed.loss(batch(later)), algorithm.loss(batch(later)))
    for _ in range(3):
        assert resumed.after_step(later) == algorithm.after_step(later)


def test_next_stage_has_its_own_margins_and_window():
    algorithm = sgpo(**MARGIN, refresh_window=100)
    for seed in (0, 1):
        margins = draw(8, seed) - 3 * seed
        worst = solve_worst_case(margins, **follower(MARGIN))
        assert algorithm.begin_stage(Stage(margins))["value"] == close(worst.value)
        assert algorithm.after_step(draw(4, seed + 2))["sgpo/edge"] == worst.edge


def test_the_proximal_term_is_the_squared_distance_from_the_start():
    start, later = draw(10), draw(10, seed=1)
    algorithm, plain = sgpo(**MARGIN, prox=0.7), sgpo(**MARGIN)
    for each in (algorithm, plain):
        each.begin_stage(Stage(start))
    index = torch.tensor([7, 2, 9])
    added = algorithm.loss(batch(later[index], index)) - plain.loss(batch(later[index], index))
    assert torch.allclose(added, 0.7 * (later[index] - start[index]) ** 2)
    pairs = batch(later)
    with pytest.raises(ValueError, match="needs the index of each pair"):
        algorithm.loss(PairBatch(pairs.policy_chosen, *[pairs.policy_rejected] * 3))


def test_saturated_ball_in_margin_space():
    algorithm = sgpo(radius=1.0, window_pad=1.0)  # all margins 0: exactly enough to move them all
    with pytest.raises(SaturatedBallError) as caught:
        algorithm.begin_stage(Stage(torch.zeros(7)))
    for part in ("--sgpo.radius 1.0", "all 7 margins", "edge -1,", "Margins range from 0 to 0."):
        assert part in str(caught.value)
    for remedy in ("Lower --sgpo.radius", "or raise --sgpo.window_pad", "--rounds.loss_reference previous"):
        assert remedy in str(caught.value)
    sgpo(radius=0.99, window_pad=1.0).begin_stage(Stage(torch.zeros(7)))


def test_saturated_ball_in_probability_space():
    margins = draw(9)
    enough = float(torch.sigmoid(margins).mean())
    with pytest.raises(SaturatedBallError, match=r"Lower --sgpo\.radius\. ") as caught:
        sgpo(space="probability", radius=enough + 1e-9).begin_stage(Stage(margins))
    assert "window_pad" not in str(caught.value)
    assert f"from {margins.min():.4g} to {margins.max():.4g}" in str(caught.value)
    sgpo(space="probability", radius=enough - 1e-9).begin_stage(Stage(margins))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_margins_that_are_not_finite(bad):
    margins = draw(6)
    margins[2] = bad
    with pytest.raises(ValueError, match="sample 2"):
        sgpo(**MARGIN).begin_stage(Stage(margins))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"radius": -0.1}, ["--sgpo.radius: -0.1 is out of range, use at least 0"]),
        ({"pieces": -1}, ["--sgpo.pieces: -1 is out of range, use at least 0"]),
        ({"window_pad": -1.0}, ["--sgpo.window_pad: -1.0 is out of range, use at least 0"]),
        ({"refresh_steps": -2}, ["--sgpo.refresh_steps: -2 is out of range, use at least 0"]),
        ({"prox": -1.0}, ["--sgpo.prox: -1.0 is out of range, use at least 0"]),
        ({"refresh_steps": 5, "refresh_window": 0}, ["--sgpo.refresh_window: 0 is out of range, use at least 1"]),
    ],
)
def test_check_names_the_one_problem(options, parts):
    (problem,) = flags.out_of_range({"sgpo": SGPOSettings(**options)})
    for part in parts:
        assert part in problem


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"radius": 0.0},
        {"window_pad": 0.0},
        {"space": "probability"},
        {"space": "probability", "pieces": 1},
        {"refresh_steps": 5, "refresh_window": 1},
        {"refresh_steps": 0},
    ],
)
def test_check_accepts(options):
    assert flags.out_of_range({"sgpo": SGPOSettings(**options)}) == []


def test_settings_and_check_need_no_torch():
    script = (
        "import sys\n"
        "from openrlhf_sgpo.algorithms.sgpo import SGPO, SGPOSettings\n"
        "assert SGPO.option_problems(SGPOSettings()) == []\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
