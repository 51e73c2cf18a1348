"""Preference oracles: built-ins, entry points of the group ``openrlhf_sgpo.oracles``, or ``module:Class``."""

from __future__ import annotations

from openrlhf_sgpo.algorithms.base import Algorithm
from openrlhf_sgpo.config import Config, Inference
from openrlhf_sgpo.oracle.base import Answer, Comparison, Oracle, PreferenceOracle, Question, Resources, RewardOracle
from openrlhf_sgpo.registry import Registry

ENTRY_POINT_GROUP = "openrlhf_sgpo.oracles"

BUILT_INS = {
    "implicit": "openrlhf_sgpo.oracle.implicit:ImplicitReward",
    "reward_model": "openrlhf_sgpo.oracle.reward_model:RewardModel",
    "reward_heads": "openrlhf_sgpo.oracle.reward_heads:RewardHeads",
    "preference_model": "openrlhf_sgpo.oracle.preference_model:PreferenceModelOracle",
    "judge": "openrlhf_sgpo.oracle.judge:Judge",
}

_registry = Registry("oracle", ENTRY_POINT_GROUP, BUILT_INS, Oracle)
names, get = _registry.names, _registry.get


def judges_itself(config: Config, algorithm: type[Algorithm]) -> bool:
    """Whether each round's policy ranks its own answers, so the oracle changes from round to round."""
    return config.oracle == "implicit" and not algorithm.fresh_answers


def problems(name: str, config: Inference) -> list[str]:
    """Problems with --oracle ``name`` and the settings that it reads."""
    try:
        return get(name).problems(config)
    except ValueError as error:
        return [f"--oracle: {error}"]


__all__ = [
    "Answer",
    "Comparison",
    "Oracle",
    "PreferenceOracle",
    "Question",
    "Resources",
    "RewardOracle",
    "get",
    "judges_itself",
    "names",
    "problems",
]
