"""README.md beside the weights of a round: the model card of the Hugging Face hub.

It tells only what the run has on record. Metadata that is not known is left out, and paths of this machine do not appear. The
card belongs to whoever shares the model: it is written once, never again, and no digest covers it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from openrlhf_sgpo import __version__, algorithms, flags
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.files import is_file
from openrlhf_sgpo.intervals import half_of
from openrlhf_sgpo.ledger import read_ledger
from openrlhf_sgpo.report.markup import number, tiny
from openrlhf_sgpo.report.moments import Moment, moments_so_far, verdict
from openrlhf_sgpo.run_folder import CARD, STORED, RunFolder, read_configuration, read_json, write_text
from openrlhf_sgpo.table import FIGURES, PLUS_MINUS, measured_differently, plus_minus

ROLES = ("policy", "follower")
# Shared settings on the card, if the run reads them.
SHARED = (
    *("model.beta", "adam.lr", "lr_scheduler", "train.batch_size", "train.max_epochs", "train.max_steps"),
    *("train.nll_coef", "train.seed", "data.max_len", "ds.param_dtype", "ds.lora.rank"),
)
WITH_ROUNDS = (
    *("oracle", "rounds.count", "rollout.temperature", "rollout.top_p", "rollout.max_new_tokens"),
    *("rollout.n_samples_per_prompt", "rounds.data", "rounds.loss_reference", "rounds.judge_reference"),
    *("seed.size", "seed.flip_rate", "seed.lr", "seed.max_epochs"),
)
WITH_PLAYS = ("rounds.steps",)
ONLY_PAIRS = ("rounds.data", "rounds.loss_reference", "rounds.judge_reference", "rollout.n_samples_per_prompt", "seed.")
CERTIFIED = {
    "radius": "radius of the ball",
    "value": "loss with the follower, V",
    "empirical": "loss without it",
    "dual_value": "value of the dual problem",
    "gap": "duality gap; 0 up to rounding proves the follower optimal",
    "fraction_moved": "share of the pairs' mass that it moves",
    "threshold": "margin on the verge of moving",
    "value_before": "V of some of the round's pairs before its steps",
    "value_after": "V of the same pairs after them",
}
COSTS = ("seconds", "samples", "tokens_generated", "tokens_trained", "tokens_scored", "judge_calls", "peak_memory_gib")


def write_cards(run: RunFolder, number: int, finished: dict[int | None, Moment]) -> None:
    """The card of each role's weights of a round that has been evaluated, where there are weights without one. finished: as in
    ``moments_so_far``."""
    for role in ROLES:
        path = run.round(number) / role / CARD
        if path.parent.is_dir() and not path.exists():
            write_text(path, f"{model_card(run, number, role, moments_so_far(run.path, finished))}")


def model_card(run: RunFolder, number: int, role: str, moments: Sequence[Moment]) -> ModelCard:
    """The card of the weights of a role after a round. moments: of the run; those after the round are not shown."""
    settings = read_configuration(run.path / STORED)
    algorithm = algorithms.get(settings["algo"])
    last = next(place for place, moment in enumerate(moments) if moment.name == f"round {number}")
    so_far, data = moments[: last + 1], _metadata(settings, algorithm)
    sections = {
        "How to use it": _usage(settings, algorithm, role),
        "Data": _data(run, settings),
        "Training": _training(settings, algorithm),
        "Certificate of the follower": _certificate(so_far[-1].certificate),
        "Evaluation": _evaluation(so_far),
        "Worst-case loss": _worst_case(so_far[-1].row.get("worst_case", {})),
        "Cost": _cost(run, number),
        "Versions": _versions(run, number),
    }
    text = [f"# {run.path.name}, {role} of round {number}", _introduction(settings, algorithm, number, role)]
    text += [f"## {title}\n\n{content}" for title, content in sections.items() if content]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n")


def _metadata(settings: Mapping[str, Any], algorithm: algorithms.AlgorithmType) -> ModelCardData:
    base, data = settings["model"]["model_name_or_path"], settings["data"]
    sources = [data[name] for name in ("dataset", "prompt_dataset") if _on_hub(data.get(name, ""))]
    inherited = _card_of(base)
    return ModelCardData(
        license=inherited.get("license"),
        base_model=base if _on_hub(base) else inherited.get("base_model"),
        datasets=list(dict.fromkeys(sources)) or None,
        library_name="transformers",
        # A preference model judges, and answers nothing.
        pipeline_tag="text-generation" if algorithm.needs.reference else None,
        tags=["openrlhf-sgpo", algorithm.name],
    )


def _on_hub(source: str) -> bool:
    return bool(source) and not is_file(source) and not Path(source).exists()


def _card_of(model: str) -> ModelCardData:
    """Metadata of the model's own card, if it is on this machine; the network is not asked."""
    path: Any = Path(model, CARD)
    with suppress(OSError, ValueError, HFValidationError):
        if _on_hub(model):
            path = try_to_load_from_cache(model, CARD)
        if isinstance(path, (str, Path)) and Path(path).is_file():
            return ModelCard.load(Path(path), ignore_metadata_errors=True).data
    return ModelCardData()


