"""The command ``estimate``: puts the parts together, and prints them."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, replace
from typing import Any

from openrlhf_sgpo.config import Config
from openrlhf_sgpo.estimate.devices import GIB, KNOWN, Device, devices_here
from openrlhf_sgpo.estimate.duration import Lengths, assumed, disk, lengths_of, loads, measured, whole
from openrlhf_sgpo.estimate.fitting import Change, changed, combinations, flags_of, useful_changes
from openrlhf_sgpo.estimate.memory import Memory, total, work_of
from openrlhf_sgpo.estimate.settings import Asked
from openrlhf_sgpo.estimate.shape import ModelShape, model_configuration, model_shape
from openrlhf_sgpo.output import duration, say
from openrlhf_sgpo.packed.model import PADDED_BY_CHOICE, why_padded
from openrlhf_sgpo.rollout.base import engine_count
from openrlhf_sgpo.table import aligned

SPARE = 0.1
PARTS = (
    *("weights", "optimiser", "gradients", "activations", "head", "ZeRO buffers", "other models", "engine"),
    *("engine's weights", "engine's workspace", "engine's keys and values", "CUDA, fragmentation", "process"),
)


class Estimate:
    """An estimate of one run. ranks: of training; each has a device of its own, or its share of the machine's memory."""

    def __init__(self, asked: Asked):
        self.asked = asked
        self.config, self.algorithm, self.options = asked.config, asked.algorithm, asked.options
        settings = asked.settings
        devices = [KNOWN[settings.gpu]] if settings.gpu else devices_here()
        self.ranks = settings.gpus or len(devices)
        self.device: Device = devices[0]
        if not self.device.on_gpu:
            self.device = replace(self.device, memory=self.device.memory / self.ranks)
        self.config.vllm.num_engines = engine_count(self.config, self.ranks if self.device.on_gpu else 0)
        self.padded = why_padded(self.config, model_configuration(self.config.model))
        if self.padded:
            self.config.train.layout, self.config.train.max_tokens = "padded", 0
        self._shapes: dict[int, ModelShape] = {}
        self.shape = self._shape(self.config)
        self.memory = self._memory(self.config)
        self.lengths: Lengths = lengths_of(self.config, settings)

    def _shape(self, config: Config) -> ModelShape:
        """With the adapters of each role, if roles have their own."""
        rank = config.ds.lora.rank
        if rank not in self._shapes:
            shape = model_shape(config.model, config.ds.param_dtype, config.ds.lora)
            roles = getattr(self.algorithm(self.options, config.model.beta), "adapters", {})
            self._shapes[rank] = replace(shape, trained=shape.trained * (len(roles) if rank and roles else 1))
        return self._shapes[rank]

    def _memory(self, config: Config) -> Memory:
        work = work_of(config, self.algorithm, self.options, self.ranks)
        return Memory(config, self.algorithm, self._shape(config), work, self.device, self.ranks)

    def problems(self, memory: Memory, spare: float = 0.0) -> list[str]:
        """Why the run would not fit, a sentence per stage. spare: by how much the figures may be too low; those of an engine
        are not, because it takes no more than its share."""
        problems = [
            f"{name} takes {total(parts) / GIB:.1f} GiB of {self.device.memory / GIB:.1f}"
            for name, parts in memory.stages().items()
            if sum(size if "engine's" in part else (1 + spare) * size for part, size in parts.items())
            > self.device.memory
        ]
        config = memory.config
        if memory.engines and memory.cached_tokens() < config.data.max_len:
            share = config.vllm.gpu_memory_utilization
            problems.append(
                f"an engine with {share:g} of a GPU has no room for the keys and values of --data.max_len "
                f"{config.data.max_len} tokens: raise --vllm.gpu_memory_utilization or --vllm.tensor_parallel_size"
            )
        return problems

    def changes(self) -> list[tuple[Change, Memory]]:
        """Each change of ``fitting.CHANGES`` that concerns this run, alone."""
        return [(change, self._memory(changed(self.config, change))) for change in self._useful()]

    def _useful(self) -> list[Change]:
        return useful_changes(self.memory, could_pack=self.padded in ("", PADDED_BY_CHOICE))

    def fitting(self) -> tuple[list[Change], Memory] | None:
        """The first combination of changes with which it fits, even if figures are too low by ``SPARE``."""
        for chosen in combinations(self._useful()):
            memory = self._memory(changed(self.config, *chosen))
            if not self.problems(memory, SPARE):
                return chosen, memory
        return None

    def times(self) -> tuple[list[tuple[str, str, float, float | None]], str]:
        """Stage, kind, tokens and seconds of each load, and where the speeds come from."""
        settings = self.asked.settings
        if settings.from_run:
            speeds = measured(settings.from_run)
        else:
            speeds = assumed(self.memory, self.device, settings, self.lengths)
        rows = []
        for load in loads(self.config, self.algorithm, self.options, settings, self.lengths):
            seconds = speeds.seconds(load, self.shape, self.config, self.ranks)
            rows.append((load.stage, load.kind, load.tokens * load.models, seconds))
        return rows, speeds.origin

    def disk(self) -> dict[str, float]:
        return disk(self.config, self.algorithm, self.options, self.shape)

    def to_dict(self) -> dict[str, Any]:
        rows, origin = self.times()
        fitting = None
        if problems := self.problems(self.memory):
            fitting = self.fitting()
        return {
            "algorithm": self.algorithm.name,
            "model": asdict(self.shape),
            "device": asdict(self.device),
            "ranks": self.ranks,
            "memory": self.memory.stages(),
            "host_memory": self.memory.host(),
            "problems": problems,
            "fits_with": flags_of(*fitting[0]) if fitting else "",
            "time": [dict(zip(("stage", "kind", "tokens", "seconds"), row, strict=True)) for row in rows],
            "speeds": origin,
            "disk": self.disk(),
            "tokens": asdict(self.lengths),
        }

    def text(self) -> str:
        return "\n".join([*self._head(), "", *self._memory_lines(), "", *self._time_lines(), "", *self._disk_lines()])

    def _head(self) -> list[str]:
        config, shape = self.config, self.shape
        work = self.memory.work
        trained = "all trained" if shape.trained >= shape.parameters else f"{shape.trained:,} trained (LoRA)"
        checkpointing = ", gradient checkpointing" if config.model.gradient_checkpointing_enable else ""
        return [
            f"{self.algorithm.name} on {self.ranks} x {self.device.name}, an estimate: nothing was run",
            f"{config.model.model_name_or_path}: {shape.kind}, {shape.parameters:,} parameters, {trained}",
            f"ZeRO {config.ds.zero_stage}, {config.ds.param_dtype}, layout {config.train.layout}{checkpointing}",
            f"{work.tokens:,} tokens at a time, {work.micro_batches} times per optimiser step",
            *_wrapped(*([f"layout padded: {self.padded}"] if self.padded else [])),
        ]

    def _memory_lines(self) -> list[str]:
        stages = self.memory.stages()
        each = "GPU" if self.device.on_gpu else "rank"
        rows = [[f"GiB per {each}", *stages]]
        for part in PARTS:
            if any(part in parts for parts in stages.values()):
                rows.append(
                    [part, *(f"{parts[part] / GIB:.1f}" if part in parts else "-" for parts in stages.values())]
                )
        rows.append(["together", *(f"{total(parts) / GIB:.1f}" for parts in stages.values())])
        lines = aligned(rows)
        if host := self.memory.host():
            lines.append(f"and {host / GIB:.0f} GiB of the machine's own memory")
        problems = self.problems(self.memory)
        room = f"{self.device.memory / GIB:.1f} GiB"
        lines += ["", *_wrapped(*(f"does not fit: {problem}" for problem in problems))]
        if not problems:
            is_close = self.problems(self.memory, SPARE)
            lines += _wrapped(f"fits into {room}" + f", but not if this is {SPARE:.0%} too low" * bool(is_close))
        if self.config.reward.model_name_or_path or self.config.reward.heads:
            lines += ["not counted: the reward models of --oracle"]
        lines += ["", *self._change_lines()]
        if problems:
            if fitting := self.fitting():
                lines += ["", *_wrapped(f"fits with {flags_of(*fitting[0])}: {fitting[1].peak() / GIB:.1f} GiB")]
            else:
                lines += ["", "nothing of this makes it fit: take more or larger GPUs, or a smaller model"]
        return lines

    def _change_lines(self) -> list[str]:
        rows = [["a change alone", "GiB", "costs"]]
        for change, memory in self.changes():
            rows.append([flags_of(change), f"{memory.peak() / GIB:.1f}", change.cost])
        return aligned(rows, left=(0, 2)) if len(rows) > 1 else []

    def _time_lines(self) -> list[str]:
        timed, origin = self.times()
        rows = [["stage", "tokens", "time"]]
        for stage, kind, tokens, seconds in timed:
            rows.append([f"{stage}: {kind}", f"{tokens:,.0f}", "-" if seconds is None else duration(seconds)])
        seconds = whole(timed, overlap=self.config.rollout.steps_behind > 0)
        rows.append(["together", "", "-" if seconds is None else duration(seconds)])
        return [
            *aligned(rows, left=(0, 2)),
            *_wrapped(
                f"speeds: {origin}; prompts of {self.lengths.prompt} tokens, responses of {self.lengths.response}; "
                "evaluations, starting engines and loading models are not counted"
            ),
        ]

    def _disk_lines(self) -> list[str]:
        parts = self.disk()
        listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        return _wrapped(f"disk: {total(parts) / GIB:.1f} GiB in the run folder ({listed})")


def _wrapped(*sentences: str) -> list[str]:
    return [
        line for text in sentences for line in textwrap.wrap(text, 80, break_on_hyphens=False, break_long_words=False)
    ]


def run_estimate(asked: Asked) -> None:
    """Print the estimate. Raises ValueError if the model cannot be counted or a run folder cannot be read."""
    estimate = Estimate(asked)
    say(json.dumps(estimate.to_dict(), indent=2) if asked.settings.json else estimate.text())
