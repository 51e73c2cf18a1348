"""The paper's leader and that of the authors' code: atoms that are fixed for a round, group by group."""

import json
import math

import pytest
import torch
from pair_batches import BETA, batch, close, draw

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms.base import PairBatch, Stage
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.sgpo import SaturatedBallError
from openrlhf_sgpo.algorithms.sgpo_released import SGPOReleased, SGPOReleasedSettings
from openrlhf_sgpo.algorithms.sgpo_transport import SGPOTransport, SGPOTransportSettings
from openrlhf_sgpo.dro import slsqp, solve_worst_case
from openrlhf_sgpo.dro.losses import released_loss


def transport(**options):
    assert SGPOTransport.option_problems(SGPOTransportSettings(**options)) == []
    return SGPOTransport(SGPOTransportSettings(**options), BETA)


def split(count, size):
    """The groups as documented: a permutation with the stage's seed, 0 here, cut into pieces."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize("algorithm", [SGPOTransport, SGPOReleased])
def test_radius_0_is_dpo_to_the_last_bit(algorithm, dtype, group_size):
    algorithm = algorithm(algorithm.settings(radius=0.0, group_size=group_size), BETA)
    certificate = algorithm.begin_stage(Stage(draw(10, dtype=dtype)))
    margins = draw(10, seed=1, dtype=dtype)
    assert torch.equal(algorithm.loss(batch(margins)), dpo_loss(margins))
    assert certificate["value"] == close(certificate["empirical"])
    json.dumps(certificate, allow_nan=False)


@pytest.mark.parametrize(
    ("solver", "group_size"), [("exact", 0), ("exact", 10), ("exact", 50), ("program", 0), ("program", 10)]
)
def test_transport_attains_the_worst_case(solver, group_size):
    if solver == "program":
        pytest.importorskip("cvxpy")
    margins = draw(10)
    algorithm = transport(radius=0.3, pieces=0, solver=solver, group_size=group_size)
    certificate = algorithm.begin_stage(Stage(margins))
    assert (certificate["groups"], certificate["grouping_loss"]) == (1, 0.0)
    assert float(algorithm.loss(batch(margins)).mean()) == pytest.approx(certificate["value"], abs=1e-6)
    # The atoms move with the policy: every pair keeps its own, in whatever batch it comes.
    later = draw(10, seed=1).requires_grad_()
    whole = algorithm.loss(batch(later))
    (gradient,) = torch.autograd.grad(whole.sum(), later)
    assert bool((gradient < 0).all())
    index = torch.tensor([7, 2, 9])
    assert torch.allclose(algorithm.loss(batch(later[index], index)), whole[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["exact", "program"])
def test_groups_share_the_window_of_all_pairs(solver):
    """Each group is attacked within the support of all margins, and the certificate says what grouping has cost."""
    if solver == "program":
        pytest.importorskip("cvxpy")
    margins, later = draw(23), draw(23, seed=1)
    algorithm = transport(radius=0.3, pieces=0, group_size=5, solver=solver)
    certificate = algorithm.begin_stage(Stage(margins))
    whole = solve_worst_case(margins, 0.3)
    assert certificate["window"] == list(whole.window) and certificate["groups"] == 5
    expected, value = torch.empty_like(margins), 0.0
    for group in split(23, 5):  # the last one has three pairs
        worst = solve_worst_case(margins[group], 0.3, window=whole.window)
        value += len(group) * worst.value / 23
        s, q = worst.transport()
        for row, pair in enumerate(group.tolist()):
            expected[pair] = sum(
                share * dpo_loss(later[pair] - weighted / share)
                for share, weighted in zip(s[row], q[row], strict=True)
                if share > 0
            )
    assert certificate["grouping_loss"] == close(whole.value - value) and certificate["grouping_loss"] > 1e-6
    tolerance = 1e-12 if solver == "exact" else 1e-5
    assert torch.allclose(algorithm.loss(batch(later)), expected, rtol=0, atol=tolerance)
    for index in torch.randperm(23, generator=torch.Generator().manual_seed(5)).split(4):
        part = algorithm.loss(batch(later[index], index))
        assert torch.allclose(part, expected[index], rtol=0, atol=tolerance)


def test_single_precision():
    margins = draw(17, dtype=torch.float32)
    single, double = transport(radius=0.3, group_size=5), transport(radius=0.3, group_size=5)
    single.begin_stage(Stage(margins))
    double.begin_stage(Stage(margins.double()))
    loss = single.loss(batch(margins))
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), double.loss(batch(margins.double())), atol=1e-5)


def test_released_is_slsqp_and_its_clamped_logarithm():
    pytest.importorskip("scipy")
    margins = draw(6)
    algorithm = SGPOReleased(SGPOReleasedSettings(radius=0.02, pieces=2, group_size=0), BETA)
    certificate = algorithm.begin_stage(Stage(margins))
    answer = slsqp(margins, 0.02, pieces=2)
    assert float(answer.displacement.abs().max()) > 0  # the attack took place
    later = draw(6, seed=1).requires_grad_()
    loss = algorithm.loss(batch(later))
    # The leader's margins begin at 0, as those against the policy that enters the round.
    assert torch.allclose(loss, released_loss(later - margins, answer.s, answer.displacement), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), later)
    assert gradient.isfinite().all() and (gradient <= 0).all() and gradient.any()
    # The certificate is that of the exact answer, beside what SLSQP has reached and spent.
    exact = solve_worst_case(margins, 0.02, space="probability", pieces=2)
    assert certificate["value"] == close(exact.value)
    assert (certificate["solver_value"], certificate["distance"]) == (answer.value, answer.distance)


def test_why_released_is_not_offered_with_the_exact_solver():
    """At the follower's optimum the clamped logarithm has no gradient for moved pairs, and a small step from it a huge one."""
    margins = draw(10)
    worst = solve_worst_case(margins, 0.05, space="probability")
    s, q = worst.transport()
    displacement = torch.where(s > 0, q / s.clamp_min(1e-300), 0.0)
    at, risen = margins.clone().requires_grad_(), (margins + 2e-3).requires_grad_()
    moved = worst.moved == 1
    for point, check in ((at, lambda g: (g == 0).all()), (risen, lambda g: g.abs().max() > 100)):
        (gradient,) = torch.autograd.grad(released_loss(point, s, displacement).sum(), point)
        assert moved.any() and check(gradient[moved])
    assert float(released_loss(margins, s, displacement)[moved][0]) == pytest.approx(-math.log(1e-6))


