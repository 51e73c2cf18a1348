"""The page of a run, from the files listed in docs/runs.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from openrlhf_sgpo.integrity import unsealed, unsigned
from openrlhf_sgpo.intervals import half_of
from openrlhf_sgpo.ledger import read_ledger
from openrlhf_sgpo.report.figures import Series, bars, plot, plots
from openrlhf_sgpo.report.follower import FIGURES as CERTIFICATE
from openrlhf_sgpo.report.follower import follower_plot
from openrlhf_sgpo.report.markup import MISSING, details, html_table, number, tag, tiny, with_minus_sign, words
from openrlhf_sgpo.report.moments import Moment, read_moments, verdict
from openrlhf_sgpo.report.page import page
from openrlhf_sgpo.report.robustness import robustness
from openrlhf_sgpo.report.run_curves import held_out_plot, round_plots, step_plots
from openrlhf_sgpo.report.running import Running, running_banner
from openrlhf_sgpo.report.samples import SHOWN, Written, how_many, side_by_side
from openrlhf_sgpo.run_folder import METRICS, STORED, RunFolder, read_configuration, read_growing, read_json
from openrlhf_sgpo.table import FIGURES, STAGES, measured_differently, plus_minus, seconds_by_stage

PLAYS_SHOWN = 4


def run_page(folder: Path, moments: Sequence[Moment] | None = None, running: Running | None = None) -> str:
    """The page of the run in ``folder``, whose moments are read unless they are given. running: its stage, if it goes on.
    Raises ValueError if its settings are not those of a run."""
    settings = read_configuration(folder / STORED)
    if "algo" not in settings:  # refinements, comparisons and leaderboards have such a file too
        raise ValueError(
            f"{folder} is not a training run, and has neither comparison.json nor leaderboard.json: a comparison or "
            "leaderboard writes them, and its page, when it ends"
        )
    moments = read_moments(folder) if moments is None else moments
    ledger = read_ledger(folder / "ledger.json")
    seconds = ledger["total"].get("seconds")
    ended = (folder / "table.txt").is_file()
    count = settings["rounds"]["count"]
    done = sum(moment.name not in ("start", "round 0") for moment in moments)
    facts = {
        "Algorithm": settings["algo"],
        "Initial policy": Path(settings["model"]["model_name_or_path"]).name,
        "Oracle": settings["oracle"],
        "Rounds": f"{done} of {count}" if count else "none, one stage of training",
        "Seed": settings["train"]["seed"],
        "Time": MISSING if seconds is None else f"{seconds / 60:,.1f} minutes",
    }
    unfinished = "This run has not ended (there is no table.txt): the page shows what it has written so far."
    return page(
        *("Run", folder.name, facts),
        verdict(moments),
        [] if ended or running else [unfinished],
        {
            "Rounds": _rounds(moments),
            "Margins": _margins(moments),
            "Robustness": robustness(moments),
            "Training": step_plots(read_growing(folder / METRICS)),
            "Answers": _answers(moments),
            "Plays": _plays(folder),
            "Cost": _cost(ledger),
            "Data": _data(folder),
            "Settings": [details("Every setting of the run", tag("pre", unsigned(folder / STORED)))],
        },
        running_banner(running) if running else None,
    )


def _rounds(moments: Sequence[Moment]) -> list[Markup]:
    if not moments:
        return []
    shown = [figure for figure in FIGURES if any(moment.row.get(figure[1]) is not None for moment in moments)]
    missing = [title for title, key, _ in FIGURES if key not in {column for _, column, _ in shown}]
    rows = [
        [
            moment.name,
            *(plus_minus(moment.row.get(key), half_of(moment.row, key), digits, MISSING) for _, key, digits in shown),
        ]
        for moment in moments
    ]
    note = (
        "Accuracy and margin: of held-out pairs against the initial reference; kl (nats), length (tokens): per fresh answer; "
        "wins: the oracle's mean preference for it over the start's; labels: the oracle's agreement with human pairs of the "
        "round's prompts; value: the follower's problem before the round's steps."
    )
    notes = [note, *([f" Not measured: {', '.join(missing)}."] if missing else [])]
    if different := measured_differently([moment.row for moment in moments]):
        notes.append(f" {different[0].upper()}{different[1:]}.")
    return [
        html_table(["", *(title for title, _, _ in shown)], rows),
        tag("p", *notes, class_="quiet"),
        plots(
            *round_plots([moment.name for moment in moments], [moment.row | moment.certificate for moment in moments])
        ),
    ]


def _margins(moments: Sequence[Moment]) -> list[Markup]:
    solved = [moment for moment in moments if moment.certificate]
    held_out = held_out_plot({moment.name: list(moment.margins.values()) for moment in moments})
    shown = [follower_plot(moment.name, moment.certificate) for moment in solved]
    parts = [plots(*shown, *held_out)] if shown or held_out else []
    if solved:
        names = [name for name in CERTIFICATE if any(moment.certificate.get(name) is not None for moment in solved)]
        rows = [[words(name), *(_certified(name, moment.certificate.get(name)) for moment in solved)] for name in names]
        note = (
            "The gap between value and dual value proves that the follower's answer is optimal: it is 0 up to rounding. The "
            "figures are explained on the page of the algorithm."
        )
        parts += [
            tag("h3", "Certificate of the follower"),
            html_table(["", *(moment.name for moment in solved)], rows),
            tag("p", note, class_="quiet"),
        ]
    return parts


def _certified(name: str, value: float | None) -> str:
    if value is None or name in ("groups", "pairs"):
        return number(value, 0)
    return tiny(value) if name == "gap" else number(value, 4)


def _answers(moments: Sequence[Moment]) -> list[Markup]:
    """Held-out prompts with the policy's answer at each moment."""
    samples = {moment.name: {row["id"]: row for row in moment.samples} for moment in moments if moment.samples}
    if not samples:
        return []
    prompts = next(iter(samples.values()))
    articles = [
        side_by_side(
            prompts[key]["prompt"],
            [Written(name, [rows[key]["text"]], _measured(rows[key])) for name, rows in samples.items() if key in rows],
        )
        for key in list(prompts)[:SHOWN]
    ]
    return [
        how_many(len(articles), len(prompts), "held-out prompts, with the policy's answer at each moment"),
        *articles,
    ]


