"""Algorithms: built-ins, entry points of the group ``openrlhf_sgpo.algorithms``, or ``module:Class``."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias, cast

from openrlhf_sgpo.algorithms.base import Algorithm, PairAlgorithm
from openrlhf_sgpo.algorithms.plays import PlayAlgorithm
from openrlhf_sgpo.registry import Registry

AlgorithmType: TypeAlias = type[PairAlgorithm] | type[PlayAlgorithm]
ENTRY_POINT_GROUP = "openrlhf_sgpo.algorithms"

BUILT_INS = {
    "dpo": "openrlhf_sgpo.algorithms.dpo:DPO",
    "ipo": "openrlhf_sgpo.algorithms.ipo:IPO",
    "cdpo": "openrlhf_sgpo.algorithms.cdpo:CDPO",
    "rdpo": "openrlhf_sgpo.algorithms.rdpo:RDPO",
    "ropo": "openrlhf_sgpo.algorithms.ropo:ROPO",
    "sym_po": "openrlhf_sgpo.algorithms.sym_po:SymPO",
    "dr_dpo": "openrlhf_sgpo.algorithms.dr_dpo:DrDPO",
    "kl_dpo": "openrlhf_sgpo.algorithms.kl_dpo:KLDPO",
    "w_dpo": "openrlhf_sgpo.algorithms.w_dpo:WDPO",
    "sgpo": "openrlhf_sgpo.algorithms.sgpo:SGPO",
    "sgpo_best": "openrlhf_sgpo.algorithms.sgpo_best:SGPOBest",
    "sgpo_transport": "openrlhf_sgpo.algorithms.sgpo_transport:SGPOTransport",
    "sgpo_released": "openrlhf_sgpo.algorithms.sgpo_released:SGPOReleased",
    "spa": "openrlhf_sgpo.algorithms.spa:SPA",
    "iter_dpo": "openrlhf_sgpo.algorithms.iter_dpo:IterDPO",
    "preference_model": "openrlhf_sgpo.algorithms.preference_model:PreferenceModel",
    "slhf": "openrlhf_sgpo.algorithms.slhf:SLHF",
    "nash_md": "openrlhf_sgpo.algorithms.nash_md:NashMD",
    "online_dpo": "openrlhf_sgpo.algorithms.online_dpo:OnlineDPO",
    "xpo": "openrlhf_sgpo.algorithms.xpo:XPO",
    "online_ipo": "openrlhf_sgpo.algorithms.online_ipo:OnlineIPO",
    "egpo": "openrlhf_sgpo.algorithms.egpo:EGPO",
    "ipo_md": "openrlhf_sgpo.algorithms.ipo_md:IPOMD",
    "rloo": "openrlhf_sgpo.algorithms.rloo:RLOO",
    "sppo": "openrlhf_sgpo.algorithms.sppo:SPPO",
    "inpo": "openrlhf_sgpo.algorithms.inpo:INPO",
    "comal": "openrlhf_sgpo.algorithms.comal:COMAL",
}


def _complaint(algorithm: type[Algorithm]) -> str | None:
    if not issubclass(algorithm, (PairAlgorithm, PlayAlgorithm)):
        return "it must derive from PairAlgorithm or from PlayAlgorithm, the two kinds of Algorithm"
    if not (isinstance(algorithm.settings, type) and dataclasses.is_dataclass(algorithm.settings)):
        return "its attribute 'settings' must be a dataclass type"
    for item in dataclasses.fields(algorithm.settings):
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            return f"its setting {item.name!r} needs a default"
    return None


_registry = Registry("algorithm", ENTRY_POINT_GROUP, BUILT_INS, Algorithm, _complaint)
names, origin = _registry.names, _registry.origin


def get(name: str) -> AlgorithmType:
    """The algorithm of a registered name or a ``module:Class``. Raises ValueError as ``Registry.get`` does."""
    return cast(AlgorithmType, _registry.get(name))  # _complaint has seen to it


__all__ = [
    *("BUILT_INS", "ENTRY_POINT_GROUP", "Algorithm", "AlgorithmType", "PairAlgorithm", "PlayAlgorithm"),
    *("get", "names", "origin"),
]
