"""Log-probabilities of responses, in two layouts that give the same numbers.

``padded`` is OpenRLHF's own forward: one right-padded row per response, logits at every position. Packed, all prompts and
responses are one row without padding, each prompt once and its responses behind it (``packed/``), and logits are neither
computed where no response token is predicted nor kept. An actor knows which of the two it is, by ``actor.head``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.packed.head import Head, in_chunks, log_probs_from, log_softmax_at
from openrlhf_sgpo.training.packing import pack, padded_rows

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf import Actor

# Largest difference per token of log-probabilities that the two layouts may have, by bytes of a weight.
_TOLERANCE = {2: 0.2, 4: 2e-3, 8: 2e-3}


def implicit_margins(
    policy: Sequence[tuple[float, ...]], reference: Sequence[tuple[float, ...]], beta: float
) -> Tensor:
    """beta * [(log-ratio of chosen) - (log-ratio of rejected)], shape (pairs,), float64, from summed log-probabilities."""
    ratio = torch.tensor(policy, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    return beta * (ratio[:, 0] - ratio[:, 1])


class _Identity:
    """The head of a padded forward, whose states are logits already."""

    is_shared = False

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def __call__(self, states: Tensor) -> Tensor:
        return states

    def log_probs(self, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        return in_chunks(partial(log_probs_from, self, temperature), (self,), states, targets)


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at the T positions before response tokens. states (T, ...): whatever ``head`` makes logits of, in
    float32; targets (T,): the tokens that follow; response_of (T,): the response that each belongs to, out of
    ``responses``."""

    states: Tensor
    head: Head | _Identity
    targets: Tensor
    response_of: Tensor
    responses: int

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """Of the response tokens (T,), in the distributions that sampling at this temperature draws from."""
        return self.head.log_probs(self.states, self.targets, temperature)

    def sums(self, per_token: Tensor) -> Tensor:
        """Per-token figures (T,) summed by response, shape (responses,)."""
        return per_token.new_zeros(self.responses).index_add(0, self.response_of, per_token)

    def rows(self, per_token: Tensor) -> Tensor:
        """Per-token figures (T,) as one row per response, shape (responses, longest response), 0 behind its end."""
        counts = self.response_of.bincount(minlength=self.responses)
        within = torch.arange(len(per_token), device=counts.device) - (counts.cumsum(0) - counts)[self.response_of]
        rows = per_token.new_zeros(self.responses, int(counts.max()))
        return rows.index_put((self.response_of, within), per_token)


def figures_of(actor: Actor, groups: list[Group], pad_token_id: int, figures: Callable[[Predictions], Any]) -> Any:
    """What ``figures`` makes of the model's predictions of the responses, in the order of ``groups``: a tensor, or a tuple of
    them, with gradient. It is called within the model's forward pass.

    The actor must be prepared by the strategy; its device is used.
    """
    device = next(actor.parameters()).device
    if actor.head is None:
        tokens, attention, is_response = padded_rows(groups, pad_token_id)
        output = actor(
            tokens.to(device), attention_mask=attention.to(device), return_output=True, allgather_logits=True
        )
        rows, columns = is_response.nonzero(as_tuple=True)
        values = output["logits"][rows.to(device), columns.to(device) - 1]
        head, targets = _Identity(values.shape[-1]), tokens[rows, columns].to(device)
        return figures(Predictions(values, head, targets, rows.to(device), len(tokens)))
    if not actor.head.checked:
        _check(actor, pad_token_id)
    packing = pack(groups, device)
    shared = packing.targets, packing.response_of, packing.responses
    return actor.model(packing=packing, figures=lambda states: figures(Predictions(states, actor.head, *shared)))


def predictions(actor: Actor, groups: list[Group], pad_token_id: int) -> Predictions:
    """Those of a frozen model, for figures of two models."""
    kept: list[Predictions] = []

    def keep(predicted: Predictions) -> Tensor:
        kept.append(predicted)
        return predicted.states

    with torch.no_grad():
        figures_of(actor, groups, pad_token_id, keep)
    return kept[0]


def response_log_probs(actor: Actor, groups: list[Group], pad_token_id: int) -> Tensor:
    """Sum of log-probabilities over the tokens of each response, shape (total responses,), in the order of ``groups``.

    The actor must be prepared by the strategy; its device is used. float32 whatever the model's dtype.
    """
    if actor.head is not None:
        return figures_of(actor, groups, pad_token_id, lambda predicted: predicted.sums(predicted.log_probs()))
    device = next(actor.parameters()).device
    tokens, attention, is_response = padded_rows(groups, pad_token_id)
    log_probs = actor(tokens.to(device), attention_mask=attention.to(device), return_logprobs=True)
    # Column t of log_probs belongs to token t + 1.
    return (log_probs * is_response[:, 1:].to(device)).sum(-1)


@torch.no_grad()
def extrapolated_log_probs(policy: Predictions, reference: Predictions, extrapolation: float) -> Tensor:
    """Log-probabilities of the responses, shape (responses,), detached, under the logits

        (1 + lambda) * policy - lambda * reference,    lambda = ``extrapolation``,

    token by token (the de-coupled noise detection of SPA, arXiv 2406.04412). 0 gives those of the policy.
    """

    def extrapolated(of_policy: Tensor, of_reference: Tensor, targets: Tensor) -> Tensor:
        values = policy.head(of_policy)
        return log_softmax_at(values + extrapolation * (values - reference.head(of_reference)), targets)

    return policy.sums(
        in_chunks(extrapolated, (policy.head, reference.head), policy.states, reference.states, policy.targets)
    )


def sequence_divergence(policy: Predictions, reference: Predictions) -> Tensor:
    """KL(policy || reference) of each response's tokens, shape (responses,), in nats: the divergence of the two
    next-token distributions over the whole vocabulary, summed along the response."""
    return policy.sums(token_divergence(policy, reference))


def token_divergence(policy: Predictions, reference: Predictions, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) of the next-token distributions over the whole vocabulary, in nats, shape (T,)."""

    def divergence(of_policy: Tensor, of_reference: Tensor) -> Tensor:
        log_p = (policy.head(of_policy) / temperature).log_softmax(-1)
        log_q = (reference.head(of_reference) / temperature).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    return in_chunks(divergence, (policy.head, reference.head), policy.states, reference.states)


def _check(actor: Actor, pad_token_id: int) -> None:
    """Compares both layouts on a few tokens, once for each model in memory: one that does more in its forward than is known
    here must not be packed. Collective with ZeRO-3. Raises ValueError."""
    actor.head.checked = True
    size = actor.head.vocabulary
    prompt, *responses = (tuple(token % size for token in tokens) for tokens in ((11, 7, 5), (3, 2), (13, 17, 19)))
    training = actor.training
    actor.eval()
    with torch.no_grad():
        groups = [Group(prompt, (*responses,)), Group(responses[1], (prompt,))]
        packed = response_log_probs(actor, groups, pad_token_id)
        actor.head, head = None, actor.head
        padded = response_log_probs(actor, groups, pad_token_id)
        actor.head = head
    actor.train(training)
    difference = (packed - padded).abs().max().item() / 3
    if not difference <= _TOLERANCE[next(actor.parameters()).element_size()]:
        raise ValueError(
            f"--train.layout auto does not fit this model, whose log-probabilities it changes by {difference:.3g} nats per "
            "token: use padded"
        )
