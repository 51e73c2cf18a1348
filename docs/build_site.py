"""Build the documentation site from README.md and docs/, which stay readable where the repository is shown.

    python docs/build_site.py FOLDER

Pages are copied to FOLDER/source, with links that leave them turned into addresses of the repository, and pages on the Python
interface are added, which are made from docstrings. Then zensical writes FOLDER/site and stops at a link that leads nowhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (ROOT / "zensical.toml").read_text(encoding="utf-8")
REPOSITORY = re.search(r'^link = "(.*)"', SETTINGS, re.MULTILINE)[1]  # type: ignore[index]
# In the repository, and on the site.
PAGES = {
    ROOT / "README.md": "index.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "AGENTS.md": "contributing.md",
    **{page: str(page.relative_to(ROOT / "docs")) for page in sorted((ROOT / "docs").rglob("*.md"))},
}
# Title of the page and modules on it.
REFERENCE = {
    "losses": (
        "Losses and trainers",
        ["openrlhf_sgpo.drop_in.loss", "openrlhf_sgpo.drop_in.trainer", "openrlhf_sgpo.trl"],
    ),
    "follower": ("The follower", ["openrlhf_sgpo.dro.solve", "openrlhf_sgpo.dro.best", "openrlhf_sgpo.dro.curve"]),
    "algorithms": ("Writing an algorithm", ["openrlhf_sgpo.algorithms.base", "openrlhf_sgpo.algorithms.plays"]),
    "oracles": ("Writing an oracle", ["openrlhf_sgpo.oracle.base"]),
    "settings": ("Settings", ["openrlhf_sgpo.config"]),
}


def on_the_site(page: Path, target: str) -> str:
    """Where a link of a page leads on the site: to another page or figure of it, or to a file at the repository's address.

    page: the file with the link. target: as written there. Raises ValueError if there is no such file."""
    path, hash_sign, anchor = target.partition("#")
    if not path or path.startswith(("http:", "https:")):
        return target
    file = Path(os.path.normpath(page.parent / path))
    if not file.exists():
        raise ValueError(f"{page.relative_to(ROOT)} links to {target}, which is not there")
    if file in PAGES:
        place = PAGES[file]
    elif file.is_relative_to(ROOT / "docs" / "figures"):
        place = str(file.relative_to(ROOT / "docs"))
    else:
        return f"{REPOSITORY}/blob/main/{file.relative_to(ROOT)}{hash_sign}{anchor}"
    return os.path.relpath(place, Path(PAGES[page]).parent) + hash_sign + anchor


def text_on_the_site(page: Path) -> str:
    """A page with the links of the site. Blocks of code are left alone."""
    blocks = re.split(r"(^```.*?^```$)", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for index in range(0, len(blocks), 2):
        blocks[index] = re.sub(r"(?<=\]\()[^)\s]+(?=\))", lambda link: on_the_site(page, link[0]), blocks[index])
    return "".join(blocks)


def write_source(folder: Path) -> None:
    """All pages of the site, as Markdown, with their figures."""
    for page, name in PAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text_on_the_site(page), encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "figures", folder / "figures")
    for name, (title, modules) in REFERENCE.items():
        text = f"# {title}\n" + "".join(f"\n::: {module}\n" for module in modules)
        (folder / "reference").mkdir(exist_ok=True)
        (folder / "reference" / f"{name}.md").write_text(text, encoding="utf-8")


def main(folder: Path) -> int:
    folder = folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    write_source(folder / "source")
    settings = folder / "zensical.toml"
    settings.write_text(SETTINGS.replace('paths = ["."]', f'paths = ["{ROOT}"]'), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict", "--config-file", str(settings)]
    return subprocess.run(command, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
