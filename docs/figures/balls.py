"""Draw docs/figures/balls.svg: the losses that the four balls leave for a pair, and how much a pair counts under each.

python docs/figures/balls.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch

from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.algorithms.kl_ball import tilted_level, tilted_loss
from openrlhf_sgpo.dro import solve_best_case, solve_worst_case

RADIUS, TEMPERATURE, MAX_WEIGHT = 0.4, 1.0, 10.0
BLUE, RED, GREY = "#2f6db3", "#c8452f", "#8a8a8a"


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "balls"  # the same file every time
    margins = 0.5 + 1.2 * torch.randn(600, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = dpo_loss(margins)
    worst, best = solve_worst_case(margins, RADIUS), solve_best_case(margins, RADIUS)
    worst_level, best_level = tilted_level(losses, TEMPERATURE, MAX_WEIGHT), tilted_level(losses, -TEMPERATURE)
    curves = {
        "DPO, no ball": (dpo_loss, GREY, "-"),
        "sgpo: worst case, Wasserstein": (worst.robust_loss, RED, "-"),
        "kl_dpo: worst case, KL": (
            lambda grid: tilted_loss(dpo_loss(grid), worst_level, TEMPERATURE, MAX_WEIGHT),
            RED,
            "--",
        ),
        "sgpo_best: best case, Wasserstein": (best.robust_loss, BLUE, "-"),
        "dr_dpo: best case, KL": (lambda grid: tilted_loss(dpo_loss(grid), best_level, -TEMPERATURE), BLUE, "--"),
    }
    grid = torch.linspace(worst.edge + 0.05, 4, 600, dtype=torch.float64).requires_grad_()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), constrained_layout=True)
    for label, (loss, colour, dashes) in curves.items():
        values = loss(grid)
        (slopes,) = torch.autograd.grad(values.sum(), grid)
        weights = slopes / -torch.sigmoid(-grid.detach())
        left.plot(grid.detach(), values.detach(), color=colour, linestyle=dashes, label=label)
        right.plot(grid.detach(), weights, color=colour, linestyle=dashes)
    left.set(xlabel="margin", ylabel="loss of a pair", title="What is left to minimise", ylim=(-0.3, 6))
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="margin", ylabel="slope, as a multiple of DPO's", title="How much a pair counts", ylim=(0, 4))
    counts = right.twinx()
    counts.hist(margins.tolist(), bins=40, color=GREY, alpha=0.2)
    counts.set(yticks=[], ylim=(0, 200))
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
