"""Draw docs/figures/worst_case.svg: margins, what the follower moves, and the loss that the leader then minimises.

python docs/figures/worst_case.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch

from openrlhf_sgpo import solve_worst_case

RADIUS = 0.4
BLUE, RED, GREY = "#2f6db3", "#c8452f", "#8a8a8a"


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "worst_case"  # the same file every time
    margins = 0.5 + 0.8 * torch.randn(600, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    worst = solve_worst_case(margins, RADIUS)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)

    bins = torch.linspace(worst.edge - 0.1, float(margins.max()) + 0.1, 45).tolist()
    stays = [margins.tolist(), [worst.edge]]
    masses = [(1 - worst.moved).tolist(), [float(worst.moved.sum())]]
    left.hist(margins.tolist(), bins=bins, color=GREY, alpha=0.35, label="margins of the round")
    left.hist(stays, bins=bins, weights=masses, stacked=True, color=[BLUE, RED], histtype="step", linewidth=1.6)
    left.axvline(worst.threshold, color="black", linestyle=":", label="threshold")
    left.plot([], [], color=BLUE, label="stays")
    left.plot([], [], color=RED, label=f"moved to the edge ({worst.fraction_moved:.0%})")
    left.set(xlabel="margin", ylabel="pairs", title=f"The follower, radius {RADIUS}")
    left.legend(frameon=False, fontsize=8)

    grid = torch.linspace(worst.edge - 0.3, 3, 400, dtype=torch.float64)
    right.plot(grid, torch.nn.functional.softplus(-grid), color=GREY, label="DPO: -log sigmoid")
    right.plot(grid, worst.robust_loss(grid), color=RED, label="SGPO")
    right.axvline(worst.threshold, color="black", linestyle=":")
    right.axvline(worst.edge, color="black", linewidth=0.6)
    right.annotate("edge", (worst.edge, 0.1), fontsize=8)
    right.annotate("threshold", (worst.threshold, 0.1), fontsize=8)
    right.set(xlabel="margin", ylabel="loss of a pair", title="The leader")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
