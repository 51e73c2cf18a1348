"""Versions of installed packages against those that this package was tested with, as its metadata has them."""

from __future__ import annotations

import re
from importlib import metadata

from openrlhf_sgpo import extras
from openrlhf_sgpo.doctor.checks import Diagnosis

NAME = "openrlhf_sgpo"
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*?)\s*(?:;\s*(.*))?$")


def pinned_versions(extra: str) -> dict[str, str]:
    """Pinned versions by distribution, of the requirements in setup.py and of its extra; empty if this package is not
    installed."""
    try:
        requirements = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        return {}
    pins = {}
    for text in [*requirements, f"{extras.OPENRLHF}; extra == '{extra}'"]:
        match = _REQUIREMENT.match(text)
        marker = match[3] if match else None
        if match and match[2].startswith("==") and (marker is None or marker in _markers(extra)):
            pins[match[1]] = match[2].removeprefix("==")
    return pins


def _markers(extra: str) -> tuple[str, str]:
    return f'extra == "{extra}"', f"extra == '{extra}'"


def installed(name: str) -> str | None:
    """The version of a distribution without its local part, such as +cpu; None if it is absent or damaged."""
    try:
        return (metadata.version(name) or "").partition("+")[0] or None
    except (metadata.PackageNotFoundError, KeyError, ValueError):
        return None


def version_checks(extra: str) -> list[Diagnosis]:
    """A check per pinned package. extra: gpu or cpu, whichever this machine needs."""
    pins = pinned_versions(extra)
    if not pins:
        detail = "it is not installed, so that its requirements are not known"
        return [Diagnosis("packages", NAME, "note", detail, "pip install --no-deps -e . (in its checkout)")]
    checks = []
    for name, version in pins.items():
        present = installed(name)
        whole = f"{name}=={version}"
        if present == version:
            checks.append(Diagnosis("packages", name, "ok", version))
        elif present is None:
            mend = extras.install(name.replace("-", "_"), extras.training(extra))
            checks.append(Diagnosis("packages", name, "fails", f"not installed, {version} is tested", mend))
        else:
            mend = f"pip install --no-deps {whole}"
            checks.append(Diagnosis("packages", name, "note", f"{present}, tested is {version}", mend))
    return checks
