"""Prompt embeddings for farthest-point seed selection."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn.utils.rnn import pad_sequence

from openrlhf_sgpo import ranks
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.memory import release_memory
from openrlhf_sgpo.openrlhf import DeepspeedStrategy, destroy, load_actor
from openrlhf_sgpo.output import Progress

BATCH = 8  # prompts, of similar length


@torch.no_grad()
def prompt_embeddings(
    model: str, prompts: list[tuple[int, ...]], config: Config, strategy: DeepspeedStrategy
) -> Tensor:
    """Last layer's hidden state at the last token of each prompt, shape (N, hidden), float32 on the CPU.

    (Appendix of arXiv 2502.18099: the SFT model's last token, last layer.) Collective: prompts are dealt to the ranks.
    """
    world, rank = distributed.get_world_size(), distributed.get_rank()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    share = batches[rank::world]
    # ZeRO-3 gathers parameters collectively: every rank must run the same number of forwards.
    share += [batches[0]] * (-(-len(batches) // world) - len(share))
    actor = strategy.prepare(load_actor(model, config, strategy, trainable=False))
    actor.eval()
    device = next(actor.parameters()).device
    rows: dict[int, Tensor] = {}
    for batch in Progress(share, desc="seed: embed prompts", unit="batch", disable=not strategy.is_rank_0()):
        lengths = torch.tensor([len(prompts[index]) for index in batch])
        # Right of a prompt's last token, padding is in nobody's past; which token it is makes no difference.
        tokens = pad_sequence([torch.tensor(prompts[index]) for index in batch], batch_first=True).to(device)
        output = actor.model(tokens, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        last = output.hidden_states[-1][torch.arange(len(batch)), lengths - 1].float().cpu()
        rows |= zip(batch, last, strict=True)
    destroy(actor)
    del actor, output
    release_memory()
    gathered = {index: row for part in ranks.gather(rows) for index, row in part.items()}
    return torch.stack([gathered[index] for index in range(len(prompts))])
