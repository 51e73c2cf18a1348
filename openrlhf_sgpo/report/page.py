"""The frame of a page: one self-contained file with style, script and plotly."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from markupsafe import Markup

from openrlhf_sgpo.report.markup import join, tag
from openrlhf_sgpo.table import PLUS_MINUS


def page(
    kind: str,
    title: str,
    facts: Mapping[str, object],
    verdict: Sequence[str],
    warnings: Sequence[str],
    sections: Mapping[str, Sequence[Markup]],
    banner: Markup | None = None,
) -> str:
    """A complete HTML page. kind: what it shows, such as Run. facts: shown at the top, by name. verdict: its summary, in
    sentences. sections: content by title; empty ones are left out. banner: stands under the title."""
    shown = {name: parts for name, parts in sections.items() if parts}
    ids = {name: name.lower().replace(" ", "-") for name in shown}
    section_tags = [tag("section", tag("h2", name, id=ids[name]), *parts) for name, parts in shown.items()]
    # No line breaks around a plus-minus.
    unbroken = (sentence.replace(" \N{PLUS-MINUS SIGN} ", "\u00a0\N{PLUS-MINUS SIGN}\u00a0") for sentence in verdict)
    sentences = [tag("p", sentence) for sentence in unbroken]
    if "\N{PLUS-MINUS SIGN}" in join(*sentences, *section_tags):
        sentences.append(tag("p", f"{PLUS_MINUS}.", class_="quiet"))
    listed = tag("ul", *(tag("li", text) for text in warnings))
    body = join(
        tag("p", kind, class_="kind"),
        tag("h1", title),
        *([banner] if banner else []),
        *([tag("div", *sentences, class_="verdict")] if sentences else []),
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()), class_="facts"),
        *([tag("div", tag("strong", "Read this first"), listed, class_="warnings")] if warnings else []),
        tag("nav", *(tag("a", name, href=f"#{ids[name]}") for name in shown)),
        *section_tags,
        tag(
            "footer",
            "Written by openrlhf-sgpo report. The file contains everything it shows. Drag in a plot to zoom, double-click to "
            "reset.",
        ),
    )
    code, hashes = _scripts()
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    # Only these two scripts may run, and nothing may be fetched or sent, whatever text the page contains.
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    head = join(
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(_file("page.css"))),
    )
    # Plotly's five megabytes are copied once here; each further element around them would copy them again.
    return f'<!doctype html>\n<html lang="en">{tag("head", head)}<body>{body}{code}</body></html>\n'


@cache
def _scripts() -> tuple[str, list[str]]:
    """The elements of the two scripts, and their hashes for the policy."""
    scripts = [(files("plotly") / "package_data/plotly.min.js").read_text(encoding="utf-8"), _file("page.js")]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    return "".join(f"<script>{script}</script>" for script in scripts), hashes


def _file(name: str) -> str:
    return (files("openrlhf_sgpo.report") / name).read_text(encoding="utf-8")
