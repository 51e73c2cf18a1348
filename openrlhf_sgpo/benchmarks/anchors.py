"""Anchors: models of a benchmark's published leaderboard, judged beside others by the same judge.

Figures of different judges cannot be compared, but ranks can: the rank correlation between the anchors' figures and their
published ones says how far a judge orders models as the published leaderboard does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from openrlhf_sgpo.benchmarks.settings import Contestant
from openrlhf_sgpo.benchmarks.task import Task
from openrlhf_sgpo.output import say
from openrlhf_sgpo.run_folder import write_text


def spread_places(count: int, total: int) -> list[int]:
    """``count`` of ``total`` places from 0, at equal distances, with the first and the last. 2 <= count <= total."""
    return [round(number * (total - 1) / (count - 1)) for number in range(count)]


def choose_anchors(task: Task, count: int, source: str) -> list[Contestant]:
    """``count`` models of the task's published leaderboard, at equal distances in its order; says which.

    source: a folder with the published files of answers, from whose models is chosen, or an address to download them from;
    empty: the task's own address. Raises ValueError if files are missing, or are not the published ones.
    """
    published = task.published()
    address = source or task.answers_address
    is_address = address.startswith(("http://", "https://"))
    folder = _cache(task, address) if is_address else Path(address)
    if not is_address:
        if not folder.is_dir():
            raise ValueError(f"--anchors_from: {source}: no such folder")
        published = [entry for entry in published if (folder / entry.file).is_file()]
    if len(published) < count:
        where = f", as {published[0].file} in --anchors_from" if published else f" in --anchors_from {address}"
        raise ValueError(f"--anchors {count}: there are answers of {len(published)} published models only{where}")
    chosen = [published[place] for place in spread_places(count, len(published))]
    if is_address:
        for entry in chosen:
            _download(address, entry.file, folder)
    for entry in chosen:
        try:
            task.check_published(entry, folder / entry.file)
        except ValueError:
            if is_address:  # what has come instead is not asked for again otherwise
                (folder / entry.file).unlink()
            raise
    names = ", ".join(entry.model for entry in chosen)
    say(f"{task.name}: {count} anchors, at equal distances in the published order of {len(published)} models: {names}")
    return [Contestant(entry.model, file=str(folder / entry.file), published=entry.figures) for entry in chosen]


def name_conflicts(contestants: Sequence[Contestant], anchors: Sequence[Contestant]) -> list[str]:
    """Problems of models that are named as an anchor."""
    names = {contestant.name for contestant in contestants} & {anchor.name for anchor in anchors}
    return [f"--models: {name} is the name of an anchor; give another, as in NAME=PATH" for name in sorted(names)]


def _cache(task: Task, address: str) -> Path:
    """The folder for files from an address, in the cache of the hub's library."""
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path("openrlhf_sgpo", namespace=task.name, subfolder=address))


def _download(address: str, file: str, folder: Path) -> None:
    """Put ``file`` below ``address`` into the folder, unless it is there. Raises ValueError."""
    import httpx

    if (folder / file).is_file():
        return
    url = f"{address.rstrip('/')}/{quote(file)}"
    try:
        reply = httpx.get(url, follow_redirects=True, timeout=60)
        reply.raise_for_status()
    except httpx.HTTPError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--anchors: {url} cannot be downloaded ({reason}); give --anchors_from FOLDER, which holds {file}"
        ) from error
    write_text(folder / file, reply.text)
