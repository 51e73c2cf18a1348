"""From dataclasses to flags and YAML keys, and back: a field is a flag, a nested dataclass is a group.

``sections`` maps a prefix to a callable that returns a dataclass instance of defaults (often the type itself); the prefix
"" is the root. Field types: ``bool``, ``int``, ``float`` (finite), ``str``, ``Literal`` of strings or integers, ``list[...]``,
``tuple[...]`` of fixed length, and ``... | None``. The command line overrides the file of ``--config``, which overrides
the defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_origin, get_type_hints

import yaml

from openrlhf_sgpo import keys, yaml_files
from openrlhf_sgpo.setting_types import convert, expected, shown, without_none

COMMAND_LINE = "command line"
CONFIG_FLAG = "config"
HELP = {"-h", "--help"}
_CONFIG_HELP = "YAML file with any of these flags as keys, or the name of a recipe; the command line takes precedence"
RECIPES = Path(__file__).with_name("recipes")
_Sections: TypeAlias = Mapping[str, Callable[[], Any]]
_Words: TypeAlias = list[tuple[str, list[str]]]  # flags with their values as text
_Entries: TypeAlias = list[tuple[str, Any, str]]  # keys with their values and origins


class SettingsError(ValueError):
    """All problems with the settings, one per line of the message and per entry of ``args``."""

    def __str__(self) -> str:
        return "\n".join(self.args)


class HelpAsked(Exception):
    """The arguments ask for the flags, which this describes, in place of the command."""


def refuse(problems: Sequence[str]) -> None:
    """Raises SettingsError with these problems, if there are any."""
    if problems:
        raise SettingsError(*problems)


class Parsed(NamedTuple):
    """instances: by prefix. given: origin of each flag that was set, ``COMMAND_LINE`` or ``file:line``. ignored: origins of a
    file's keys in groups that exist only elsewhere."""

    instances: dict[str, Any]
    given: dict[str, str]
    ignored: dict[str, str]


class _Flag(NamedTuple):
    annotation: Any
    default: Any
    metadata: Mapping[str, Any]


