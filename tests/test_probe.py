"""When the probe believes that an engine holds the trained policy. The engine here only repeats figures."""

import math

import pytest

from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.training.probe import TOLERANCE, WeightSyncError, check_weights_arrived

PROBES = [
    Group(prompt=(1, 2, 3), responses=((4, 5), (9,))),
    Group(prompt=(1,), responses=((6, 7, 8), (9, 9, 9, 9))),
    Group(prompt=(1, 2), responses=((4, 5, 6, 7, 8), (9,))),
]
LENGTHS = [2, 3, 5]
TOKENS = sum(LENGTHS)
PROMPT_LOG_PROB = -50.0  # must not be counted
DTYPES = sorted(TOLERANCE)


class Engine:
    """Answers with log-probabilities whose sums over the first responses are the given ones."""

    def __init__(self, sums):
        self.sums = sums

    def log_probs(self, sequences):
        assert sequences == [group.prompt + group.responses[0] for group in PROBES]
        return [
            [PROMPT_LOG_PROB] * (len(group.prompt) - 1) + [total / length] * length
            for group, total, length in zip(PROBES, self.sums, LENGTHS, strict=True)
        ]


def shifted(sums, nats_per_token):
    """Sums that differ by so many nats per token on average, all in the last probe."""
    return [*sums[:-1], sums[-1] + nats_per_token * TOKENS]


OLD = [-4.0, -9.0, -20.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_agreement_passes_with_its_figures(dtype, sign):
    tolerance = TOLERANCE[dtype]
    trained = shifted(OLD, 10 * tolerance)
    engine = Engine(shifted(trained, sign * 0.9 * tolerance))
    figures = check_weights_arrived(engine, PROBES, trained, OLD, dtype, noise=0.3 * tolerance)
    assert figures == {
        "engine_to_trainer": pytest.approx(0.9 * tolerance),
        "noise": pytest.approx(0.9 * tolerance * TOKENS / 3**0.5),
        "tokens": TOKENS / 3,
        "moved_by_training": pytest.approx(10 * tolerance),
        "followed": pytest.approx((10 + sign * 0.9) / 10),
        "noise_to_movement": pytest.approx(0.3 * tolerance * 3**0.5 / (10 * tolerance * TOKENS)),
    }


def test_differences_of_opposite_sign_do_not_cancel():
    engine = Engine([OLD[0] + 1, OLD[1] - 1, OLD[2]])
    with pytest.raises(WeightSyncError, match="differ by 0.2 nats per token"):
        check_weights_arrived(engine, PROBES, OLD, None, "bf16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_policy_has_nothing_to_be_stale_to(dtype):
    figures = check_weights_arrived(Engine(OLD), PROBES, OLD, None, dtype)
    nothing = pytest.approx(0.0, abs=1e-12)
    assert figures == {"engine_to_trainer": nothing, "noise": nothing, "tokens": TOKENS / 3}
    with pytest.raises(WeightSyncError):
        check_weights_arrived(Engine(shifted(OLD, 1.1 * TOLERANCE[dtype])), PROBES, OLD, None, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_disagreement_raises(dtype):
    trained = shifted(OLD, 0.5 * TOLERANCE[dtype])
    with pytest.raises(WeightSyncError, match="does not hold the trained policy") as caught:
        check_weights_arrived(Engine(shifted(trained, 1.1 * TOLERANCE[dtype])), PROBES, trained, OLD, dtype)
    assert f"tolerance {TOLERANCE[dtype]} for {dtype}" in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_figures_that_are_not_finite_raise(bad):
    with pytest.raises(WeightSyncError):
        check_weights_arrived(Engine([bad, *OLD[1:]]), PROBES, OLD, None, "bf16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_stale_weights_raise_even_within_the_tolerance(dtype):
    movement = 0.8 * TOLERANCE[dtype]
    trained, noise = shifted(OLD, movement), 0.01 * movement
    with pytest.raises(WeightSyncError, match="'followed': "):
        check_weights_arrived(Engine(OLD), PROBES, trained, OLD, dtype, noise)
    with pytest.raises(WeightSyncError):
        check_weights_arrived(Engine(shifted(OLD, 0.49 * movement)), PROBES, trained, OLD, dtype, noise)
    check_weights_arrived(Engine(shifted(OLD, 0.51 * movement)), PROBES, trained, OLD, dtype, noise)
    check_weights_arrived(Engine(trained), PROBES, trained, OLD, dtype, noise)


@pytest.mark.parametrize("dtype", DTYPES)
def test_movement_below_the_noise_proves_nothing_and_does_not_raise(dtype):
    movement = 0.5 * TOLERANCE[dtype]
    trained = shifted(OLD, movement)
    figures = check_weights_arrived(Engine(OLD), PROBES, trained, OLD, dtype, noise=movement * TOKENS / 5)
    assert figures["followed"] == pytest.approx(0.0, abs=1e-9)
    assert figures["noise_to_movement"] == pytest.approx(0.2 * 3**0.5)
