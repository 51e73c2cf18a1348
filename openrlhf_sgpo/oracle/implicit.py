"""A policy's implicit reward as preference oracle; in self-annotated rounds, that of the policy that answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.data.tokens import ChatFormat, Group, load_chat, load_tokenizer
from openrlhf_sgpo.oracle.base import Question, Resources, RewardOracle


def implicit_rewards(policy: Sequence[float], reference: Sequence[float], beta: float) -> list[float]:
    """beta * [log pi(y|x) - log pi_ref(y|x)] for each response to one prompt, from summed log-probabilities.

    (Rafailov et al., arXiv 2305.18290, eq. 5 without the prompt's constant; Kim et al., SPA, ICLR 2025.)
    """
    return [beta * (p - r) for p, r in zip(policy, reference, strict=True)]


class ImplicitReward(RewardOracle):
    """The reward of ``policy`` (a model folder) against ``reference``.

    If neither is given, it is frozen: --reward.model_name_or_path against --ref.model_name_or_path.
    A call is one answer scored by the policy.
    """

    name = "implicit"
    reads: ClassVar[tuple[str, ...]] = ("reward.model_name_or_path",)
    needs_model = "the policy whose implicit reward ranks answers, such as round_0/policy of a run of --algo dpo"

    def __init__(self, resources: Resources, policy: str = "", reference: str = ""):
        super().__init__(resources)
        config = resources.config
        self.chat = resources.chat
        self.policy = policy or config.reward.model_name_or_path
        self.reference = reference or config.ref.model_name_or_path
        self.beta = config.model.beta
        self.scorer = resources.scorer
        if resources.resident:
            from openrlhf_sgpo.training.scoring import Scorer

            shared = resources.scorer
            self.scorer = Scorer(config, shared.strategy, shared.pad_token_id, shared.folder, resident=True)
            self.scorers = [self.scorer]

    @classmethod
    def check(cls, config: Inference) -> None:
        trust = config.model.trust_remote_code
        folders = {"model": config.model.model_name_or_path, "reward": config.reward.model_name_or_path}
        tokenizers = {
            group: load_tokenizer(folder, trust, f"{group}.model_name_or_path") for group, folder in folders.items()
        }
        if tokenizers["model"].get_vocab() != tokenizers["reward"].get_vocab():
            raise ValueError(
                f"--reward.model_name_or_path {folders['reward']} does not have the vocabulary of --model.model_name_or_path "
                f"{folders['model']}; --oracle implicit needs a policy that was trained from that model"
            )
        load_chat(folders["reward"], trust, "reward.model_name_or_path", config.data.max_len)

    def scores(self, questions: Sequence[Question], label: str) -> list[list[float]]:
        groups = [as_group(question, self.chat) for question in questions]
        before = self.scorer.responses_scored
        policy = self.scorer.score(self.policy, groups, label and f"{label}, policy")
        self.calls += self.scorer.responses_scored - before
        reference = self.scorer.score(self.reference, groups, label and f"{label}, reference")
        return [implicit_rewards(p, r, self.beta) for p, r in zip(policy, reference, strict=True)]


def as_group(question: Question, chat: ChatFormat) -> Group:
    """Tokens of a question and its answers: as sampled, or tokenised from text written by people. For an empty answer the end
    of turn is scored."""
    prompt = chat.prompt(question.prompt, question.template_kwargs)
    room = chat.max_len - len(prompt)
    responses = (
        answer.token_ids[:room] or chat.response(answer.text, answer.truncated, room) for answer in question.answers
    )
    return Group(prompt, tuple(response or chat.end_of_turn for response in responses))
