"""Which algorithms exist, and how a name becomes a class.

An algorithm is a built-in, an entry point of the group ``openrlhf_sgpo.algorithms`` that another package declares, or a
``module:Class`` given directly. Nothing is imported before it is asked for: an algorithm's file may be heavy.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata

from openrlhf_sgpo.algorithms.base import Algorithm

ENTRY_POINT_GROUP = "openrlhf_sgpo.algorithms"

BUILT_INS = {
    "dpo": "openrlhf_sgpo.algorithms.dpo:DPO",
    "ipo": "openrlhf_sgpo.algorithms.ipo:IPO",
    "cdpo": "openrlhf_sgpo.algorithms.cdpo:CDPO",
    "rdpo": "openrlhf_sgpo.algorithms.rdpo:RDPO",
    "sgpo": "openrlhf_sgpo.algorithms.sgpo:SGPO",
    "spa": "openrlhf_sgpo.algorithms.spa:SPA",
    "iter_dpo": "openrlhf_sgpo.algorithms.iter_dpo:IterDPO",
}


def names() -> list[str]:
    """Registered names: the built-ins, then the entry points in alphabetical order."""
    found = {entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    return [*BUILT_INS, *sorted(found - BUILT_INS.keys())]


def origin(name: str) -> str:
    """Where a registered name comes from: ``built in``, or the distributions whose entry points claim it."""
    return " and ".join(dict.fromkeys(_claims(name).values())) or "not registered"


def get(name: str) -> type[Algorithm]:
    """The algorithm class behind a registered name or a ``module:Class``.

    Raises ValueError, naming the culprit, if the name is unknown or claimed twice (an entry point never shadows a
    built-in), if the module cannot be imported or lacks the class, or if the class is no usable ``Algorithm``.
    """
    if ":" in name:
        return _load(name)
    claims = _claims(name)
    if not claims:
        close = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ";"
        raise ValueError(f"unknown algorithm {name!r}{hint} known: {', '.join(names())}, or give module:Class")
    if len(claims) > 1:
        both = " and ".join(f"{target} ({source})" for target, source in claims.items())
        raise ValueError(f"algorithm {name!r} is claimed by {both}; uninstall one, or give module:Class")
    target = next(iter(claims))
    algorithm = _load(target)
    if algorithm.name != name:
        raise ValueError(f"algorithm {name!r}: {target} calls itself {algorithm.name!r}; the two names must agree")
    return algorithm


def _claims(name: str) -> dict[str, str]:
    """Where each claim to a name comes from, by its target: packages may well list the same class twice."""
    claims = {BUILT_INS[name]: "built in"} if name in BUILT_INS else {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=name):
        source = entry.dist.name if entry.dist is not None else "an unnamed distribution"
        claims.setdefault(f"{entry.module}:{entry.attr}", f"entry point of {source}")
    return claims


def _load(target: str) -> type[Algorithm]:
    """Imports ``module:Class``; raises ValueError if that yields no usable algorithm."""
    module_name, _, class_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # an algorithm's file is foreign code: whatever it raises, the user must learn which
        raise ValueError(
            f"algorithm {target!r}: cannot import module {module_name!r} ({type(error).__name__}: {error})"
        ) from error
    algorithm = getattr(module, class_name, None)
    if algorithm is None:
        raise ValueError(f"algorithm {target!r}: module {module_name!r} has no class {class_name!r}")
    derived = isinstance(algorithm, type) and issubclass(algorithm, Algorithm)
    if not derived:
        raise ValueError(f"algorithm {target!r}: {class_name!r} is not a subclass of {Algorithm.__module__}.Algorithm")
    # The name is also the group of the algorithm's flags, so a dot or a dash would make them unreachable.
    name = getattr(algorithm, "name", None)
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"algorithm {target!r}: its attribute 'name' must be an identifier, it is {name!r}")
    if not (isinstance(algorithm.settings, type) and dataclasses.is_dataclass(algorithm.settings)):
        raise ValueError(f"algorithm {target!r}: its attribute 'settings' must be a dataclass type")
    for item in dataclasses.fields(algorithm.settings):
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ValueError(f"algorithm {target!r}: its setting {item.name!r} needs a default")
    return algorithm


__all__ = ["BUILT_INS", "ENTRY_POINT_GROUP", "Algorithm", "get", "names", "origin"]
