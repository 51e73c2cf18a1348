"""Preference pairs and prompts: reading, inspecting and tokenizing them, and selecting a seed."""

from openrlhf_sgpo.data.files import DataError
from openrlhf_sgpo.data.records import Pair, Prompt, load_pairs, load_prompts

__all__ = ["DataError", "Pair", "Prompt", "load_pairs", "load_prompts"]
