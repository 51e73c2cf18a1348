"""Prompt embeddings for farthest-point seed selection."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from openrlhf_sgpo import ranks
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.memory import release_memory
from openrlhf_sgpo.openrlhf import DeepspeedStrategy, load_actor
from openrlhf_sgpo.output import Progress


@torch.no_grad()
def prompt_embeddings(
    model: str, prompts: list[tuple[int, ...]], config: Config, strategy: DeepspeedStrategy
) -> Tensor:
    """Last layer's hidden state at the last token of each prompt, shape (N, hidden), float32 on the CPU.

    (Appendix of arXiv 2502.18099: the SFT model's last token, last layer.) Collective: prompts are dealt to the ranks.
    """
    world, rank = distributed.get_world_size(), distributed.get_rank()
    # ZeRO-3 gathers parameters collectively: every rank must run the same number of forwards.
    share = -(-len(prompts) // world)
    dealt = [prompts[index % len(prompts)] for index in range(rank * share, (rank + 1) * share)]
    actor = strategy.prepare(load_actor(model, config, strategy, trainable=False))
    actor.eval()
    device = next(actor.parameters()).device
    rows = []
    for prompt in Progress(dealt, desc="seed: embed prompts", unit="prompt", disable=not strategy.is_rank_0()):
        tokens = torch.tensor([prompt], device=device)
        output = actor.model(tokens, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        rows.append(output.hidden_states[-1][0, -1].float().cpu())
    actor.model.destroy()
    del actor, output
    release_memory()
    return torch.cat(ranks.gather(torch.stack(rows)))[: len(prompts)]
