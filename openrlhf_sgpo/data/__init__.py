"""Preference pairs and prompts: reading them, choosing a seed among them, turning them into tokens."""

from openrlhf_sgpo.data.records import DataError, Pair, Prompt, load_pairs, load_prompts

__all__ = ["DataError", "Pair", "Prompt", "load_pairs", "load_prompts"]
