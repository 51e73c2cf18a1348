"""SGPO's hooks: the loss that training minimises against the follower's answer, groups, refresh, and refusals."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from openrlhf_sgpo.algorithms.base import PairBatch
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.sgpo import SGPO, SaturatedBallError, SGPOSettings
from openrlhf_sgpo.dro import slsqp, solve_best_case, solve_worst_case
from openrlhf_sgpo.dro.losses import released_loss

BETA = 0.5  # a power of two, so that margins come back from a batch exactly
MARGIN = {"space": "margin", "radius": 0.3}
EXACT = {**MARGIN, "pieces": 0}
PROBABILITY = {"space": "probability", "radius": 0.05}
FOLLOWERS = [MARGIN, EXACT, {**MARGIN, "pieces": 1}, PROBABILITY, {**PROBABILITY, "radius": 0.15, "pieces": 3}]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny, and on a busy machine waiting for a second thread doubles the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(count, seed=0, dtype=torch.float64):
    return 1.5 * torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def sgpo(**options):
    assert SGPO.check(SGPOSettings(**options)) == []
    return SGPO(SGPOSettings(**options), BETA)


def batch(margins, index=None):
    """A batch with these margins, differentiable in them."""
    none = torch.zeros_like(margins)
    index = torch.arange(len(margins)) if index is None else index
    return PairBatch(margins / BETA, none, none, none, index)


def close(expected):
    """Equal to rounding: torch may add up the same numbers in another order."""
    return pytest.approx(expected, rel=0, abs=1e-12)


def follower(options):
    """The arguments of solve_worst_case that these settings ask for."""
    settings = SGPOSettings(**options)
    return {
        "radius": settings.radius,
        "space": settings.space,
        "pieces": settings.pieces or None,
        "window_pad": settings.window_pad,
    }


def split(count, size):
    """The groups as documented: a permutation with seed 0, cut into pieces."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(size)


# Radius 0 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "leader"),
    [("margin", "danskin"), ("margin", "transport"), ("probability", "danskin"), ("probability", "released")],
)
@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radius_0_is_dpo_to_the_last_bit(space, dtype, group_size, leader):
    algorithm = sgpo(space=space, radius=0.0, leader=leader, group_size=group_size)
    certificate = algorithm.begin_stage(draw(10, dtype=dtype))
    margins = draw(10, seed=1, dtype=dtype)
    assert torch.equal(algorithm.loss(batch(margins)), dpo_loss(margins))
    for name in ("value", "dual_value", "bound"):
        assert certificate[name] == close(certificate["empirical"])
    assert certificate["threshold"] is None and certificate["fraction_moved"] == 0
    json.dumps(certificate, allow_nan=False)


