"""Where batches come from: stored pairs, or fresh answers."""

from openrlhf_sgpo.sources.base import Source
from openrlhf_sgpo.sources.fresh_answers import FreshAnswers
from openrlhf_sgpo.sources.stored_pairs import StoredPairs

__all__ = ["FreshAnswers", "Source", "StoredPairs"]
