"""Preference pairs and prompts: reading and inspecting them, choosing a seed among them, turning them into tokens."""

from openrlhf_sgpo.data.files import DataError
from openrlhf_sgpo.data.records import Pair, Prompt, load_pairs, load_prompts

__all__ = ["DataError", "Pair", "Prompt", "load_pairs", "load_prompts"]
