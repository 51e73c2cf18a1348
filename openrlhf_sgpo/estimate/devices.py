"""What a rank computes on: GPUs by name, those of this machine, or its CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """memory: bytes, of one GPU as nvidia-smi counts them, or of the machine. tflops: 10^12 dense bf16 operations per second.
    bandwidth: of its memory, GB (10^9 bytes) per second. tflops and bandwidth are None where they are not known."""

    name: str
    memory: float
    tflops: float | None = None
    bandwidth: float | None = None
    on_gpu: bool = True


# From NVIDIA's data sheets (dense bf16 with float32 accumulation, no sparsity).
KNOWN = {
    device.name: device
    for device in (
        Device("A10G-24GB", 22.5 * GIB, 70, 600),
        Device("A100-40GB", 40 * GIB, 312, 1555),
        Device("A100-80GB", 80 * GIB, 312, 2039),
        Device("B200-180GB", 179 * GIB, 2250, 8000),
        Device("H100-80GB", 79.6 * GIB, 989, 3350),
        Device("H200-141GB", 140.4 * GIB, 989, 4800),
        Device("L4-24GB", 22.5 * GIB, 121, 300),
        Device("L40S-48GB", 45 * GIB, 362, 864),
        Device("RTX3090-24GB", 24 * GIB, 71, 936),
        Device("RTX4090-24GB", 24 * GIB, 165, 1008),
        Device("RTX6000Ada-48GB", 48 * GIB, 182, 960),
    )
}


def devices_here() -> list[Device]:
    """The visible GPUs of this machine, with the speed of the known model of that name; its CPU if there is none."""
    import torch

    if not torch.cuda.is_available():
        return [Device("CPU", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), on_gpu=False)]
    listed = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        words = properties.name.replace(" ", "").upper()
        # The longest name that fits and whose memory does: A100 comes with 40 and 80 GB, "L4" is in "L40S".
        alike = [
            device
            for name, device in KNOWN.items()
            if name.rpartition("-")[0].upper() in words and abs(device.memory / properties.total_memory - 1) < 0.1
        ]
        known = max(alike, key=lambda device: len(device.name), default=Device(properties.name, 0.0))
        listed.append(replace(known, name=properties.name, memory=float(properties.total_memory)))
    return listed