class Range(NamedTuple):
    """The numbers that a setting accepts: low <= x <= high and above < x < below, where set, and the number ``also``."""

    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    also: float | None = None

    def holds(self, number: float) -> bool:
        """Whether the number is in range; NaN is not."""
        return number == self.also or (
            (self.low is None or number >= self.low)
            and (self.above is None or number > self.above)
            and (self.high is None or number <= self.high)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """The range in words; empty if any number is accepted."""
        if self.low is not None and self.high is not None:
            parts = [f"{self.low} to {self.high}"]
        else:
            words = ("at least", "more than", "at most", "less than")
            parts = [f"{word} {bound}" for word, bound in zip(words, self, strict=False) if bound is not None]
        return ", ".join(parts) + ("" if self.also is None else f", or {self.also}")


def setting(
    default: Any,
    help: str,
    secret: bool = False,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    also: float | None = None,
) -> Any:
    """A dataclass field with its help text; lists are copied, so no two configurations share one.

    secret: it says where a key is (``keys.SOURCES``); any other value is refused, and none is written to the run folder.
    Other arguments: the range of the number, or of each number in a list or tuple, see ``Range`` and ``out_of_range``.
    """
    metadata = {"help": help, "secret": secret, "range": Range(low, above, high, below, also)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def part(kind: Callable[[], Any], *names: str) -> Any:
    """A dataclass field for a group of which only these settings are flags; the others stay as ``kind`` sets them.

    kind: a dataclass, or a callable that returns one. names: within the group, with dots for nested groups."""
    return dataclasses.field(default_factory=kind, metadata={"names": names})


def parse(
    argv: Sequence[str],
    sections: _Sections,
    known_elsewhere: Mapping[str, str] | None = None,
    other_names: Mapping[str, str] | None = None,
) -> Parsed:
    """Reads flags and the file of ``--config`` into one instance per section.

    known_elsewhere: groups that this run does not have, with the message for flags in them; in a file they are ignored, so one
    file can serve several runs. other_names: names that are not flags, with their messages.
    Raises SettingsError with every problem at once, TypeError if a field's type is not supported, and HelpAsked.
    """
    if HELP & set(argv):
        raise HelpAsked(help_text(sections))
    defaults = {prefix: section() for prefix, section in sections.items()}
    flags = _flags(defaults)
    for flag in flags.values():
        expected(flag.annotation)  # rejects an unsupported type even if the flag is not set
    (_, strays), *words = _words(argv)
    entries, problems = _read(words)
    problems += [f"{text!r} is unexpected, every value follows a flag ({COMMAND_LINE})" for text in strays]
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    ignored: dict[str, str] = {}

    def refused(name: str, raw: Any) -> str:
        return keys.refused(name, raw, name in flags and flags[name].metadata.get("secret", False))

    def accept(name: str, raw: Any, origin: str) -> None:
        if problem := refused(name, raw):
            problems.append(f"--{name} {problem} ({origin})")
            return
        if name not in flags:
            elsewhere = (known_elsewhere or {}).get(name.partition(".")[0])
            if elsewhere and origin != COMMAND_LINE:
                ignored[name] = origin
                return
            answer = elsewhere or (other_names or {}).get(name.replace("-", "_"))
            problems.append(f"--{name} {answer or 'is unknown' + _suggestion(name, [CONFIG_FLAG, *flags])} ({origin})")
            return
        try:
            values[name] = convert(flags[name].annotation, raw)
            given[name] = origin
        except (ValueError, KeyError):
            problems.append(f"--{name} got {shown(raw)}, expected {expected(flags[name].annotation)} ({origin})")

    for name, raw, origin in entries:
        members = [member for member in flags if member.startswith(f"{name}.")]
        if (not members and name not in sections) or (name in (other_names or {}) and raw and name not in flags):
            accept(name, raw, origin)
        elif raw:  # an empty group is fine: all its keys may be commented out
            problems.append(f"--{name} got {shown(raw)}, expected a group with {', '.join(members)} ({origin})")
    seen = set()
    for name, texts in words:
        annotation, optional = without_none(flags[name].annotation if name in flags else str)
        several = get_origin(annotation) in (list, tuple)
        texts = texts or ["true"] if annotation is bool else texts
        if name in seen:
            problems.append(f"--{name} is given twice ({COMMAND_LINE})")
        elif name not in flags and name != CONFIG_FLAG:
            accept(name, texts, COMMAND_LINE)
        elif not texts or (len(texts) > 1 and not several):
            problem = refused(name, texts) or f"got {shown(texts)}, expected {expected(annotation)}"
            problems.append(f"--{name} {problem} ({COMMAND_LINE})")
        elif name != CONFIG_FLAG:
            raw = texts[0] if not several else [] if texts == [""] else texts  # "--flag=" empties a list
            accept(name, None if optional and texts == ["null"] else raw, COMMAND_LINE)
        seen.add(name)
    refuse(problems)
    instances = {prefix: _replaced(default, prefix, values) for prefix, default in defaults.items()}
    return Parsed(instances, given, ignored)


def peek(argv: Sequence[str], name: str) -> str | None:
    """A flag's text as ``parse`` would find it; None if it is not set. Raises SettingsError if the file cannot be read."""
    words = _words(argv)
    texts = dict(reversed(words)).get(name)
    entries, problems = ([], []) if texts else _read(words)
    refuse(problems)
    return texts[0] if texts else next((raw for key, raw, _ in entries if key == name and isinstance(raw, str)), None)


def out_of_range(instances: Mapping[str, Any], only: tuple[str, ...] = ("",)) -> list[str]:
    """A problem for each value that is outside of its field's range, whatever its origin.

    instances: dataclass instances by prefix, as ``parse`` returns them. only: prefixes of the flags to check."""
    problems = []
    for name, flag in _flags(instances).items():
        if not name.startswith(only):
            continue
        numbers = flag.default if isinstance(flag.default, (list, tuple)) else [flag.default]
        span = flag.metadata.get("range", Range())
        if any(isinstance(number, (int, float)) and not span.holds(number) for number in numbers):
            problems.append(f"--{name}: {shown(flag.default)} is out of range, use {_bounds(flag)}")
    return problems


def to_dict(instances: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain values in field order, groups last. Tuples become lists, secrets empty; empty groups are omitted."""
    tree: dict[str, Any] = {}
    for name, (_, value, metadata) in _flags(instances).items():
        *group, leaf = name.split(".")
        node = tree
        for part in group:
            node = node.setdefault(part, {})
        node[leaf] = "" if metadata.get("secret") else list(value) if isinstance(value, (list, tuple)) else value
    return tree


def dump(instances: Mapping[str, Any]) -> str:
    """YAML text from which ``parse`` restores the same instances, except secrets, which are never written."""
    return yaml.safe_dump(to_dict(instances), sort_keys=False, allow_unicode=True, width=120)


def meanings(instances: Mapping[str, Any]) -> dict[str, str]:
    """The help text of every flag."""
    return {name: flag.metadata.get("help", "") for name, flag in _flags(instances).items()}


def help_text(sections: _Sections) -> str:
    """One block per group: each flag with its type and default, then its help; at most 120 columns."""
    config = _Flag(str, "", {"help": _CONFIG_HELP})
    groups: dict[str, list[str]] = {}
    for name, flag in {CONFIG_FLAG: config, **_flags({key: kind() for key, kind in sections.items()})}.items():
        default = "empty" if flag.default in ("", []) else shown(flag.default).replace("'", "")
        bounds = _bounds(flag)
        head = f"--{name} ({expected(flag.annotation)}{bounds and f', {bounds}'}; default: {default})"
        block = groups.setdefault(name.rpartition(".")[0], [])
        for text, indent in ((head, "  "), (flag.metadata.get("help", ""), "      ")):
            block += textwrap.wrap(text, 120, initial_indent=indent, subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join("\n".join([group or "general", *block, ""]) for group, block in groups.items())


def _flags(instances: Mapping[str, Any]) -> dict[str, _Flag]:
    """Every flag by its full dotted name, with the instances' values as defaults, in field order, groups last."""
    flags: dict[str, _Flag] = {}
    for prefix, instance in instances.items():
        hints = get_type_hints(type(instance))
        values = [(item, getattr(instance, item.name)) for item in dataclasses.fields(instance)]
        for item, value in sorted(values, key=lambda pair: dataclasses.is_dataclass(pair[1])):
            name = f"{prefix}.{item.name}" if prefix else item.name
            inner = {name: _Flag(hints[item.name], value, item.metadata)}
            if dataclasses.is_dataclass(value):
                inner = _flags({name: value})
                if "names" in item.metadata:
                    inner = {f"{name}.{leaf}": inner[f"{name}.{leaf}"] for leaf in item.metadata["names"]}
            if inner.keys() & {*flags, CONFIG_FLAG}:
                raise TypeError(f"{type(instance).__name__}: the flag --{name} exists already")
            flags |= inner
    return flags


def _replaced(instance: Any, prefix: str, values: Mapping[str, Any]) -> Any:
    """A copy of the instance with these values; also works for frozen dataclasses."""
    changes = {}
    for item in dataclasses.fields(instance):
        name, value = f"{prefix}.{item.name}" if prefix else item.name, getattr(instance, item.name)
        group = dataclasses.is_dataclass(value)
        changes[item.name] = _replaced(value, name, values) if group else values.get(name, value)
    return dataclasses.replace(instance, **changes)


def _words(argv: Sequence[str]) -> _Words:
    """Each flag with the texts up to the next flag; texts before the first flag come first, under the name ""."""
    words: _Words = [("", [])]
    for word in argv:
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            words.append((name, [text] if equals else []))
        else:
            words[-1][1].append(word)
    return words


def _read(words: _Words) -> tuple[_Entries, list[str]]:
    """(name, raw value (see ``_plain``) and origin of each key in the file of --config; problems of the file)"""
    path = next((texts[0] for name, texts in words if name == CONFIG_FLAG and texts), None)
    if path is None:
        return [], []
    recipe = RECIPES / f"{path}.yaml"
    path = str(recipe) if recipe.is_file() and not Path(path).exists() else path
    try:
        root = yaml_files.compose(Path(path))
    except ValueError as error:
        return [], [str(error)]
    if not isinstance(root, yaml.MappingNode):
        return [], [f"{path} is not a mapping of keys to values"]
    entries: _Entries = []
    problems: list[str] = []
    origins: dict[str, str] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        for key, value in node.value:
            name = prefix + (key.value if isinstance(key, yaml.ScalarNode) else "?")  # a list as key matches no flag
            origin = f"{path}:{key.start_mark.line + 1}"
            if name in origins:  # "adam:" twice, or "adam.lr:" next to "adam:" with "lr:"
                problems.append(f"--{name} is a duplicate key, first in {origins[name]} ({origin})")
                continue
            origins[name] = origin
            if isinstance(value, yaml.MappingNode) and value.value:
                walk(value, f"{name}.")
            else:
                entries.append((name, _plain(value), origin))

    walk(root, "")
    return entries, problems


def _plain(node: yaml.Node) -> Any:
    """Text, None for null, a list, or an empty dict for a mapping."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return {} if isinstance(node, yaml.MappingNode) else None if node.tag == yaml_files.NULL_TAG else node.value


def _bounds(flag: _Flag) -> str:
    """The range of a setting in words; empty if any number is accepted."""
    text = str(flag.metadata.get("range", Range()))
    return f"{text} each" if text and get_origin(flag.annotation) in (list, tuple) else text


def _suggestion(name: str, flags: list[str]) -> str:
    """The closest flag by full name or last component, as the end of an error message; empty if none is close."""
    if len(name) > 100:  # not a typing error, and slow to compare
        return ""
    last = {flag: flag.rpartition(".")[2] for flag in (name, *flags)}

    def nearness(flag: str) -> tuple[float, float]:
        full = difflib.SequenceMatcher(None, re.sub(r"[.-]", "_", name), flag.replace(".", "_")).ratio()
        component = difflib.SequenceMatcher(None, last[name], last[flag]).ratio()
        return max(full, 0.95 * component, 0.9 * last[flag].startswith(last[name])), full

    nearest = max(sorted(flags), key=nearness)
    if nearness(nearest)[0] < 0.65:
        return ""
    # "--lr" may mean --adam.lr or --seed.lr: the user decides.
    also = [f"--{flag}" for flag in last if flag not in (name, nearest) and last[flag] == last[nearest] == name]
    return f"; did you mean --{nearest}?" + (f" (or {', '.join(also)})" if also else "")
