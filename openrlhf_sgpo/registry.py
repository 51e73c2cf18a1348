"""Finds classes by name: built-ins, entry points that other packages declare, or ``module:Class``.

Modules are imported only when their class is requested: they may be heavy.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Generic, TypeVar

Base = TypeVar("Base")


def _entry_points() -> Any:
    """``EntryPoints`` of all packages. They are read again only where a folder of ``sys.path`` has changed."""
    folders = filter(os.path.isdir, map(os.path.abspath, sys.path))
    return _read_entry_points(tuple((folder, os.stat(folder).st_mtime_ns) for folder in folders))


@cache
def _read_entry_points(folders: tuple[tuple[str, int], ...]) -> Any:
    return importlib.metadata.entry_points()


class Registry(Generic[Base]):
    """Classes of one kind by name.

    kind: what messages call such a class. group: of entry points. built_ins: ``module:Class`` by name. base: the class that
    all must derive from. complaint: any further problem of a class, or None.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        built_ins: Mapping[str, str],
        base: type[Base],
        complaint: Callable[[type[Base]], str | None] = lambda candidate: None,
    ):
        self.kind = kind
        self.group = group
        self.built_ins = built_ins
        self.base = base
        self.complaint = complaint

    def names(self) -> list[str]:
        """Registered names: the built-ins, then the entry points in alphabetical order."""
        entry_points = {entry.name for entry in _entry_points().select(group=self.group)}
        return [*self.built_ins, *sorted(entry_points - self.built_ins.keys())]

    def origin(self, name: str) -> str:
        """Where a registered name comes from: ``built in``, or the distributions whose entry points claim it."""
        return " and ".join(dict.fromkeys(self._claims(name).values())) or "not registered"

    def get(self, name: str) -> type[Base]:
        """The class of a registered name or a ``module:Class``.

        Raises ValueError, naming the cause, if the name is unknown or claimed twice (an entry point never shadows a
        built-in), if the module cannot be imported or lacks the class, or if the class is unusable.
        """
        if ":" in name:
            return self._load(name)
        claims = self._claims(name)
        if not claims:
            close = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]}?" if close else ";"
            raise ValueError(
                f"unknown {self.kind} {name!r}{hint} known: {', '.join(self.names())}, or give module:Class"
            )
        if len(claims) > 1:
            both = " and ".join(f"{target} ({source})" for target, source in claims.items())
            raise ValueError(f"{self.kind} {name!r} is claimed by {both}; uninstall one, or give module:Class")
        target = next(iter(claims))
        registered: Any = self._load(target)
        if registered.name != name:
            raise ValueError(
                f"{self.kind} {name!r}: {target} calls itself {registered.name!r}; the two names must agree"
            )
        return registered

    def _claims(self, name: str) -> dict[str, str]:
        """The sources that claim a name, by target, because packages may list the same class twice."""
        claims = {self.built_ins[name]: "built in"} if name in self.built_ins else {}
        for entry in _entry_points().select(group=self.group, name=name):
            source = entry.dist.name if entry.dist is not None else "an unnamed distribution"
            claims.setdefault(f"{entry.module}:{entry.attr}", f"entry point of {source}")
        return claims

    def _load(self, target: str) -> type[Base]:
        """Imports ``module:Class``. Raises ValueError if that yields no usable class."""
        start = f"{self.kind} {target!r}:"
        module_name, _, class_name = target.partition(":")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # foreign code may raise anything; the message must name the module
            raise ValueError(
                f"{start} cannot import module {module_name!r} ({type(error).__name__}: {error})"
            ) from error
        loaded = getattr(module, class_name, None)
        if loaded is None:
            raise ValueError(f"{start} module {module_name!r} has no class {class_name!r}")
        if not (isinstance(loaded, type) and issubclass(loaded, self.base)):
            raise ValueError(f"{start} {class_name!r} is not a subclass of {self.base.__module__}.{self.base.__name__}")
        # An algorithm's name is also the group of its flags, which a dot or a dash would make unreachable.
        name = getattr(loaded, "name", None)
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"{start} its attribute 'name' must be an identifier, it is {name!r}")
        complaint = self.complaint(loaded)
        if complaint:
            raise ValueError(f"{start} {complaint}")
        return loaded
