"""WDPO: DPO with a penalty on the gradient by the input embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from openrlhf_sgpo.algorithms.base import PairAlgorithm, PairBatch
from openrlhf_sgpo.algorithms.dpo import dpo_loss
from openrlhf_sgpo.flags import setting

if TYPE_CHECKING:
    from torch import Tensor

    from openrlhf_sgpo.config import Config


@dataclass
class WDPOSettings:
    rho: float = setting(1.0, "weight of the squared gradient by the input embeddings (0: DPO)", low=0)


class WDPO(PairAlgorithm):
    r"""A pair's loss, and how fast it changes with the embeddings e of the pair's tokens (Xu et al., WDPO, arXiv 2502.01930,
    as its released code has it, TheBlackCat22/distributionally_robust_dpo):

    min_theta  mean [ l + rho |dl / de|^2 ],        l = -log sigmoid(margin).

    To first order this is max over d of l(e + d) - |d|^2 / (4 rho): an adversary moves the inputs and pays for the squared
    distance, a Wasserstein ball in the space of inputs, not of margins as in ``sgpo``. |.|^2 sums over the tokens of both rows,
    prompt with chosen and prompt with rejected response. Training takes second derivatives of the model: a step costs a
    multiple of DPO's time and memory.
    """

    name = "w_dpo"
    paper = "arXiv 2502.01930"
    summary = "WDPO: DPO with a penalty on the gradient by the input embeddings"
    settings = WDPOSettings
    defaults: ClassVar[dict[str, Any]] = {"ds.attn_implementation": "eager"}
    reads_embeddings: ClassVar[bool] = True

    @classmethod
    def drop_in_problems(cls, options: WDPOSettings) -> list[str]:
        if not options.rho:
            return []
        return [f"--w_dpo.rho {options.rho} needs the input embeddings of the pairs: use openrlhf-sgpo train"]

    def problems(self, config: Config) -> list[str]:
        problems = []
        if config.ds.attn_implementation != "eager":
            problems.append(
                f"--ds.attn_implementation: {config.ds.attn_implementation} cannot be differentiated twice, which --algo w_dpo "
                "needs; use eager"
            )
        if config.ds.zero_stage == 3:
            problems.append(
                "--ds.zero_stage: 3 frees weights that --algo w_dpo needs for second derivatives; use 2 or less"
            )
        return problems

    def loss(self, batch: PairBatch) -> Tensor:
        """Raises ValueError if the batch has no embeddings, unless rho is 0."""
        import torch

        losses = dpo_loss(batch.margins(self.beta))
        if not self.options.rho:
            return losses
        if batch.embeddings is None:
            raise ValueError(
                "--w_dpo.rho needs the input embeddings of the pairs, which this batch does not have; use 0"
            )
        # Rows do not see each other, so the gradient of the sum has that of every pair.
        (gradient,) = torch.autograd.grad(losses.sum(), batch.embeddings, create_graph=True)
        return losses + self.options.rho * gradient.to(losses).square().sum((1, 2)).view(-1, 2).sum(1)
