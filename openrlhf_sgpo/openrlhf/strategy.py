"""OpenRLHF's DeepSpeed strategy, built from this package's settings; on a CPU with the five CUDA calls replaced."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import deepspeed
import openrlhf.utils.deepspeed.deepspeed as upstream
import torch
import transformers
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import parameter_offload, stage3, stage_1_and_2
from deepspeed.runtime.zero.partition_parameters import MultipleAllGatherHandles
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from openrlhf.models import Actor
from openrlhf.utils.deepspeed import DeepspeedStrategy
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from openrlhf_sgpo import ranks
from openrlhf_sgpo.config import Config, Inference
from openrlhf_sgpo.openrlhf.adapters import groups_by_adapter
from openrlhf_sgpo.output import say


def openrlhf_arguments(config: Inference) -> SimpleNamespace:
    """The nested namespace that OpenRLHF 0.11's strategy and DPOTrainer read, with its names.

    This package has its own losses, evaluation, checkpoints and experiment trackers, so OpenRLHF's are switched off.
    """
    space = SimpleNamespace
    arguments = space(
        local_rank=int(os.environ.get("LOCAL_RANK", "-1")),
        optim="adam",
        max_norm=0.0,
        train=space(
            seed=config.train.seed,
            full_determinism_enable=config.train.full_determinism_enable,
            batch_size=config.train.batch_size,
            micro_batch_size=config.train.micro_batch_size,
        ),
        model=space(label_smoothing=0.0, ipo_enable=False, aux_loss_coef=0.0, nll_loss_coef=0.0),
        ds=space(
            zero_stage=config.ds.zero_stage,
            param_dtype=config.ds.param_dtype,
            adam_offload=config.ds.adam_offload,
            packing_samples=config.ds.packing_samples,
            tensor_parallel_size=1,
        ),
        eval=space(steps=-1),
    )
    if isinstance(config, Config):  # only ``train`` has settings of training
        ckpt, logger = config.ckpt, config.logger
        arguments.max_norm = config.max_norm
        arguments.ckpt = space(path=None, save_steps=ckpt.save_steps, max_num=ckpt.max_num, max_mem=int(1e8))
        arguments.logger = space(logging_steps=logger.logging_steps, tensorboard_dir=None, wandb=space(key=None))
    return arguments


class Strategy(DeepspeedStrategy):
    """OpenRLHF's strategy with correct gradient norms, for actors with ``learning_rates`` by LoRA adapter too, and with torch's
    Adam."""

    stage: int  # of ZeRO

    def get_ds_train_config(self, optim_dict: dict | None = None, *, max_norm: float | None = None) -> dict:
        settings = super().get_ds_train_config(optim_dict, max_norm=max_norm)
        if "optimizer" in settings:
            # DeepSpeed compiles its Adam at run time: with the nvcc of torch's CUDA version, or on a CPU with g++, for minutes.
            # Torch's fused one is as fast and comes compiled.
            settings["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
        return settings

    @contextmanager
    def unsharded(self, whole: bool = True) -> Iterator[None]:
        """Within the block models are loaded and prepared whole on every rank, whatever the ZeRO stage. whole: False leaves it
        as it is."""
        stage = self.stage
        self.stage = 0 if whole else stage
        try:
            yield
        finally:
            self.stage = stage

    def _get_model_parameters(self, model: Any, **settings: Any) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
        raw_model, groups = super()._get_model_parameters(model, **settings)
        learning_rates = getattr(model, "learning_rates", None)
        return raw_model, groups_by_adapter(raw_model, groups, learning_rates) if learning_rates else groups

    def _ds_init_train_model(self, model: Any, settings: dict[str, Any]) -> Any:
        prepared, optimizer, scheduler = super()._ds_init_train_model(model, settings)
        scaler: Any = getattr(_engine(prepared).optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # the reader of ``get_grad_norm`` can say where it happened
        return prepared, optimizer, scheduler

    def accumulate(self, loss: torch.Tensor, model: Any, last: bool) -> None:
        """Add the gradient of a micro-batch's share of the mean loss of a step, whose last it may be. OpenRLHF's ``backward``
        divides by a number of micro-batches that is the same in every step."""
        engine = _engine(model)
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss, scale_wrt_gas=False)

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any, name: str = "model", **kwargs: Any) -> None:
        engine = _engine(model)
        if engine.is_gradient_accumulation_boundary() and not hasattr(engine.optimizer, "_global_grad_norm"):
            # At ZeRO 0 in fp32 DeepSpeed keeps no norm.
            engine._global_grad_norm = _norm(engine.module)
        super().optimizer_step(optimizer, model, scheduler, name, **kwargs)

    def get_grad_norm(self, model: Any) -> float | None:
        """Gradient norm of the latest optimiser step before clipping, NaN or infinite if the gradient is not finite. None if
        DeepSpeed skipped the step to lower the loss scale because gradients overflowed in fp16."""
        engine = _engine(model)
        if engine.was_step_applied():
            return float(engine.get_global_grad_norm())
        # At the lowest scale an overflow is not due to the scale.
        return None if engine.fp16_enabled() and engine.optimizer.loss_scale > 1 else math.nan


class CpuDeepspeedStrategy(Strategy):
    """The strategy for gloo and CPU tensors; everything that is not overridden is OpenRLHF's."""

    def get_ds_train_config(self, *args: Any, **settings: Any) -> dict:
        return _gathered_in_turn(super().get_ds_train_config(*args, **settings))

    def get_ds_eval_config(self, *args: Any, **settings: Any) -> dict:
        return _gathered_in_turn(super().get_ds_eval_config(*args, **settings))

    def setup_distributed(self, timeout: timedelta = timedelta(minutes=60)) -> None:
        if self.full_determinism:
            transformers.enable_full_determinism(self.seed)
        else:
            transformers.set_seed(self.seed)
        deepspeed.init_distributed(timeout=timeout)
        self.world_size = distributed.get_world_size()
        self.ds_device_mesh = init_device_mesh("cpu", (self.world_size, 1, 1), mesh_dim_names=("dp", "sp", "tp"))
        self.setup_ring_attn(self.ds_device_mesh)
        self.accumulated_gradient = self.train_batch_size // self.micro_train_batch_size // self.world_size

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        if isinstance(data, dict):
            return {key: self.all_reduce(value, op) for key, value in data.items()}
        tensor = data.clone() if isinstance(data, torch.Tensor) else torch.tensor([float(data)])
        if op == "mean":
            tensor /= self.world_size
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX if op == "max" else distributed.ReduceOp.SUM)
        return tensor if isinstance(data, torch.Tensor) else tensor.item()

    def all_gather(self, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: self.all_gather(value) for key, value in data.items()}
        tensor = data if isinstance(data, torch.Tensor) else torch.tensor([float(data)])
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        distributed.all_gather(parts, tensor)
        return torch.cat(parts)