def _named(source: str) -> str:
    """A model or a data set without the path to it."""
    return f"[{source}](https://huggingface.co/{source})" if _on_hub(source) else f"`{Path(source).name}`"


def _linked(paper: str) -> str:
    return re.sub(r"(arXiv )?(\d{4}\.\d{5})", r"[\1\2](https://arxiv.org/abs/\2)", paper)


def _introduction(settings: Mapping[str, Any], algorithm: algorithms.AlgorithmType, number: int, role: str) -> str:
    rounds, base = settings["rounds"]["count"], _named(settings["model"]["model_name_or_path"])
    when = f"round {number} of {rounds}" if number else "the seed stage" if rounds else "training"
    summary = f"{algorithm.summary} ({_linked(algorithm.paper)})" if algorithm.paper else algorithm.summary
    text = f"{base} after {when} with `{algorithm.name}` of openrlhf-sgpo. {summary[0].upper()}{summary[1:]}."
    if role == "follower":
        text += " These are the weights of the follower, which improves an answer that it is shown."
    return text


def _usage(settings: Mapping[str, Any], algorithm: algorithms.AlgorithmType, role: str) -> str:
    if not algorithm.needs.reference:
        return "It judges pairs of answers: `openrlhf-sgpo train --oracle preference_model --reward.model_name_or_path FOLDER`."
    rollout = settings["rollout"]
    sampling = f"do_sample=True, temperature={rollout['temperature']}, top_p={rollout['top_p']}, top_k=0"
    messages = '{"role": "user", "content": "How do I keep basil alive?"}'
    if role == "follower":
        instruction = settings[algorithm.name]["follower_prompt"]
        messages += ', {"role": "assistant", "content": draft}, {"role": "user", "content": ' + repr(instruction) + "}"
    code = [
        *("```python", "from transformers import pipeline", ""),
        'answer = pipeline("text-generation", ".")  # this folder, or its name on the hub',
        *(['draft = "Water it."'] if role == "follower" else []),
        f"messages = [{messages}]",
        f"written = answer(messages, max_new_tokens={rollout['max_new_tokens']}, {sampling})",
        *('print(written[0]["generated_text"][-1]["content"])', "```"),
    ]
    notes = "Prompts go through the chat template of the tokenizer. These are the settings with which the run sampled."
    if settings["ds"]["lora"]["rank"]:
        notes += " The weights contain the LoRA adapter, which is also in `adapter/`."
    return "\n".join([*code, "", notes])


def _training(settings: Mapping[str, Any], algorithm: algorithms.AlgorithmType) -> str:
    meanings = flags.meanings({"": Config(), algorithm.name: algorithm.settings()})
    names = [name for name in meanings if name.startswith(f"{algorithm.name}.")] + list(SHARED)
    if settings["rounds"]["count"]:
        names += [name for name in WITH_ROUNDS if not (algorithm.fresh_answers and name.startswith(ONLY_PAIRS))]
        names += WITH_PLAYS if algorithm.fresh_answers else ()
    if algorithm.fresh_answers:
        names = [name for name in names if name not in ("train.max_epochs", "train.max_steps", "train.nll_coef")]
        names += ["reward.model_name_or_path", "judge.model"]
    rows = []
    for name in names:
        value: Any = settings
        for key in name.split("."):
            value = value[key]
        if name in ("reward.model_name_or_path", "judge.model"):
            value = Path(value).name
        if value != "":
            rows.append([f"`{name}`", f"`{value}`", meanings[name]])
    return _table(["setting", "value", "meaning"], rows)


def _data(run: RunFolder, settings: Mapping[str, Any]) -> str:
    path, rows = run.path / "data_report.json", []
    for report in read_json(path) if path.is_file() else []:
        flag, _, source = report["name"].partition(" ")
        rows.append([f"`{flag.removeprefix('--')}`", _named(source), f"{report['rows']:,}", f"{report['kept']:,}"])
    return _table(["read as", "data", "rows", "used"], rows) if rows else ""