def _measured(row: dict[str, Any]) -> str:
    cut = ", cut by the length limit" if row["truncated"] else ""
    return f"{row['tokens']} tokens{cut}, {with_minus_sign(row['kl'], 2)} nats from the reference"


def _plays(folder: Path) -> list[Markup]:
    """Answers of the roles in the last step of an on-policy run."""
    run = RunFolder(str(folder))
    rows = next(
        (rows for number in reversed(run.rounds()) if (rows := read_growing(run.round(number) / "plays.jsonl"))), []
    )
    if not rows:
        return []
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    articles = [side_by_side(f"Prompt {row['id']}", _played(row)) for row in last[:PLAYS_SHOWN]]
    return [how_many(len(articles), len(last), f"plays of step {last[0]['step']}, the last one"), *articles]


def _played(row: dict[str, Any]) -> list[Written]:
    answers = []
    for place, answer in enumerate(row["answers"]):
        rates = [preference for column, preference in enumerate(row["preferences"][place]) if column != place]
        wins = f", preferred with probability {fmean(rates):.2f}" if rates else ""
        answers.append(Written(answer["role"], [answer["text"]], f"{answer['tokens']} tokens{wins}"))
    return answers


def _cost(ledger: dict[str, Any]) -> list[Markup]:
    if not ledger["stages"]:
        return []
    seconds = seconds_by_stage(ledger["stages"])
    stages = sorted({stage for parts in seconds.values() for stage in parts}, key=(*STAGES, "pairs").index)
    names = list(seconds)
    figure = bars(
        [Series(stage, names, [seconds[name].get(stage, 0.0) for name in names]) for stage in stages],
        stacked=True,
        x_title="seconds",
    )
    kinds = [kind for kind in ledger["total"] if not kind.startswith("seconds_")]
    rows = [
        [name, *(number(entry.get(kind), 1 if kind in ("seconds", "peak_memory_gib") else 0) for kind in kinds)]
        for name, entry in {**ledger["stages"], "total": ledger["total"]}.items()
    ]
    header = ["", *(words(kind).replace(" gib", ", GiB") for kind in kinds)]
    return [
        plot("Seconds by stage", figure, "wall time of each round's stages", height=90 + 42 * len(names)),
        html_table(header, [[row[0].replace("/", ": ").replace("_", " "), *row[1:]] for row in rows]),
    ]


def _data(folder: Path) -> list[Markup]:
    path = folder / "data_report.json"
    parts = []
    for entry in read_json(path) if path.is_file() else []:
        report = unsealed(path, entry, "delete it, and the run writes it again when resumed")
        rows = [
            [words(finding["name"]), number(finding["count"], 0), f"{finding['share']:.1%}"]
            for finding in report["findings"]
            if finding["count"]
        ]
        kept = tag("p", f"{report['kept']:,} of {report['rows']:,} rows are used.", class_="quiet")
        parts += [tag("h3", report["name"]), kept, *([html_table(["found", "rows", "share"], rows)] if rows else [])]
    return parts
