"""SPA: its loss and limits, who is in doubt, when, against which threshold, and what a checkpoint must restore."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_sgpo import flags
from openrlhf_sgpo.algorithms.base import PairBatch, Stage
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.spa import SPA, SPASettings, released_threshold, share_threshold, spa_loss

BETA = 0.5  # a power of two, so that margins come back from a batch exactly
MARGINS = st.lists(st.floats(-60, 60), min_size=1, max_size=8).map(lambda values: torch.tensor(values).double())
RELEASED = {"threshold": "released", "extrapolation": [0.0]}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spa(stage: Stage = Stage(steps=100), beta: float = BETA, **options) -> SPA:  # noqa: B008 - frozen
    """At the beginning of a stage, without warm-up and extrapolation unless they are asked for."""
    chosen = SPASettings(**{"warmup_share": 0.0, "extrapolation": [0.0], **options})
    assert SPA.option_problems(chosen) == []
    algorithm = SPA(chosen, beta)
    assert algorithm.begin_stage(stage) == {}
    return algorithm


def batch(margins: torch.Tensor, detection: torch.Tensor | None = None, beta: float = BETA) -> PairBatch:
    """Pairs with these margins, differentiable in them, and these detection margins."""
    none = torch.zeros_like(margins)
    if detection is None:
        return PairBatch(margins / beta, none, none, none)
    return PairBatch(
        margins / beta, none, none, none, extrapolated_chosen=detection / beta, extrapolated_rejected=none.detach()
    )


@given(margins=MARGINS, smoothing=st.floats(0, 0.49), data=st.data())
def test_only_pairs_in_doubt_are_smoothed(margins, smoothing, data):
    size = len(margins)
    noisy = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    loss = spa_loss(margins, noisy, smoothing)
    assert torch.equal(loss[~noisy], dpo_loss(margins)[~noisy])
    # log sigmoid(m) - log sigmoid(-m) = m, so that smoothing adds alpha * m.
    assert torch.allclose(loss[noisy], (dpo_loss(margins) + smoothing * margins)[noisy], rtol=0, atol=1e-12)
    assert torch.equal(spa_loss(margins, torch.ones_like(noisy), 0.0), dpo_loss(margins))


def test_gradient():
    margins = torch.linspace(-4, 4, 8, dtype=torch.float64, requires_grad=True)
    noisy = torch.arange(8) % 2 == 0
    assert torch.autograd.gradcheck(lambda values: spa_loss(values, noisy, 0.1), margins)


def test_the_confidence_has_no_gradient():
    algorithm = spa(noisy_share=1.0, smoothing=0.2, extrapolation=[0.5])
    values = draw(6, 4).requires_grad_()
    pairs = PairBatch(*values[:4], extrapolated_chosen=values[4], extrapolated_rejected=values[5])
    assert not algorithm.watched(pairs).requires_grad and not spa().watched(pairs).requires_grad
    loss = algorithm.loss(pairs)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert not gradient[4:].any()
    margins = pairs.margins(BETA).detach()
    assert torch.allclose(gradient[0], BETA * (0.2 - torch.sigmoid(-margins)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_all_in_doubt_is_stationary_at_a_finite_log_ratio(beta):
    """K = 100 %, alpha = .1: sigmoid(beta h) = .9, hence h = ln(9) / beta."""
    algorithm = spa(noisy_share=1.0, smoothing=0.1, beta=beta)
    zero = torch.zeros(1, dtype=torch.float64)
    for offset, sign in ((0.0, 0), (-1e-3, -1), (1e-3, 1)):
        log_ratio = (zero + math.log(9) / beta + offset).requires_grad_()
        loss = algorithm.loss(PairBatch(log_ratio, zero, zero, zero))
        (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
        assert abs(gradient.item()) < 1e-12 if sign == 0 else gradient.item() * sign > 0


@pytest.mark.parametrize("options", [{"smoothing": 0.0}, {"noisy_share": 0.0}, {"warmup_share": 1.0}])
@pytest.mark.parametrize("extrapolation", [0.0, 0.5])
def test_without_refinement_it_is_dpo_to_the_last_bit(options, extrapolation):
    algorithm = spa(**options, extrapolation=[extrapolation])
    assert algorithm.extrapolation == 0  # nobody would read it, and it costs two forward passes
    for step in range(60):
        margins = draw(8, seed=step)
        assert torch.equal(algorithm.loss(batch(margins)), dpo_loss(margins))
        algorithm.after_step(algorithm.watched(batch(margins)))


def test_a_value_per_round_and_the_last_one_for_later_rounds():
    algorithm = SPA(SPASettings(), BETA)
    assert algorithm.extrapolation == 0
    extrapolations = []
    for number in range(6):
        algorithm.begin_stage(Stage(torch.zeros(4), number=number))
        extrapolations.append(algorithm.extrapolation)
    assert extrapolations == [0.5, 0.5, 0.25, 0.125, 0.125, 0.125]


def test_detection_margins_are_relative_to_the_reference():
    algorithm = spa(extrapolation=[0.5])
    chosen, rejected, reference_chosen, reference_rejected, extrapolated_chosen, extrapolated_rejected = draw(6, 5)
    pairs = PairBatch(
        *(chosen, rejected, reference_chosen, reference_rejected),
        extrapolated_chosen=extrapolated_chosen,
        extrapolated_rejected=extrapolated_rejected,
    )
    expected = (extrapolated_chosen - reference_chosen) - (extrapolated_rejected - reference_rejected)
    assert torch.allclose(algorithm.watched(pairs), BETA * expected, rtol=0, atol=1e-12)


def test_extrapolated_logits_without_extrapolation_are_the_policys():
    """(1 + lambda) z_theta - lambda z_ref at lambda = 0 is z_theta: the same pairs are in doubt, with or without the pass."""
    plain, extrapolating = spa(), spa(extrapolation=[0.5])
    for step in range(40):
        margins = draw(4, seed=step)
        assert torch.equal(plain.loss(batch(margins)), extrapolating.loss(batch(margins, detection=margins)))
        plain.after_step(plain.watched(batch(margins)))
        extrapolating.after_step(extrapolating.watched(batch(margins, detection=margins)))


def test_two_answers_under_extrapolated_logits():
    """Over two answers with log-odds a (policy) and b (reference) the plain confidence is sigmoid(beta (a - b)); the
    extrapolated log-odds are a + lambda (a - b), hence the confidence sigmoid(beta (1 + lambda) (a - b)): sharper."""
    policy, reference = draw(2, 20)
    algorithm = spa(extrapolation=[0.25])

    def answers(log_odds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.stack([log_odds, torch.zeros_like(log_odds)])
        return tuple(logits.log_softmax(0))

    pairs = PairBatch(
        *answers(policy), *answers(reference), None, None, None, *answers(1.25 * policy - 0.25 * reference)
    )
    assert torch.allclose(algorithm.watched(pairs), 1.25 * pairs.margins(BETA), rtol=0, atol=1e-12)


def test_extrapolation_needs_its_log_probabilities():
    algorithm = spa(extrapolation=[0.5])
    with pytest.raises(
        ValueError, match=r"--spa\.extrapolation 0\.5 needs log-probabilities under extrapolated logits"
    ):
        algorithm.loss(batch(torch.zeros(2)))


@given(
    count=st.integers(1, 60),
    share=st.floats(0, 1),
    seed=st.integers(0, 10),
)
def test_the_threshold_is_a_quantile(count, share, seed):
    recent = draw(count, seed=seed)
    threshold = share_threshold(recent, share)
    below = int((recent < threshold).sum())
    # k of the n margins are below it if share * (n + 1) lies in (k, k + 1].
    assert below == min(max(math.ceil(share * (count + 1)) - 1, 0), count)
    assert threshold == share_threshold(recent.flip(0), share)
    assert share_threshold(3 * recent - 1, share) == pytest.approx(3 * threshold - 1, abs=1e-9)


@pytest.mark.parametrize(("count", "position"), [(9, 1), (19, 2), (49, 5), (9, 9), (19, 7)])
def test_another_margin_falls_below_it_with_the_share_asked_for(count, position):
    """On uniform margins the chance to fall below a threshold is the threshold itself; its mean must be K."""
    generator = torch.Generator().manual_seed(0)
    share = position / (count + 1)
    draws = torch.rand(4000, count, dtype=torch.float64, generator=generator)
    mean = sum(share_threshold(row, share) for row in draws) / len(draws)
    deviation = math.sqrt(share * (1 - share) / (count + 2))  # of the position-th smallest of count: a beta law
    assert abs(mean - share) < 4 * deviation / math.sqrt(len(draws))


def test_the_ends():
    margins = draw(50)
    for share, infinity in ((0.0, -math.inf), (1 / 52, -math.inf), (51 / 52, math.inf), (1.0, math.inf)):
        assert share_threshold(margins, share) == infinity
    assert share_threshold(margins[:0], 0.1) == share_threshold(margins[:8], 0.1) == -math.inf
    assert share_threshold(margins[:9], 0.1) == margins[:9].min().item()
    assert share_threshold(margins[:0], 1.0) == math.inf


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_flagged_fraction_of_random_streams(share):
    """Pairs of one law, step by step: the share of them in doubt is K, up to what a window of 50 leaves to chance."""
    algorithm = spa(noisy_share=share)
    flagged = []
    for margins in draw(1500, 8, seed=3):
        flagged.append(algorithm.after_step(algorithm.watched(batch(margins)))["spa/noisy_share"])
    # Neighbouring steps share most of their window, of which 240 disjoint ones fit into the stream.
    deviation = math.sqrt(share * (1 - share)) * math.sqrt(1 / 12000 + 1 / 50 / 240)
    assert abs(sum(flagged[7:]) / len(flagged[7:]) - share) < 4 * deviation


def test_the_loss_smooths_whom_the_latest_margins_leave_below():
    """Against a direct reading: sort the last 50, take position K * 51, compare strictly."""
    algorithm = spa(window=50, noisy_share=0.1, smoothing=0.3)
    seen: list[float] = []
    smoothed = 0
    for step in range(30):
        margins = draw(8, seed=step) + 0.05 * step
        ordered = sorted(seen[-50:])
        place = 0.1 * (len(ordered) + 1)
        if place >= 1:
            left = math.floor(place)
            threshold = ordered[left - 1] + (place - left) * (ordered[left] - ordered[left - 1])
        else:
            threshold = -math.inf
        noisy = margins < threshold
        pairs = batch(margins)
        assert torch.allclose(algorithm.loss(pairs), dpo_loss(margins) + 0.3 * (noisy * margins), rtol=0, atol=1e-12)
        metrics = algorithm.after_step(algorithm.watched(pairs))
        assert metrics["spa/noisy_share"] == noisy.double().mean().item()
        seen += margins.tolist()
        smoothed += int(noisy.sum())
        json.dumps(metrics, allow_nan=False)
        assert ("spa/threshold" in metrics) == (len(seen) >= 9)
    assert smoothed > 5


def test_equal_margins_are_not_in_doubt():
    """When a round begins against its own policy all margins are 0, and none is less confident than another."""
    algorithm = spa(noisy_share=0.5)
    for _ in range(10):
        assert algorithm.after_step(torch.zeros(8))["spa/noisy_share"] == 0


@pytest.mark.parametrize(("share", "steps"), [(0.2, 10), (0.7, 10), (0.28, 25), (0.25, 10), (0.2, 1)])
def test_no_refinement_in_the_first_steps(share, steps):
    algorithm = spa(Stage(steps=steps), warmup_share=share, noisy_share=1.0, smoothing=0.2)
    margins = draw(4)
    smoothed = []
    for _ in range(steps):
        smoothed.append(not torch.equal(algorithm.loss(batch(margins)), dpo_loss(margins)))
        assert algorithm.after_step(algorithm.watched(batch(margins)))["spa/noisy_share"] == float(smoothed[-1])
    first = {(0.2, 10): 2, (0.7, 10): 7, (0.28, 25): 7, (0.25, 10): 3, (0.2, 1): 1}[share, steps]
    assert smoothed == [False] * first + [True] * (steps - first)


def test_margins_of_the_warm_up_count():
    algorithm = spa(Stage(steps=10), warmup_share=0.2, noisy_share=0.5)
    for _ in range(2):
        algorithm.after_step(torch.arange(10.0))
    assert algorithm.after_step(torch.tensor([4.0, 5.0]))["spa/noisy_share"] == 0.5


def test_released_threshold_read_directly():
    algorithm = spa(**RELEASED)
    seen: list[float] = []
    threshold = 0.0
    for step in range(40):
        margins = draw(4, seed=step) + 1.0
        noisy = margins <= threshold
        loss = algorithm.loss(batch(margins))
        assert torch.allclose(loss, dpo_loss(margins) + 0.1 * (noisy * margins), rtol=0, atol=1e-12)
        metrics = algorithm.after_step(algorithm.watched(batch(margins)))
        assert metrics["spa/noisy_share"] == noisy.double().mean().item()
        seen += margins.tolist()
        if len(seen) >= 50:
            threshold = sum(sorted(seen[-50:])[5:7]) / 2
        assert metrics["spa/threshold"] == pytest.approx(threshold, abs=1e-15)
        assert released_threshold(torch.tensor(seen, dtype=torch.float64)) == pytest.approx(threshold, abs=1e-15)


def test_released_compares_with_equality():
    algorithm = spa(**RELEASED)
    assert algorithm.after_step(torch.tensor([0.0, 0.1, -0.1]))["spa/noisy_share"] == pytest.approx(2 / 3)
    algorithm.after_step(torch.full((50,), 7.0))
    assert algorithm.after_step(torch.tensor([7.0, 7.5]))["spa/noisy_share"] == 0.5


def test_a_stage_begins_anew():
    stage = Stage(number=2, steps=20)
    algorithm, fresh = (spa(first, smoothing=0.2, warmup_share=0.5) for first in (Stage(steps=30), stage))
    for step in range(20):
        algorithm.after_step(draw(8, seed=step) + 5)
    algorithm.begin_stage(stage)
    for step in range(20):
        margins = draw(8, seed=100 + step)
        assert torch.equal(algorithm.loss(batch(margins)), fresh.loss(batch(margins)))
        assert algorithm.after_step(margins) == fresh.after_step(margins)


@pytest.mark.parametrize("options", [{}, {"window": 20, "noisy_share": 0.3}, RELEASED, {"warmup_share": 0.6}])
@pytest.mark.parametrize("interrupted", [0, 3, 11, 15])
def test_a_checkpoint_restores_all_later_losses(options, interrupted, tmp_path):
    stage = Stage(number=1, steps=20)
    whole = spa(stage, smoothing=0.3, **options)
    resumed = None
    for step in range(20):
        if step == interrupted:
            torch.save(whole.state_dict(), tmp_path / "state.pt")
            resumed = spa(stage, smoothing=0.3, **options)
            resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
        margins = draw(8, seed=step).float()
        loss = whole.loss(batch(margins))
        metrics = whole.after_step(margins)
        if resumed is not None:
            assert torch.equal(resumed.loss(batch(margins)), loss)
            assert resumed.after_step(margins) == metrics
    # A checkpoint holds the window, not the storage of all steps that it was cut from.
    recent = whole.state_dict()["recent"]
    assert len(recent) == min(160, whole.options.window) and recent.untyped_storage().nbytes() == 4 * len(recent)


def self_annotated_rounds(seed_log_ratio: float, smoothing: float, rounds: int, steps: int) -> list[float]:
    """Two answers, equally likely at first. A seed moved the first one's log-ratio; then each round labels the answer that
    the policy's implicit reward prefers as chosen and minimises the loss from there, relative to the policy that entered the
    round. Returns the policy's log-ratio after each round; the truth about the answers plays no part."""
    policy = torch.tensor([seed_log_ratio], dtype=torch.float64)
    history = []
    for number in range(1, rounds + 1):
        algorithm = spa(Stage(number=number, steps=steps), beta=1.0, noisy_share=1.0, smoothing=smoothing)
        reference, prefers_first = policy.clone(), bool(policy > 0)
        for _ in range(steps):
            policy.requires_grad_()
            sign = 1 if prefers_first else -1
            chosen, rejected = (
                torch.nn.functional.logsigmoid(sign * policy),
                torch.nn.functional.logsigmoid(-sign * policy),
            )
            reference_chosen = torch.nn.functional.logsigmoid(sign * reference)
            reference_rejected = torch.nn.functional.logsigmoid(-sign * reference)
            pairs = PairBatch(chosen, rejected, reference_chosen, reference_rejected)
            (gradient,) = torch.autograd.grad(algorithm.loss(pairs).sum(), policy)
            algorithm.after_step(algorithm.watched(pairs))
            policy = (policy - 2.0 * gradient).detach()
        history.append(policy.item())
    return history


