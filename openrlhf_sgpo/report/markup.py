"""Elements, tables and figures of a page. A text that is not markup is escaped when it becomes part of some: models wrote much
of what stands on a page, and a model can write HTML."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

MISSING = "\N{EN DASH}"


def tag(name: str, *content: object, **attributes: str) -> Markup:
    """An element. An attribute's name may end with _, as in class_, and has _ for -."""
    words = (f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{''.join(words)}>{join(*content)}</{name}>")


def join(*parts: object) -> Markup:
    """Texts are escaped, markup is not."""
    return Markup().join(map(escape, parts))


def html_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> Markup:
    """The first column names the row, the others hold figures."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def details(summary: str, *content: object) -> Markup:
    """Content that opens on demand."""
    return tag("details", tag("summary", summary), *content)


def number(value: float | None, digits: int) -> str:
    """With so many digits behind the point and commas between thousands; a dash for None."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def with_minus_sign(value: float, digits: int) -> str:
    """A figure in a sentence, with a true minus sign."""
    return number(value, digits).replace("-", "\N{MINUS SIGN}")


def tiny(value: float) -> str:
    """A figure that is 0 to rounding."""
    return f"{value:.1e}" if value else "0"


def words(name: str) -> str:
    """A key of a file as a heading."""
    return name.replace("_", " ")