def _gathered_in_turn(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed gathers several weights at once and then waits for the last of them only, which is enough on a GPU, where a
    stream keeps their order. Gloo's threads do not: now and then a forward pass would read a weight that had not arrived."""
    settings["zero_optimization"]["stage3_allgather_sequential"] = True
    return settings


def _wait_once(handles: MultipleAllGatherHandles, **settings: Any) -> None:
    """Weights that are gathered in turn share such handles, and each waits for all of them: a second time, that would declare
    those complete that have been let go since."""
    waiting, handles.handles = handles.handles, []
    for handle in waiting:
        handle.wait(**settings)


def _engine(model: Any) -> Any:
    return model.model if isinstance(model, Actor) else model


def destroy(model: Any) -> None:
    """End a model that the strategy has prepared, so that its memory is free once nothing else refers to it."""
    engine = _engine(model)
    engine.destroy()
    # At ZeRO 3 DeepSpeed itself goes on referring to the model: on a stack of modules, and in the cache of a method.
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    cached: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    cached.__closure__[0].cell_contents.cache_clear()


def _norm(model: torch.nn.Module) -> torch.Tensor:
    """The norm of all gradients together, in fp32."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])
    )


def _single_process() -> None:
    """Make this process the only rank if there is no launcher; otherwise DeepSpeed would look for MPI."""
    if "RANK" in os.environ:
        return
    # No other process connects, so any free port will do.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def check_cuda() -> None:
    """Raises ValueError if torch is built for CUDA and can use no GPU, because a driver that is too old would otherwise become
    a run on the CPU, without a word. An empty CUDA_VISIBLE_DEVICES asks for the CPU."""
    asked_for_cpu = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda and not asked_for_cpu and not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but no GPU can be used: compare the driver's "
            "CUDA version, which nvidia-smi prints, with torch's; to run on the CPU, set CUDA_VISIBLE_DEVICES= (empty)"
        )


def build_strategy(config: Inference) -> DeepspeedStrategy:
    """The strategy of this process, with its process group initialised.

    Raises ValueError if ``--train.batch_size`` cannot be split into equal micro-batches over the ranks, and if torch is built
    for CUDA but has no GPU.
    """
    check_cuda()
    _single_process()
    if problem := config.train.uneven(int(os.environ["WORLD_SIZE"])):
        raise ValueError(problem)
    deepspeed.utils.logger.setLevel(logging.WARNING)  # it logs memory use for every engine
    for module in (stage_1_and_2, stage3):
        # It replaces a norm that is not finite by -1 and continues.
        module.mask_nan_or_inf_with_val_inplace = lambda *_, **__: None
    # At ZeRO 0 in half precision it takes a step on gradients of zero, to make Adam's states: weights decay by it, and Adam
    # counts it, so that its first real step would be 0.74 of the learning rate. Adam makes them in that step anyway.
    FP16_UnfusedOptimizer.initialize_optimizer_states = lambda self: None
    arguments = openrlhf_arguments(config)
    kind: type[DeepspeedStrategy] = Strategy
    if not torch.cuda.is_available():
        kind = CpuDeepspeedStrategy
        MultipleAllGatherHandles.wait = _wait_once
        # The shared-memory all-reduce would be compiled with g++ too; gloo is enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # The only module-level function of OpenRLHF's strategy that calls CUDA; it runs after saving.
        upstream.torch_dist_barrier_and_cuda_sync = distributed.barrier
    strategy = kind(
        seed=config.train.seed,
        full_determinism=config.train.full_determinism_enable,
        max_norm=arguments.max_norm,
        micro_train_batch_size=config.train.micro_batch_size,
        train_batch_size=config.train.batch_size,
        zero_stage=config.ds.zero_stage,
        args=arguments,
    )
    ranks.listen_where_named()
    strategy.setup_distributed()
    ranks.barrier()
    if (
        kind is CpuDeepspeedStrategy
        and strategy.is_rank_0()
        and os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE"
    ):
        say("OMP_WAIT_POLICY=ACTIVE: beside other busy processes this run is many times slower; unset it")
    return strategy
