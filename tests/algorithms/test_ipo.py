"""IPO: where its minimum is, on one pair, on two answers and on a game of three, and what its two normalisations mean."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_sgpo.algorithms.base import PairBatch
from openrlhf_sgpo.algorithms.ipo import IPO, IPOSettings, ipo_loss

TAUS = st.floats(0.01, 2)


def ipo(tau: float, normalization: str = "sum") -> IPO:
    return IPO(IPOSettings(normalization), tau)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_batch(count: int, lengths: tuple[torch.Tensor, torch.Tensor] | None = None) -> PairBatch:
    chosen, rejected = lengths or (None, None)
    return PairBatch(*-draw(4, count).exp(), chosen_length=chosen, rejected_length=rejected)


def minimised(expected_loss, start: torch.Tensor) -> torch.Tensor:
    """The point at which a smooth function of the given shape is smallest."""
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [point], lr=1, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = expected_loss(point)
        value.backward()
        return value

    optimiser.step(closure)
    return point.detach()


@given(tau=TAUS, offset=st.floats(-50, 50))
def test_the_minimum_is_zero_at_one_over_two_tau(tau, offset):
    target = torch.tensor(1 / (2 * tau), dtype=torch.float64, requires_grad=True)
    loss = ipo_loss(target, tau)
    (gradient,) = torch.autograd.grad(loss, target)
    assert loss == 0 and gradient == 0
    elsewhere = ipo_loss(target.detach() + offset, tau)
    assert elsewhere.item() == pytest.approx(offset**2, abs=1e-9)


@pytest.mark.parametrize("tau", [0.1, 0.7])
@pytest.mark.parametrize("wins", [0.5, 0.7, 1.0])
def test_two_answers(wins, tau):
    """Of two answers the first wins with probability q: the log-ratio settles at (q - 1/2) / tau, where DPO's would be
    logit(q) / beta, infinite for q = 1."""
    log_ratio = minimised(
        lambda h: (wins * ipo_loss(h, tau) + (1 - wins) * ipo_loss(-h, tau)).sum(), torch.zeros(1, dtype=torch.float64)
    )
    assert log_ratio.item() == pytest.approx((wins - 0.5) / tau, abs=1e-6)


@pytest.mark.parametrize("reference", [(1 / 3, 1 / 3, 1 / 3), (0.2, 0.5, 0.3)])
def test_the_population_optimum_depends_on_who_sampled_the_pairs(reference):
    """Offline IPO over softmax policies, on a cycle of three answers in which each beats the next with p = 5/9. Pairs come
    from mu, so that the optimum is ref * exp(E_{y' ~ mu} p(y > y') / tau), normalised (arXiv 2310.12036, with mu fixed)."""
    tau, sampler = 0.1, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    wins = torch.full((3, 3), 0.5, dtype=torch.float64)
    for first in range(3):
        wins[first, (first + 1) % 3], wins[(first + 1) % 3, first] = 5 / 9, 4 / 9
    base = torch.tensor(reference, dtype=torch.float64).log()
    first, second = (index.flatten() for index in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
    weight = (sampler[first] * sampler[second] * wins[first, second]).flatten()
    algorithm = ipo(tau)

    def expected_loss(logits: torch.Tensor) -> torch.Tensor:
        policy = logits.log_softmax(0)
        # Every ordered pair (first, second), chosen as it stands with probability p(first > second).
        losses = algorithm.loss(PairBatch(policy[first], policy[second], base[first], base[second]))
        return 2 * (weight * losses).sum()

    policy = minimised(expected_loss, torch.zeros(3, dtype=torch.float64)).softmax(0)
    optimum = (base + (wins @ sampler) / tau).softmax(0)
    assert torch.allclose(policy, optimum, rtol=0, atol=1e-6)
    if reference[0] == reference[1]:
        # The cycle's Nash equilibrium is uniform, and offline IPO is not there.
        assert float((policy - 1 / 3).abs().max()) > 0.05


def test_sum_is_the_difference_of_log_ratios_without_beta():
    batch = random_batch(6)
    differences = (batch.policy_chosen - batch.reference_chosen) - (batch.policy_rejected - batch.reference_rejected)
    assert torch.allclose(ipo(0.3).loss(batch), (differences - 1 / 0.6) ** 2, rtol=0, atol=1e-10)


def test_mean_divides_each_side_by_its_own_length():
    chosen, rejected = torch.tensor([2.0, 7, 1, 30]).double(), torch.tensor([5.0, 7, 4, 1]).double()
    batch = random_batch(4, (chosen, rejected))
    # As if a response were sampled token by token, each with the average log-ratio: h is then a difference per token.
    per_token_chosen = torch.stack([batch.policy_chosen / chosen, batch.reference_chosen / chosen])
    per_token_rejected = torch.stack([batch.policy_rejected / rejected, batch.reference_rejected / rejected])
    tokens = PairBatch(per_token_chosen[0], per_token_rejected[0], per_token_chosen[1], per_token_rejected[1])
    assert torch.allclose(ipo(0.3, "mean").loss(batch), ipo(0.3).loss(tokens), rtol=0, atol=1e-10)
    assert not torch.allclose(ipo(0.3, "mean").loss(batch), ipo(0.3).loss(batch), rtol=0, atol=1e-2)


def test_responses_of_one_token_make_the_two_equal():
    lengths = torch.ones(5, dtype=torch.float64)
    batch = random_batch(5, (lengths, lengths))
    assert torch.allclose(ipo(0.1, "mean").loss(batch), ipo(0.1).loss(batch), rtol=0, atol=1e-10)


@given(length=st.integers(1, 50), tau=TAUS)
def test_tau_does_not_compare_across_normalisations(length, tau):
    """If all responses have n tokens, mean at tau has the minimum of sum at tau / n."""
    lengths = torch.tensor([float(length)]).double()
    minimum = length / (2 * tau)  # in nats of the whole response
    zero = torch.zeros(1, dtype=torch.float64)
    batch = PairBatch(zero + minimum, zero, zero, zero, chosen_length=lengths, rejected_length=lengths)
    assert ipo(tau, "mean").loss(batch).item() == pytest.approx(0, abs=1e-12)
    assert ipo(tau / length).loss(batch).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("missing", ["chosen", "rejected", "both"])
def test_mean_without_lengths(missing):
    ones = torch.ones(3, dtype=torch.float64)
    lengths = (None if missing in ("chosen", "both") else ones, None if missing in ("rejected", "both") else ones)
    with pytest.raises(ValueError, match=r"--ipo\.normalization mean needs the lengths"):
        ipo(0.1, "mean").loss(random_batch(3, lengths))


@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_gradient(normalization):
    lengths = torch.tensor([3.0, 1, 8]).double()
    algorithm = ipo(0.2, normalization)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        pairs = PairBatch(chosen, rejected, *draw(2, 3, seed=1), chosen_length=lengths, rejected_length=lengths + 2)
        return algorithm.loss(pairs)

    points = draw(2, 3, seed=2).requires_grad_()
    assert loss(*points).shape == (3,)
    assert torch.autograd.gradcheck(loss, tuple(points.unbind()))


def test_every_choice_is_valid():
    assert IPO.option_problems(IPOSettings()) == IPO.option_problems(IPOSettings("mean")) == []
    assert not IPO.needs.rounds
