"""What the results say: paired differences over seeds, at matched divergence, with Student's t and Holm's correction."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, linear_regression, stdev
from typing import Any

from openrlhf_sgpo.intervals import holm

ACCURACY, REWARD = "gold accuracy", "gold reward"
OUTCOMES = {ACCURACY: 4, REWARD: 3}  # digits
Study = dict[str, Any]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Effect:
    """A contrast of an outcome at a flip rate. mean: of the differences over seeds, at matched divergence unless the contrast
    is raw; error: standard error; half: of the 95% interval; p_value: two-sided, after Holm; unmatched: without matching."""

    family: str
    name: str
    flip_rate: float
    outcome: str
    mean: float
    error: float
    half: float
    p_value: float
    unmatched: float


def seeds_at(rows: Rows, rate: float) -> list[int]:
    return sorted({row["seed"] for row in rows if row["flip_rate"] == rate})


def differences(
    study: Study, rows: Rows, contrast: dict[str, Any], rate: float, outcome: str
) -> tuple[list[float], list[float]]:
    r"""Per seed, the outcome y of ``arm`` minus that of ``minus``, and the same less what their divergences k explain:

        (y_arm - y_minus) - b (k_arm - k_minus),

    b being the slope of y over k among the controls of that seed, runs of the base that differ only in the learning rate. Each
    seed has its own slope, so the error of the slopes is part of the spread over seeds.
    """
    runs = {(row["arm"], row["seed"]): row for row in rows if row["flip_rate"] == rate}
    raw, matched = [], []
    for seed in seeds_at(rows, rate):
        arm, minus = runs[contrast["arm"], seed], runs[contrast["minus"], seed]
        controls = [runs[name, seed] for name in contrast.get("controls", study["controls"])]
        slope = linear_regression([run["kl"] for run in controls], [run[outcome] for run in controls]).slope
        raw.append(arm[outcome] - minus[outcome])
        matched.append(raw[-1] - slope * (arm["kl"] - minus["kl"]))
    return raw, matched


def contrasts(study: Study, rows: Rows) -> list[Effect]:
    """The predeclared contrasts at all flip rates. Each is a paired t-test with a degree of freedom less than there are seeds;
    Holm's correction is over contrasts and outcomes of a family at one flip rate. A rate with fewer than two seeds has none."""
    from scipy.special import stdtr, stdtrit

    effects = []
    for rate, (family, members) in product(study["flip_rates"], study["contrasts"].items()):
        freedom, tests = len(seeds_at(rows, rate)) - 1, []
        if freedom < 1:
            continue
        for contrast, outcome in product(members, OUTCOMES):
            raw, matched = differences(study, rows, contrast, rate, outcome)
            sample = raw if contrast.get("raw") else matched
            mean, error = fmean(sample), stdev(sample) / len(sample) ** 0.5
            p_value = 2 * float(stdtr(freedom, -abs(mean) / error)) if error else float(mean == 0)
            tests.append((contrast["name"], outcome, mean, error, p_value, fmean(raw)))
        for (name, outcome, mean, error, _, raw_mean), p_value in zip(
            tests, holm([test[4] for test in tests]), strict=True
        ):
            half = float(stdtrit(freedom, 0.975)) * error
            effects.append(Effect(family, name, rate, outcome, mean, error, half, p_value, raw_mean))
    return effects


def arm_means(study: Study, rows: Rows, rate: float, key: str) -> dict[str, float]:
    return {
        arm: fmean(row[key] for row in rows if (row["arm"], row["flip_rate"]) == (arm, rate)) for arm in study["arms"]
    }


