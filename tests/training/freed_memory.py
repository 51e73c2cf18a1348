"""Scores and trains a model again and again in the ranks that run this; says what of it is left in memory."""

from __future__ import annotations

import gc
import json
import sys
import weakref

import deepspeed  # noqa: F401 - before what is loaded is counted as there for good
import torch

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.data.tokens import Group
from openrlhf_sgpo.memory import release_memory
from openrlhf_sgpo.openrlhf import build_strategy, destroy
from openrlhf_sgpo.training import scoring
from openrlhf_sgpo.training.policies import load_trained
from openrlhf_sgpo.training.scoring import Scorer

scoring.fits_whole = lambda *_: False
ROWS = torch.arange(40).view(2, 20) + 3


class Watched(Scorer):
    """A scorer that remembers its models, weakly. They are in shards, because whole ones are freed in another way."""

    def _prepared(self, model):
        actor = super()._prepared(model)
        self.models = [*getattr(self, "models", []), weakref.ref(actor.model.module)]
        return actor


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def trained(folder: str, config: Config, strategy) -> tuple[int, weakref.ref]:
    actor, optimizer, scheduler = load_trained(folder, config, strategy, 1e-4, 10, "freed")
    for _ in range(2 * strategy.accumulated_gradient):
        log_probs = actor(ROWS, attention_mask=torch.ones_like(ROWS), return_logprobs=True)
        strategy.backward(-log_probs.mean(), actor, optimizer)
        strategy.optimizer_step(optimizer, actor, scheduler)
    inside, module = live_bytes(), weakref.ref(actor.model.module)
    destroy(actor)
    del actor, optimizer, scheduler
    release_memory()
    return inside, module


def main(folder: str) -> None:
    for stage, rank in ((0, 0), (2, 0), (3, 0), (3, 4)):
        config = Config()
        config.model.model_name_or_path = config.ref.model_name_or_path = folder
        config.train.batch_size, config.train.micro_batch_size = 4, 1
        config.ds.zero_stage, config.ds.param_dtype, config.ds.lora.rank = stage, "fp32", rank
        strategy = build_strategy(config)
        groups = [Group((1, 5, 9), ((7, number),)) for number in range(8)]
        left, models = [], []
        for _ in range(3):
            scorer = Watched(config, strategy, 0)
            scorer.score(folder, groups, "")
            inside, module = trained(folder, config, strategy)
            models += [module, *scorer.models]
            del scorer
            left.append(live_bytes())
        alive = sum(model() is not None for model in models)
        report = {"stage": stage, "lora": rank, "inside": inside, "left": left, "alive": alive, "models": len(models)}
        print(json.dumps(report), flush=True)


gc.freeze()  # nor searched, again and again
main(sys.argv[1])
