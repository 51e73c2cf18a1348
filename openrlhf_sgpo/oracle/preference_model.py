"""A pairwise model trained with ``--algo preference_model`` as preference oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.data.pairwise import LETTERS, fitted
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.oracle.base import Comparison, PreferenceOracle, Resources, sigmoid
from openrlhf_sgpo.oracle.reward_model import FLAG, reading_chat, weight_names


class PreferenceModelOracle(PreferenceOracle):
    """q(first, second) = sigmoid(log pi(A | x, first, second) - log pi(B | x, first, second)), with pi the model
    of --reward.model_name_or_path, averaged over both orders. A call is one comparison in one order.

    (The pairwise model of Dong et al., arXiv 2405.07863, and earlier of SLiC-HF, arXiv 2305.10425.)
    """

    name = "preference_model"
    reads: ClassVar[tuple[str, ...]] = (FLAG, "reward.max_len")
    needs_model = "the policy of a run of --algo preference_model"

    def __init__(self, resources: Resources):
        from openrlhf_sgpo import ranks
        from openrlhf_sgpo.training.scoring import Scorer

        super().__init__(resources)
        config = resources.config
        self.model = config.reward.model_name_or_path
        self.chat = ranks.on_rank_0(lambda: reading_chat(self.model, FLAG, config, resources.moment))
        pad = self.chat.tokenizer.pad_token_id
        self.letters = tuple(self.chat.response(letter, True, self.chat.max_len) for letter in LETTERS)
        self.scorer = Scorer(
            config, resources.strategy, pad, resources.folder / "log_probs", resident=resources.resident
        )
        self.scorers = [self.scorer]

    @classmethod
    def check(cls, config: Inference) -> None:
        from transformers import AutoConfig

        from openrlhf_sgpo.openrlhf import value_head

        model, trust = config.reward.model_name_or_path, config.model.trust_remote_code
        fitted([], "", "", reading_chat(model, FLAG, config))
        if f"{value_head(AutoConfig.from_pretrained(model, trust_remote_code=trust))}.weight" in weight_names(model):
            raise ValueError(f"--{FLAG} {model} is a reward model; use --oracle reward_model")

    def compare(self, comparisons: Sequence[Comparison], label: str) -> list[float]:
        groups = []
        for _, prompt, first, second, tools in comparisons:
            messages, _ = fitted(prompt, first.text, second.text, self.chat, tools)
            groups.append(Group(self.chat.prompt(messages), self.letters))
        log_probs = self.scorer.score(self.model, groups, label and f"{label}, preference model")
        self.calls = self.scorer.responses_scored // len(LETTERS)
        return [sigmoid(a - b) for a, b in log_probs]
