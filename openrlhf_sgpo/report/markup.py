"""Elements, tables and figures of a page. Plain text is escaped when added to markup: much of a page was written by models, and
a model can write HTML."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

MISSING = "\N{EN DASH}"


def tag(name: str, *content: object, **attributes: str) -> Markup:
    """An HTML element. In attribute names, _ stands for - and a final _ is dropped, as in class_."""
    words = (f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{''.join(words)}>{join(*content)}</{name}>")


def join(*parts: object) -> Markup:
    """Concatenate parts; text is escaped, markup is not."""
    return Markup().join(map(escape, parts))


def html_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> Markup:
    """A table whose first column is the row's heading."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def details(summary: str, *content: object) -> Markup:
    """Content that opens on demand."""
    return tag("details", tag("summary", summary), *content)


def number(value: float | None, digits: int) -> str:
    """The value with this many decimals and thousands separators; a dash for None."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def with_minus_sign(value: float, digits: int) -> str:
    """The number with a typographic minus sign, for text."""
    return number(value, digits).replace("-", "\N{MINUS SIGN}")


def tiny(value: float) -> str:
    """Format a number that is 0 up to rounding."""
    return f"{value:.1e}" if value else "0"


def words(name: str) -> str:
    """A key with spaces for underscores, as a heading."""
    return name.replace("_", " ")