def test_margins_of_a_batch_are_those_of_the_paper():
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (draw(5, seed) for seed in range(4))
    pairs = PairBatch(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    expected = BETA * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    assert torch.allclose(pairs.margins(BETA), expected, rtol=0, atol=1e-12)
    algorithm = sgpo(radius=0.0)
    algorithm.begin_stage(expected)
    assert torch.allclose(algorithm.loss(pairs), -torch.log(torch.sigmoid(expected)), rtol=0, atol=1e-12)


# Certificate and the danskin leader -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [0, 7])
@pytest.mark.parametrize("options", FOLLOWERS)
def test_certificate(options, group_size):
    margins = draw(25)
    certificate = sgpo(**options, group_size=group_size).begin_stage(margins)
    assert certificate["empirical"] < certificate["value"] <= certificate["bound"] + 1e-12
    assert abs(certificate["gap"]) < 1e-12
    assert certificate["dual_value"] == close(certificate["value"])
    assert certificate["budget_used"] == pytest.approx(1.0)
    assert 0 < certificate["fraction_moved"] < 1
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    groups = split(25, 7) if group_size else [torch.arange(25)]
    assert (certificate["groups"], certificate["pairs"]) == (len(groups), 25)
    assert certificate["radius"] == options["radius"]
    solved = [(len(group), solve_worst_case(margins[group], **follower(options))) for group in groups]
    for name in ("value", "empirical", "bound", "slope", "edge", "threshold", "fraction_moved"):
        expected = sum(size * getattr(worst, name) for size, worst in solved) / 25
        assert certificate[name] == close(expected), name


@pytest.mark.parametrize("group_size", [0, 7])
@pytest.mark.parametrize("options", FOLLOWERS)
def test_what_the_leader_minimises_is_the_value(options, group_size):
    """V = slope * radius + mean phi (dual), group by group, hence also on average."""
    margins = draw(25)
    algorithm = sgpo(**options, group_size=group_size)
    certificate = algorithm.begin_stage(margins)
    mean = float(algorithm.loss(batch(margins)).mean())
    assert certificate["slope"] * options["radius"] + mean == close(certificate["value"])


@pytest.mark.parametrize("options", FOLLOWERS)
def test_gradient_is_that_of_the_worst_case(options):
    """Danskin's theorem, against the follower's own gradient and against differences of its value."""
    margins = draw(12).requires_grad_()
    algorithm = sgpo(**options)
    algorithm.begin_stage(margins.detach())
    loss = algorithm.loss(batch(margins))
    assert loss.shape == margins.shape
    (gradient,) = torch.autograd.grad(loss.mean(), margins)
    worst = solve_worst_case(margins.detach(), **follower(options))
    off_marginal = (margins.detach() - worst.threshold).abs() > 1e-6
    assert int(off_marginal.sum()) == 11
    assert torch.allclose(gradient[off_marginal], worst.gradient[off_marginal], rtol=0, atol=1e-14)

    def value(point):
        keywords = {key: item for key, item in follower(options).items() if key != "window_pad"}
        return solve_worst_case(point, **keywords, window=worst.window).value

    step = 1e-5 * torch.eye(12, dtype=torch.float64)[off_marginal]
    differences = margins.new_tensor([(value(margins + one) - value(margins - one)) / 2e-5 for one in step])
    assert torch.allclose(gradient[off_marginal], differences, rtol=0, atol=1e-8)


def test_bad_pairs_get_one_weight_and_a_changed_policy_keeps_it():
    """The part below the threshold is a straight chord; right of it the loss is DPO's."""
    margins = draw(40)
    algorithm = sgpo(**EXACT)
    certificate = algorithm.begin_stage(margins)
    moved_on = (margins + 0.1 * draw(40, seed=1)).requires_grad_()
    (gradient,) = torch.autograd.grad(algorithm.loss(batch(moved_on)).sum(), moved_on)
    low = (moved_on < certificate["threshold"]) & (moved_on > certificate["edge"])
    high = moved_on > certificate["threshold"]
    assert low.sum() > 3 and high.sum() > 3
    assert torch.allclose(gradient[low], torch.tensor(-certificate["slope"], dtype=torch.float64))
    assert torch.allclose(gradient[high], -torch.sigmoid(-moved_on[high]))


# Groups ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leader", ["danskin", "transport"])
@pytest.mark.parametrize("group_size", [20, 50])
def test_one_group_of_all_pairs_is_no_groups(leader, group_size):
    margins, later = draw(20), draw(20, seed=1)
    one, all_at_once = (sgpo(**MARGIN, leader=leader, group_size=size) for size in (group_size, 0))
    first, second = one.begin_stage(margins), all_at_once.begin_stage(margins)
    assert first.pop("ball") == second.pop("ball") == "worst"
    assert first == close(second)
    assert torch.allclose(one.loss(batch(later)), all_at_once.loss(batch(later)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", FOLLOWERS)
def test_each_pair_is_looked_up_in_its_own_group(options):
    margins, later = draw(17), draw(17, seed=1)
    algorithm = sgpo(**options, group_size=5)
    algorithm.begin_stage(margins)
    expected = torch.empty_like(margins)
    slopes = []
    for group in split(17, 5):  # the last one has two pairs
        worst = solve_worst_case(margins[group], **follower(options))
        expected[group] = worst.robust_loss(later[group])
        slopes.append(worst.slope)
    assert len(set(slopes)) > 1  # a wrong look-up would show
    assert torch.allclose(algorithm.loss(batch(later)), expected, rtol=0, atol=1e-12)
    for index in torch.randperm(17, generator=torch.Generator().manual_seed(5)).split(4):
        part = algorithm.loss(batch(later[index], index))
        assert torch.allclose(part, expected[index], rtol=0, atol=1e-12)


def test_groups_in_single_precision():
    margins = draw(17, dtype=torch.float32)
    algorithm = sgpo(**MARGIN, group_size=5)
    algorithm.begin_stage(margins)
    loss = algorithm.loss(batch(margins))
    assert loss.dtype == torch.float32
    double = sgpo(**MARGIN, group_size=5)
    double.begin_stage(margins.double())
    assert torch.allclose(loss.double(), double.loss(batch(margins.double())), atol=1e-5)


# Transport and released -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "group_size"),
    [("exact", 0), ("exact", 4), ("program", 0), ("program", 5), ("program", 4)],
)
def test_transport_attains_the_worst_case(solver, group_size):
    if solver == "program":
        pytest.importorskip("cvxpy")
    margins = draw(10)
    algorithm = sgpo(**EXACT, leader="transport", solver=solver, group_size=group_size)
    certificate = algorithm.begin_stage(margins)
    loss = algorithm.loss(batch(margins))
    assert loss.shape == (10,)
    assert float(loss.mean()) == pytest.approx(certificate["value"], abs=1e-6)
    # The atoms move with the policy: every pair keeps its own, in whatever batch it comes.
    later = draw(10, seed=1).requires_grad_()
    whole = algorithm.loss(batch(later))
    (gradient,) = torch.autograd.grad(whole.sum(), later)
    assert bool((gradient < 0).all())
    index = torch.tensor([7, 2, 9])
    assert torch.allclose(algorithm.loss(batch(later[index], index)), whole[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("leader", ["transport", "released"])
def test_atoms_of_groups_are_those_of_their_own_solutions(leader):
    options = EXACT if leader == "transport" else PROBABILITY
    margins, later = draw(11), draw(11, seed=1)
    algorithm = sgpo(**options, leader=leader, group_size=4)
    algorithm.begin_stage(margins)
    expected = torch.empty_like(margins)
    for group in split(11, 4):
        s, q = solve_worst_case(margins[group], **follower(options)).transport()
        for row, pair in enumerate(group.tolist()):
            expected[pair] = 0.0
            for share, weighted in zip(s[row].tolist(), q[row].tolist(), strict=True):
                if share > 0:
                    if leader == "transport":
                        expected[pair] -= share * torch.sigmoid(later[pair] - weighted / share).log()
                    else:
                        atom = torch.sigmoid(later[pair]) - weighted / share
                        expected[pair] -= share * atom.clamp(min=1e-6).log()
    assert torch.allclose(algorithm.loss(batch(later)), expected, rtol=0, atol=1e-9)


def test_released_has_no_gradient_for_moved_pairs_at_the_optimum():
    margins = draw(10).requires_grad_()
    algorithm = sgpo(**PROBABILITY, leader="released")
    algorithm.begin_stage(margins.detach())
    moved = solve_worst_case(margins.detach(), **follower(PROBABILITY)).moved
    loss = algorithm.loss(batch(margins))
    (gradient,) = torch.autograd.grad(loss.sum(), margins)
    assert (moved == 1).any() and (moved == 0).any()
    assert not gradient[moved == 1].any()
    assert torch.allclose(loss[moved == 1], torch.tensor(-math.log(1e-6), dtype=torch.float64))
    assert torch.allclose(loss[moved == 0], dpo_loss(margins)[moved == 0])
    assert torch.allclose(gradient[moved == 0], -torch.sigmoid(-margins[moved == 0]))


def test_slsqp():
    pytest.importorskip("scipy")
    margins = draw(6)
    algorithm = sgpo(space="probability", radius=0.02, pieces=2, leader="released", solver="slsqp")
    certificate = algorithm.begin_stage(margins)
    answer = slsqp(margins, 0.02, pieces=2)
    assert float(answer.displacement.abs().max()) > 0  # the attack took place
    later = draw(6, seed=1).requires_grad_()
    loss = algorithm.loss(batch(later))
    assert torch.allclose(loss, released_loss(later, answer.s, answer.displacement), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), later)
    assert gradient.isfinite().all() and (gradient <= 0).all() and gradient.any()
    # The certificate is that of the exact answer.
    keywords = {"space": "probability", "radius": 0.02, "pieces": 2}
    assert certificate["value"] == close(solve_worst_case(margins, **keywords).value)


# Refresh --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [0, 5])
@pytest.mark.parametrize("options", [MARGIN, {**PROBABILITY, "radius": 0.1}])
def test_refresh_answers_the_latest_margins(options, group_size):
    start, later = draw(16), torch.linspace(-5, 5, 16, dtype=torch.float64)
    steps = [draw(4, seed) - 0.3 * seed for seed in range(1, 7)]
    algorithm = sgpo(**options, group_size=group_size, refresh_steps=3, refresh_window=20)
    algorithm.begin_stage(start)
    pairs = batch(later)
    before = algorithm.loss(pairs)
    for refresh in (1, 2):
        for step in steps[3 * refresh - 3 : 3 * refresh - 1]:
            assert algorithm.after_step(step) == {}
            assert torch.allclose(algorithm.loss(pairs), before, rtol=0, atol=1e-12)
        metrics = algorithm.after_step(steps[3 * refresh - 1].clone().requires_grad_())
        window = torch.cat([start, *steps[: 3 * refresh]])[-20:]
        worst = solve_worst_case(window, **follower(options))
        after = algorithm.loss(pairs)
        assert torch.allclose(after, worst.robust_loss(later), rtol=0, atol=1e-12)
        assert float((after - before).abs().max()) > 1e-6
        before = after
        assert metrics["sgpo/pairs"] == 20 and metrics["sgpo/groups"] == 1
        for name in ("value", "empirical", "bound", "slope", "edge", "threshold", "gap"):
            assert metrics[f"sgpo/{name}"] == close(getattr(worst, name))
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in metrics.values())


def test_refresh_window_keeps_the_latest_of_a_long_start():
    start, step = draw(30), draw(2, seed=1)
    algorithm = sgpo(**MARGIN, refresh_steps=1, refresh_window=10)
    algorithm.begin_stage(start)
    metrics = algorithm.after_step(step)
    worst = solve_worst_case(torch.cat([start[-8:], step]), **follower(MARGIN))
    assert (metrics["sgpo/pairs"], metrics["sgpo/value"]) == (10, close(worst.value))


def test_a_buffer_that_the_caller_reuses_does_no_harm():
    algorithm = sgpo(**MARGIN, refresh_steps=1)
    start, buffer = draw(8), draw(4, seed=1)
    algorithm.begin_stage(start)
    expected = solve_worst_case(torch.cat([start, buffer, draw(4, seed=2)]), **follower(MARGIN)).value
    algorithm.after_step(buffer)
    buffer.fill_(5.0)
    assert algorithm.after_step(draw(4, seed=2))["sgpo/value"] == close(expected)


@pytest.mark.parametrize("options", [{**MARGIN, "refresh_steps": 0}, {"radius": 0.0, "refresh_steps": 1}])
def test_without_refresh_the_answer_stays(options):
    algorithm = sgpo(**options)
    algorithm.begin_stage(draw(8))
    before = algorithm.loss(batch(draw(8, seed=1)))
    for seed in range(3):
        assert algorithm.after_step(draw(8, seed=seed) - 3) == {}
    assert torch.allclose(algorithm.loss(batch(draw(8, seed=1))), before, rtol=0, atol=1e-12)


def test_next_stage_starts_from_its_own_margins():
    algorithm = sgpo(**MARGIN, refresh_steps=1, refresh_window=100)
    for seed in (0, 1):
        margins, step = draw(8, seed), draw(4, seed + 2)
        certificate = algorithm.begin_stage(margins)
        assert certificate["value"] == close(solve_worst_case(margins, **follower(MARGIN)).value)
        expected = solve_worst_case(torch.cat([margins, step]), **follower(MARGIN)).value
        assert algorithm.after_step(step)["sgpo/value"] == close(expected)


# The best case of the same ball ---------------------------------------------------------------------------------------

BEST = [{"ball": "best", "radius": 0.3}, {"ball": "best", "space": "probability", "radius": 0.05}]


def best_case(margins, options):
    return solve_best_case(margins, options["radius"], space=options.get("space", "margin"))


@pytest.mark.parametrize("group_size", [0, 7])
@pytest.mark.parametrize("options", BEST)
def test_best_case_certificate_and_value(options, group_size):
    margins = draw(25)
    algorithm = sgpo(**options, group_size=group_size)
    certificate = algorithm.begin_stage(margins)
    assert certificate["bound"] - 1e-12 <= certificate["value"] < certificate["empirical"]
    assert abs(certificate["gap"]) < 1e-12
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    groups = split(25, 7) if group_size else [torch.arange(25)]
    assert (certificate["ball"], certificate["groups"], certificate["pairs"]) == ("best", len(groups), 25)
    assert certificate["radius"] == options["radius"] and certificate["budget_used"] == pytest.approx(1.0)
    assert "edge" not in certificate
    solved = [(len(group), best_case(margins[group], options)) for group in groups]
    for name in ("value", "dual_value", "empirical", "bound", "slope", "level", "threshold", "fraction_moved"):
        expected = sum(size * getattr(best, name) for size, best in solved) / 25
        assert certificate[name] == close(expected), name
    # V = mean psi - slope * radius, group by group, hence also on average.
    mean = float(algorithm.loss(batch(margins)).mean())
    assert mean - certificate["slope"] * options["radius"] == close(certificate["value"])


@pytest.mark.parametrize("options", BEST)
def test_best_case_looks_each_pair_up_in_its_own_group(options):
    margins, later = draw(17), draw(17, seed=1).requires_grad_()
    algorithm = sgpo(**options, group_size=5)
    algorithm.begin_stage(margins)
    expected, levels = torch.empty_like(margins), set()
    for group in split(17, 5):
        best = best_case(margins[group], options)
        expected[group] = best.robust_loss(later[group]).detach()
        levels.add(best.level)
    assert len(levels) > 1
    loss = algorithm.loss(batch(later))
    assert torch.allclose(loss, expected, rtol=0, atol=1e-12)
    index = torch.tensor([11, 3, 16, 0])
    assert torch.allclose(algorithm.loss(batch(later[index], index)), expected[index], rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), later)
    assert (gradient < 0).all()
    with pytest.raises(ValueError, match="which pairs it holds"):
        algorithm.loss(replace(batch(later), index=None))


@pytest.mark.parametrize("options", BEST)
def test_best_case_is_gentler_than_dpo_where_the_policy_ranks_badly(options):
    algorithm = sgpo(**options)
    threshold = algorithm.begin_stage(draw(40))["threshold"]
    later = draw(40, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(algorithm.loss(batch(later)).sum(), later)
    low = later < threshold
    assert 3 < low.sum() < 37
    assert (gradient[low].abs() < torch.sigmoid(-later[low])).all()
    assert torch.allclose(gradient[~low], -torch.sigmoid(-later[~low]))


@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize("space", ["margin", "probability"])
def test_best_case_of_radius_0_is_dpo_to_the_last_bit(space, group_size):
    algorithm = sgpo(ball="best", space=space, radius=0.0, group_size=group_size)
    certificate = algorithm.begin_stage(draw(10))
    later = draw(10, seed=1)
    assert torch.equal(algorithm.loss(batch(later)), dpo_loss(later))
    assert certificate["value"] == close(certificate["empirical"])
    assert certificate["threshold"] is None
    json.dumps(certificate, allow_nan=False)


@pytest.mark.parametrize("group_size", [0, 5])
@pytest.mark.parametrize("options", BEST)
def test_best_case_refreshes_and_resumes(options, group_size):
    start, steps, later = draw(16), [draw(4, seed) - 0.3 for seed in (1, 2, 3)], torch.linspace(-5, 5, 16).double()
    settings = {**options, "group_size": group_size, "refresh_steps": 2, "refresh_window": 20}
    algorithm, resumed = sgpo(**settings), sgpo(**settings)
    algorithm.begin_stage(start)
    before = algorithm.loss(batch(later))
    assert algorithm.after_step(steps[0]) == {}
    assert torch.equal(algorithm.loss(batch(later)), before)
    resumed.begin_stage(draw(16, seed=9))
    resumed.load_state_dict(algorithm.state_dict())
    assert torch.equal(resumed.loss(batch(later)), before)
    metrics = algorithm.after_step(steps[1])
    best = best_case(torch.cat([start, *steps[:2]])[-20:], options)
    after = algorithm.loss(batch(later))
    assert torch.allclose(after, best.robust_loss(later), rtol=0, atol=1e-12)
    assert float((after - before).abs().max()) > 1e-6
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in metrics.values())
    for name in ("value", "empirical", "bound", "slope", "level", "threshold", "gap"):
        assert metrics[f"sgpo/{name}"] == close(getattr(best, name))
    assert resumed.after_step(steps[1]) == metrics
    assert torch.equal(resumed.loss(batch(later)), after)


def test_saturated_best_case():
    margins = draw(9)
    enough = float(torch.sigmoid(-margins).mean())
    with pytest.raises(SaturatedBallError, match="all 9 margins to probability 1, .* no gradient") as caught:
        sgpo(ball="best", space="probability", radius=enough + 1e-9).begin_stage(margins)
    for part in ("(space probability)", "Lower --sgpo.radius.", "--rounds.loss_reference previous"):
        assert part in str(caught.value)
    assert "window_pad" not in str(caught.value)
    sgpo(ball="best", space="probability", radius=enough - 1e-9).begin_stage(margins)
    sgpo(ball="best", radius=100.0).begin_stage(margins)  # the line has no end to move to


# Refusals -------------------------------------------------------------------------------------------------------------


def test_saturated_ball_in_margin_space():
    algorithm = sgpo(radius=1.0, window_pad=1.0)  # all margins 0: exactly enough to move them all
    with pytest.raises(SaturatedBallError) as caught:
        algorithm.begin_stage(torch.zeros(7))
    for part in ("--sgpo.radius 1.0", "space margin", "all 7 margins", "edge -1,", "Margins range from 0 to 0."):
        assert part in str(caught.value)
    for remedy in ("Lower --sgpo.radius", "or raise --sgpo.window_pad", "--rounds.loss_reference previous"):
        assert remedy in str(caught.value)
    sgpo(radius=0.99, window_pad=1.0).begin_stage(torch.zeros(7))


def test_saturated_ball_in_probability_space():
    margins = draw(9)
    enough = float(torch.sigmoid(margins).mean())
    with pytest.raises(SaturatedBallError, match=r"Lower --sgpo\.radius\. ") as caught:
        sgpo(space="probability", radius=enough + 1e-9).begin_stage(margins)
    assert "window_pad" not in str(caught.value)
    assert f"from {margins.min():.4g} to {margins.max():.4g}" in str(caught.value)
    sgpo(space="probability", radius=enough - 1e-9).begin_stage(margins)


def test_one_saturated_group_is_enough_and_so_is_a_refresh():
    margins = torch.cat([torch.zeros(8), torch.full((8,), 9.0)]).double()
    sgpo(radius=1.5).begin_stage(margins)
    with pytest.raises(SaturatedBallError, match="all 1 margins"):
        sgpo(radius=1.5, group_size=1).begin_stage(margins)
    algorithm = sgpo(radius=1.5, refresh_steps=1, refresh_window=4)
    algorithm.begin_stage(margins)
    with pytest.raises(SaturatedBallError, match=r"--sgpo\.radius 1\.5 .* all 4 margins"):
        algorithm.after_step(torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_margins_that_are_not_finite(bad):
    margins = draw(6)
    margins[2] = bad
    with pytest.raises(ValueError, match="sample 2"):
        sgpo(**MARGIN).begin_stage(margins)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"radius": -0.1}, ["--sgpo.radius -0.1 must be 0 or more"]),
        ({"pieces": -1}, ["--sgpo.pieces -1: give 1 or more"]),
        ({"pieces": 0, "space": "probability"}, ["--sgpo.pieces 0", "0 with --sgpo.space margin"]),
        ({"window_pad": -1.0}, ["--sgpo.window_pad -1.0 must be 0 or more"]),
        ({"group_size": -3}, ["--sgpo.group_size -3 must be 0 or more"]),
        ({"refresh_steps": -2}, ["--sgpo.refresh_steps -2 must be 0 or more"]),
        ({"leader": "transport", "space": "probability"}, ["--sgpo.leader transport needs --sgpo.space margin"]),
        ({"leader": "released"}, ["--sgpo.leader released needs --sgpo.space probability"]),
        ({"solver": "program"}, ["--sgpo.solver program", "--sgpo.leader danskin can use", "valid here: exact"]),
        ({"solver": "slsqp"}, ["--sgpo.solver slsqp", "valid here: exact"]),
        ({"leader": "transport", "solver": "slsqp"}, ["--sgpo.solver slsqp", "valid here: exact, program"]),
        ({"leader": "transport", "refresh_steps": 5}, ["--sgpo.refresh_steps 5 needs --sgpo.leader danskin"]),
        (
            {"leader": "released", "space": "probability", "refresh_steps": 5},
            ["--sgpo.refresh_steps 5 needs --sgpo.leader danskin"],
        ),
        (
            {"ball": "best", "leader": "transport"},
            ["--sgpo.leader transport is not read with --sgpo.ball best", "leave it at danskin"],
        ),
        ({"ball": "best", "solver": "program"}, ["--sgpo.solver program", "valid here: exact"]),
        ({"ball": "best", "pieces": 0}, ["--sgpo.pieces 0 is not read with --sgpo.ball best", "leave it at 6"]),
        ({"ball": "best", "window_pad": 2.0}, ["--sgpo.window_pad 2.0 is not read", "leave it at 1.0"]),
        ({"refresh_steps": 5, "refresh_window": 0}, ["--sgpo.refresh_window 0 must be 1 or more"]),
    ],
)
def test_check_names_the_one_problem(options, parts):
    (problem,) = SGPO.check(SGPOSettings(**options))
    for part in parts:
        assert part in problem


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"radius": 0.0},
        {"pieces": 0},
        {"window_pad": 0.0},
        {"space": "probability", "pieces": 1},
        {"refresh_steps": 5, "refresh_window": 1},
        {"ball": "best", "space": "probability", "group_size": 8, "refresh_steps": 5},
        {"refresh_window": 0},  # nobody reads it
        {"leader": "transport", "solver": "program"},
        {"leader": "released", "space": "probability", "solver": "slsqp"},
        {"leader": "released", "space": "probability", "solver": "program"},
    ],
)
def test_check_accepts(options):
    assert SGPO.check(SGPOSettings(**options)) == []


def test_check_lists_all_problems():
    options = SGPOSettings(radius=-1.0, pieces=-1, leader="released", refresh_steps=1, refresh_window=0)
    listed = " ".join(SGPO.check(options))
    assert len(SGPO.check(options)) == 5
    for flag in ("radius", "pieces", "leader", "refresh_steps", "refresh_window"):
        assert f"--sgpo.{flag}" in listed


def test_settings_and_check_need_no_torch():
    script = (
        "import sys\n"
        "from openrlhf_sgpo.algorithms.sgpo import SGPO, SGPOSettings\n"
        "assert SGPO.check(SGPOSettings()) == []\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