@pytest.mark.slow
@pytest.mark.parametrize("favourite", [1, -1])
def test_certain_labels_confirm_whatever_the_seed_believed(favourite):
    """Without smoothing the seed model's slight preference, right or wrong, becomes certainty, the more so the longer the
    round; with smoothing of every label a round ends where the log-ratio has moved by logit(1 - alpha), however long it is."""
    short, long = (self_annotated_rounds(0.01 * favourite, 0.0, 3, steps) for steps in (200, 2000))
    assert torch.sigmoid(torch.tensor(favourite * short[-1])) > 0.9999
    assert all(later * favourite > earlier * favourite + 2 for earlier, later in zip(short, long, strict=True))
    refined = self_annotated_rounds(0.01 * favourite, 0.1, 3, 400)
    expected = [favourite * (0.01 + number * math.log(9)) for number in (1, 2, 3)]
    assert refined == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"smoothing": -0.1}, ["--spa.smoothing: -0.1 is out of range"]),
        ({"smoothing": 0.5}, ["--spa.smoothing: 0.5 is out of range"]),
        ({"noisy_share": -0.1}, ["--spa.noisy_share: -0.1 is out of range, use 0 to 1"]),
        ({"noisy_share": 1.1}, ["--spa.noisy_share: 1.1 is out of range"]),
        ({"warmup_share": 1.5}, ["--spa.warmup_share: 1.5 is out of range"]),
        ({"warmup_share": -0.5}, ["--spa.warmup_share: -0.5 is out of range"]),
        ({"extrapolation": []}, ["--spa.extrapolation is empty: give one or more"]),
        ({"extrapolation": [0.5, -0.25]}, ["--spa.extrapolation: 0.5 -0.25 is out of range, use at least 0 each"]),
        ({"window": 0}, ["--spa.window: 0 is out of range, use at least 1"]),
        ({"window": 8}, ["--spa.window 8 cannot resolve --spa.noisy_share 0.1, use at least 9"]),
        ({"window": 8, "noisy_share": 0.9}, ["--spa.window 8 cannot resolve --spa.noisy_share 0.9, use at least 9"]),
        ({"threshold": "released", "window": 40}, ["--spa.threshold released needs --spa.window 50", "fixes both"]),
        ({"threshold": "released", "noisy_share": 0.2}, ["--spa.threshold released needs", "--spa.noisy_share 0.1"]),
    ],
)
def test_check_names_the_one_problem(options, parts):
    (problem,) = flags.out_of_range({"spa": SPASettings(**options)}) or SPA.option_problems(SPASettings(**options))
    for part in parts:
        assert part in problem


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smoothing": 0.0},
        {"noisy_share": 0.0, "window": 1},
        {"noisy_share": 1.0, "window": 1},
        {"noisy_share": 0.5, "window": 1},
        {"warmup_share": 1.0},
        {"window": 9},
        {"extrapolation": [0.0]},
        {"threshold": "released"},
    ],
)
def test_check_accepts(options):
    assert SPA.option_problems(SPASettings(**options)) == []


@given(share=st.floats(0.01, 0.99), window=st.integers(1, 120))
def test_a_window_that_is_accepted_tells_the_share_apart(share, window):
    """Where check() is content, a full window gives a finite threshold: neither nobody nor everybody."""
    accepted = SPA.option_problems(SPASettings(noisy_share=share, window=window)) == []
    finite = math.isfinite(share_threshold(draw(window), share))
    near_the_limit = abs(min(share, 1 - share) * (window + 1) - 1) < 1e-4
    assert accepted == finite or near_the_limit


def test_the_round_is_relative_to_the_policy_that_enters_it():
    assert SPA.defaults == {"rounds.loss_reference": "previous"}
    assert SPA.needs.rounds and SPA.needs.samples_per_prompt == 2


def test_settings_and_check_need_no_torch():
    script = (
        "import sys\n"
        "from openrlhf_sgpo import algorithms\n"
        "for name in ('ipo', 'cdpo', 'rdpo', 'spa'):\n"
        "    algorithm = algorithms.get(name)\n"
        "    assert algorithm.option_problems(algorithm.settings()) == []\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