def table(study: Study, rows: Rows, effects: list[Effect]) -> str:
    """Markdown: the contrasts, then the arms' means, at the flip rates that have contrasts."""
    rates = list(dict.fromkeys(effect.flip_rate for effect in effects))
    heads = [f"{outcome}, {rate:.0%} flipped" for rate in rates for outcome in OUTCOMES]
    lines = ["| contrast | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in dict.fromkeys(effect.name for effect in effects):
        lines.append(f"| {name} | " + " | ".join(_cell(effect) for effect in effects if effect.name == name) + " |")
    lines += [
        "",
        "Mean ± standard error over seeds, at matched divergence where a second number follows, which is the mean without "
        "matching; * is p < .05 by Student's t, after Holm.",
    ]
    for rate in rates:
        seeds, base = len(seeds_at(rows, rate)), {"arm": study["base"], "flip_rate": rate}
        agreement = fmean(row["labels"] for row in rows if row.items() >= base.items())
        lines[-1] += (
            f" {rate:.0%} flipped: {seeds} seeds, {seeds - 1} degrees of freedom; self-made labels of the base agree with gold "
            f"on {agreement:.3f}."
        )
    lines.append("")
    digits = OUTCOMES | {"kl": 2}
    columns = [(key, rate) for rate in rates for key in digits]
    lines += ["| arm | " + " | ".join(f"{key}, {rate:.0%} flipped" for key, rate in columns) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    means = [arm_means(study, rows, rate, key) for key, rate in columns]
    for arm, settings in study["arms"].items():
        cells = [f"{mean[arm]:.{digits[key]}f}" for mean, (key, _) in zip(means, columns, strict=True)]
        lines.append(f"| {settings['title']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(effect: Effect) -> str:
    digits = OUTCOMES[effect.outcome]
    star = "*" if effect.p_value < 0.05 else ""
    raw = "" if effect.unmatched == effect.mean else f" ({effect.unmatched:+.{digits}f})"
    return f"{effect.mean:+.{digits}f} ± {effect.error:.{digits}f}{star}{raw}"


def draw(study: Study, rows: Rows, effects: list[Effect], folder: Path) -> None:
    """effects.svg, the contrasts with their 95% intervals; divergence.svg, each arm's outcomes over its divergence."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "robustness study", "svg.fonttype": "none", "font.size": 8}
    from matplotlib import pyplot

    names, rates = (list(dict.fromkeys(getattr(effect, key) for effect in effects)) for key in ("name", "flip_rate"))
    drawing, panels = pyplot.subplots(1, 2, figsize=(9.5, 1 + 0.3 * len(names)), sharey=True)
    for panel, outcome in zip(panels, OUTCOMES, strict=True):
        for number, rate in enumerate(rates):
            chosen = [effect for effect in effects if (effect.flip_rate, effect.outcome) == (rate, outcome)]
            panel.errorbar(
                [effect.mean for effect in chosen],
                [names.index(effect.name) + 0.3 * number for effect in chosen],
                xerr=[effect.half for effect in chosen],
                fmt="o",
                color=["#cc6677", "#4477aa"][number % 2],
                markersize=4,
                label=f"{rate:.0%} of the seed's labels flipped",
            )
        panel.axvline(0, color="#bbbbbb", linewidth=1, zorder=0)
        panel.set_xlabel(f"difference in {outcome}")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="lower right", ncols=2, frameon=False)
    drawing.tight_layout(rect=(0, 0.04, 1, 1))
    drawing.savefig(folder / "effects.svg", metadata={"Date": None})

    drawing, grid = pyplot.subplots(2, len(rates), figsize=(9.5, 8.5), squeeze=False)
    markers = "osD^v<>pPX*hH8"
    for row, outcome in zip(grid, OUTCOMES, strict=True):
        for panel, rate in zip(row, rates, strict=True):
            divergence, value = arm_means(study, rows, rate, "kl"), arm_means(study, rows, rate, outcome)
            line = sorted((divergence[arm], value[arm]) for arm in study["controls"])
            panel.plot(*zip(*line, strict=True), "--", color="#bbbbbb", zorder=0)
            for number, (arm, settings) in enumerate(study["arms"].items()):
                marker, colour = markers[number % len(markers)], f"C{number % 10}"
                panel.plot(divergence[arm], value[arm], marker, color=colour, markersize=5, label=settings["title"])
            panel.set_title(f"{rate:.0%} of the seed's labels flipped")
            panel.set_xlabel("divergence from the initial policy, nats")
            panel.set_ylabel(outcome)
    drawing.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False, fontsize=7)
    drawing.tight_layout(rect=(0, 0.16, 1, 1))
    drawing.savefig(folder / "divergence.svg", metadata={"Date": None})
    pyplot.close("all")
