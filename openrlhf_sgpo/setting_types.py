"""The types of settings: what they are called, and how text becomes a value of them."""

from __future__ import annotations

import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def without_none(annotation: Any) -> tuple[Any, bool]:
    """(the type without ``| None``, whether it had that)"""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    values = [option for option in options if option is not type(None)]
    return (values[0], True) if len(values) == 1 else (annotation, False)


def expected(annotation: Any) -> str:
    """The values of this type in words. Raises TypeError for an unsupported type."""
    annotation, optional = without_none(annotation)
    origin, options = get_origin(annotation), get_args(annotation)
    if annotation in SCALARS:
        text = SCALARS[annotation]
    elif origin is Literal and all(type(option) in (str, int) for option in options):
        text = "one of " + ", ".join(map(str, options))
    elif origin in (list, tuple) and Ellipsis not in options:
        text = f"{len(options)} values: " if origin is tuple else "a list, each item "
        text += ", ".join(map(expected, options))
    else:
        raise TypeError(f"unsupported type of a setting: {annotation}")
    return f"{text}, or null" if optional else text


def convert(annotation: Any, raw: Any) -> Any:
    """What a file or the command line gives (text, None or a list) as a value of this type. Raises ValueError or KeyError if it
    is none."""
    annotation, optional = without_none(annotation)
    origin, options = get_origin(annotation), get_args(annotation)
    if (optional and raw is None) or (annotation is str and isinstance(raw, str)):
        return raw
    if origin in (list, tuple) and isinstance(raw, list):
        kinds = options if origin is tuple else options * len(raw)
        return origin(convert(kind, item) for kind, item in zip(kinds, raw, strict=True))
    if origin in (list, tuple) or not isinstance(raw, str):
        raise ValueError
    if annotation is bool:
        raw, options = raw.capitalize(), (True, False)
    if options:
        return {str(option): option for option in options}[raw]
    if annotation is int and re.fullmatch(r"[+-]?[\d_]+", raw):
        return int(raw)
    number = float(raw)
    # 1e3 is an integer too; beyond 2**53 a float no longer holds every integer.
    if not math.isfinite(number) or (annotation is int and (number % 1 or abs(number) > 2**53)):
        raise ValueError
    return annotation(number)


def shown(value: Any) -> str:
    """A value as a user would write it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value)) or "nothing"
    names = {"None": "null", "True": "true", "False": "false", "{}": "an empty group"}
    return names.get(repr(value), repr(value))