def test_one_saturated_group_is_enough():
    margins = torch.cat([torch.zeros(8), torch.full((8,), 9.0)]).double()
    transport(radius=1.5, group_size=0).begin_stage(Stage(margins))
    with pytest.raises(SaturatedBallError, match=r"--sgpo_transport\.radius 1\.5 .* all 1 margins"):
        transport(radius=1.5, group_size=1).begin_stage(Stage(margins))


def test_a_batch_must_say_which_pairs_it_holds():
    algorithm = transport(radius=0.3)
    algorithm.begin_stage(Stage(draw(4)))
    pairs = batch(draw(4))
    with pytest.raises(ValueError, match="needs the index of each pair"):
        algorithm.loss(PairBatch(pairs.policy_chosen, *[pairs.policy_rejected] * 3))


@pytest.mark.parametrize(
    ("algorithm", "options", "problem"),
    [
        (SGPOTransport, {"radius": -0.1}, "--sgpo_transport.radius: -0.1 is out of range, use at least 0"),
        (SGPOTransport, {"pieces": -1}, "--sgpo_transport.pieces: -1 is out of range, use at least 0"),
        (SGPOTransport, {"window_pad": -1.0}, "--sgpo_transport.window_pad: -1.0 is out of range, use at least 0"),
        (SGPOTransport, {"group_size": -3}, "--sgpo_transport.group_size: -3 is out of range, use at least 0"),
        (SGPOReleased, {"pieces": 0}, "--sgpo_released.pieces: 0 is out of range, use at least 1"),
    ],
)
def test_check_names_the_one_problem(algorithm, options, problem):
    (message,) = flags.out_of_range({algorithm.name: algorithm.settings(**options)})
    assert message.startswith(problem)
    assert algorithm.option_problems(algorithm.settings()) == []
