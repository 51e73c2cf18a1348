"""Log-probabilities of responses, in two layouts that give the same numbers.

``padded`` is OpenRLHF's own forward: one right-padded row per response, logits at every position. ``shared_prefix`` puts
each prompt once into a single row, all its responses behind it, every response seeing the prompt and itself only; there
is no padding, and logits are computed at the positions that predict response tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from openrlhf_sgpo.data.tokens import Group

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from openrlhf_sgpo.config import Config
    from openrlhf_sgpo.openrlhf import Actor


def check_layout(config: Config, model: PretrainedConfig) -> None:
    """Raises ValueError where one row with a mask of its own would not mean what it means in separate rows."""
    if config.train.layout != "shared_prefix":
        return
    window = getattr(model, "sliding_window", None) if getattr(model, "use_sliding_window", True) else None
    others = set(getattr(model, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others or (window and config.data.max_len > window):
        reason = f"layers of kind {', '.join(sorted(others))}" if others else f"a sliding window of {window} tokens"
        raise ValueError(f"--train.layout shared_prefix does not work with {reason}: use padded")


def implicit_margins(
    policy: Sequence[tuple[float, ...]], reference: Sequence[tuple[float, ...]], beta: float
) -> Tensor:
    """beta * [(log-ratio of chosen) - (log-ratio of rejected)], shape (pairs,), float64, from summed log-probabilities."""
    ratio = torch.tensor(policy, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    return beta * (ratio[:, 0] - ratio[:, 1])


class Logits(NamedTuple):
    """Logits at the T positions that predict response tokens: values (T, vocabulary) in float32, targets (T,) the tokens
    they predict, response_of (T,) the response that each belongs to, out of ``responses``."""

    values: Tensor
    targets: Tensor
    response_of: Tensor
    responses: int

    def log_probs(self, values: Tensor | None = None) -> Tensor:
        """Sum of log-probabilities of each response, shape (responses,), under these or other logits of that shape."""
        values = self.values if values is None else values
        return self.sums(values.gather(-1, self.targets[:, None])[:, 0] - values.logsumexp(-1))

    def sums(self, per_token: Tensor) -> Tensor:
        """Per-token figures (T,) summed by response, shape (responses,)."""
        return per_token.new_zeros(self.responses).index_add(0, self.response_of, per_token)

    def rows(self, per_token: Tensor) -> Tensor:
        """Per-token figures (T,) as one row per response, shape (responses, longest response), 0 behind its end."""
        counts = self.response_of.bincount(minlength=self.responses)
        within = torch.arange(len(per_token), device=counts.device) - (counts.cumsum(0) - counts)[self.response_of]
        rows = per_token.new_zeros(self.responses, int(counts.max()))
        return rows.index_put((self.response_of, within), per_token)


def response_log_probs(actor: Actor, groups: list[Group], layout: str, pad_token_id: int) -> Tensor:
    """Sum of log-probabilities over the tokens of each response, shape (total responses,), in the order of ``groups``.

    The actor must be prepared by the strategy; its device is used. float32 whatever the model's dtype.
    """
    device = next(actor.parameters()).device
    if layout == "shared_prefix":
        return _shared_prefix_logits(actor, groups, device).log_probs()
    tokens, attention, is_response = padded_rows(groups, pad_token_id)
    log_probs = actor(tokens.to(device), attention_mask=attention.to(device), return_logprobs=True)
    # Column t of log_probs belongs to token t + 1.
    return (log_probs * is_response[:, 1:].to(device)).sum(-1)


def response_logits(actor: Actor, groups: list[Group], layout: str, pad_token_id: int) -> Logits:
    """The logits under ``response_log_probs``, for what needs the whole distribution of two models."""
    device = next(actor.parameters()).device
    if layout == "shared_prefix":
        return _shared_prefix_logits(actor, groups, device)
    tokens, attention, is_response = padded_rows(groups, pad_token_id)
    output = actor(tokens.to(device), attention_mask=attention.to(device), return_output=True, allgather_logits=True)
    rows, columns = is_response.nonzero(as_tuple=True)
    values = output["logits"][rows.to(device), columns.to(device) - 1]
    return Logits(values, tokens[rows, columns].to(device), rows.to(device), len(tokens))


def extrapolated_log_probs(policy: Logits, reference: Logits, extrapolation: float) -> Tensor:
    """Log-probabilities of the responses, shape (responses,), detached, under the logits

        (1 + lambda) * policy - lambda * reference,    lambda = ``extrapolation``,

    token by token (the de-coupled noise detection of SPA, arXiv 2406.04412). 0 gives those of the policy.
    """
    values = policy.values.detach()
    return policy.log_probs(values + extrapolation * (values - reference.values)).detach()


def sequence_divergence(policy: Logits, reference: Logits) -> Tensor:
    """KL(policy || reference) of each response's tokens, shape (responses,), in nats: the divergence of the two
    next-token distributions over the whole vocabulary, summed along the response."""
    return policy.sums(token_divergence(policy, reference))


def token_log_probs(logits: Logits, temperature: float) -> Tensor:
    """Log-probabilities of the response tokens (T,) in the distributions that sampling at this temperature draws from."""
    values = logits.values / temperature
    return values.gather(-1, logits.targets[:, None])[:, 0] - values.logsumexp(-1)


def token_divergence(policy: Logits, reference: Logits, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) of the next-token distributions over the whole vocabulary, in nats, shape (T,)."""
    log_p, log_q = ((logits.values / temperature).log_softmax(-1) for logits in (policy, reference))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def padded_rows(groups: list[Group], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and response mask, one right-padded row per response."""
    rows = [(group.prompt, response) for group in groups for response in group.responses]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    attention = torch.zeros((len(rows), length), dtype=torch.long)
    is_response = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        attention[row, :end] = 1
        is_response[row, len(prompt) : end] = True
    return tokens, attention, is_response


def _shared_prefix_logits(actor: Actor, groups: list[Group], device: torch.device) -> Logits:
    tokens: list[int] = []
    positions: list[int] = []
    owners: list[tuple[int, int]] = []  # (group, 0 for the prompt or 1 + response)
    predictors: list[int] = []  # row position whose logits predict a response token ...
    targets: list[int] = []  # ... and that token ...
    response_of: list[int] = []  # ... and the response it belongs to
    responses = 0
    for number, group in enumerate(groups):
        start, prompt_length = len(tokens), len(group.prompt)
        tokens += group.prompt
        positions += range(prompt_length)
        owners += [(number, 0)] * prompt_length
        for part, response in enumerate(group.responses, start=1):
            first = len(tokens)
            tokens += response
            positions += range(prompt_length, prompt_length + len(response))
            owners += [(number, part)] * len(response)
            predictors += [start + prompt_length - 1, *range(first, first + len(response) - 1)]
            targets += response
            response_of += [responses] * len(response)
            responses += 1
    group_of, part_of = torch.tensor(owners, device=device).T
    row = torch.arange(len(tokens), device=device)
    visible = (group_of[:, None] == group_of) & (row[:, None] >= row) & ((part_of == 0) | (part_of[:, None] == part_of))
    output = actor.model(
        torch.tensor([tokens], device=device),
        attention_mask=_attention_mask(visible, actor),
        position_ids=torch.tensor([positions], device=device),
        logits_to_keep=torch.tensor(predictors, device=device),
        use_cache=False,
    )
    logits = output["logits"][0].float()
    if len(logits) != len(targets):
        raise ValueError("this model ignores logits_to_keep, which --train.layout shared_prefix needs: use padded")
    return Logits(logits, torch.tensor(targets, device=device), torch.tensor(response_of, device=device), responses)


def _attention_mask(visible: Tensor, actor: Actor) -> Tensor:
    """The (1, 1, T, T) mask in the form the model's attention takes: booleans for sdpa, added logits for eager."""
    module: Any = actor.model
    model_config = getattr(module, "module", module).config
    if model_config._attn_implementation == "sdpa":
        return visible[None, None]
    dtype = next(actor.parameters()).dtype
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)[
        None, None
    ]