def _certificate(certificate: Mapping[str, Any]) -> str:
    known = {name: words for name, words in CERTIFIED.items() if certificate.get(name) is not None}
    rows = [
        [f"`{name}`", tiny(certificate[name]) if name == "gap" else number(certificate[name], 4), words]
        for name, words in known.items()
    ]
    if not rows:
        return ""
    text = f"The follower is solved on the {len(certificate['margins']):,} pairs of the round before its steps."
    return f"{text}\n\n{_table(['', 'figure', 'meaning'], rows)}"


def _evaluation(moments: Sequence[Moment]) -> str:
    shown = [figure for figure in FIGURES if any(moment.row.get(figure[1]) is not None for moment in moments)]
    if not shown:
        return ""
    rows = [
        [moment.name, *(plus_minus(moment.row.get(key), half_of(moment.row, key), digits) for _, key, digits in shown)]
        for moment in moments
    ]
    note = (
        "Accuracy and margin are of held-out pairs against the initial reference, kl in nats and length in tokens of a fresh "
        "answer, wins the oracle's mean preference for it over the start's, labels the oracle's agreement with human labels, "
        f"value the follower's problem before the round's steps. {PLUS_MINUS}."
    )
    different = measured_differently([moment.row for moment in moments])
    parts = [*verdict(moments), *([f"{different[0].upper()}{different[1:]}."] if different else [])]
    return "\n\n".join([*parts, _table(["", *(title for title, _, _ in shown)], rows), note])


def _worst_case(figures: Mapping[str, Any]) -> str:
    """V of the policy and of DPO on the human pairs, in words. figures: of ``evaluator.worst_case``; empty without them."""
    if not figures:
        return ""
    what = f"of {figures['pieces']} tangents of DPO's loss" if figures["pieces"] else "of DPO's loss"
    unit = "win probabilities" if figures["space"] == "probability" else "margins"
    text = f"On the {figures['pairs']:,} held-out pairs the mean {what} is {_beside_dpo(figures, 'loss')}."
    if figures["radius"]:
        text += (
            f" If a follower may move their {unit} by {figures['radius']:g} on average, the radius of the run, it is "
            f"{_beside_dpo(figures, 'value')}."
        )
    return f"{text} DPO is the policy after round 0, which was trained on the human pairs alone. {PLUS_MINUS}."


def _beside_dpo(figures: Mapping[str, Any], key: str) -> str:
    saved, half = figures[f"{key}_saved"], half_of(figures, f"{key}_saved")
    difference = f"{plus_minus(abs(saved), half, 4)} {'less' if saved >= 0 else 'more'}"
    return f"{figures[key]:.4f} under this policy and {figures[f'dpo_{key}']:.4f} under DPO, {difference}"


def _cost(run: RunFolder, number: int) -> str:
    """The ledger of the run up to this round, by round."""
    folders = ["initial", *(f"round_{place}" for place in range(number + 1))]
    stages = read_ledger(run.path / "ledger.json")["stages"]
    sums: dict[str, dict[str, float]] = {}
    for name, entry in stages.items():
        folder = name.partition("/")[0]
        for row in (folder, "total") if folder in folders else ():
            total = sums.setdefault(row, {})
            for kind in COSTS:
                old, new = total.get(kind, 0), entry.get(kind, 0)
                total[kind] = max(old, new) if kind.startswith("peak") else old + new
    if not sums:
        return ""
    shown = [kind for kind in COSTS if any(total[kind] for total in sums.values())]
    names = [name for name in (*folders, "total") if name in sums]
    rows = [
        [
            "start" if name == "initial" else name.replace("_", " "),
            *(_cost_of(kind, sums[name][kind]) for kind in shown),
        ]
        for name in names
    ]
    return _table(["", *(kind.replace("_", " ").replace(" gib", ", GiB") for kind in shown)], rows)


def _cost_of(kind: str, value: float) -> str:
    return number(value, 1 if kind in ("seconds", "peak_memory_gib") else 0)


def _versions(run: RunFolder, number: int) -> str:
    stages = run.manifest(number)["stages"].values()
    known = {name: version for facts in stages for name, version in facts.get("versions", {}).items()}
    return ", ".join(f"{name} {version}" for name, version in {"openrlhf-sgpo": __version__, **known}.items()) + "."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, in which a cell must not contain a bar or a line break."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
