"""The machine: Python, memory, disks, GPUs and their driver, network and keys."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from openrlhf_sgpo import extras
from openrlhf_sgpo.doctor.checks import Diagnosis
from openrlhf_sgpo.doctor.probes import Outcome, attempt, tool

GIB = 2**30
OLDEST = (3, 10)
LITTLE = {"disk": 20 * GIB, "memory": 8 * GIB, "shared memory": 1 * GIB}
FULL = 1 * GIB
ENDPOINT = "https://huggingface.co"
NETWORK_LIMIT = 8.0  # seconds, of which a connection may take five
KEYS = ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")
_REACH = """
import urllib.error, urllib.request
try:
    urllib.request.urlopen(urllib.request.Request({address!r}, method="HEAD"), timeout=5).close()
except urllib.error.HTTPError:
    pass  # it answered
"""
TORCH = """
import torch
answer["version"], answer["built_for"] = torch.__version__, torch.version.cuda
answer["usable"] = torch.cuda.is_available()
if torch.version.cuda and not answer["usable"]:
    try:
        torch.cuda.init()
    except Exception as error:
        answer["reason"] = str(error).splitlines()[0]
answer["devices"] = [
    [properties.name, properties.total_memory, torch.cuda.mem_get_info(number)[0]]
    for number in range(torch.cuda.device_count()) if answer["usable"]
    for properties in [torch.cuda.get_device_properties(number)]
]
"""


def system_checks() -> list[Diagnosis]:
    version = platform.python_version()
    python = Diagnosis("machine", "Python", "ok", f"{version} ({sys.executable})")
    if sys.version_info[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        python = Diagnosis("machine", "Python", "fails", version, f"install Python {oldest} or newer", stops=True)
    kind = f"{platform.system()} {platform.machine()}"
    system = Diagnosis("machine", "system", "ok", kind)
    if platform.system() != "Linux":
        system = Diagnosis("machine", "system", "fails", kind, "use Linux, or WSL 2 on Windows", stops=True)
    return [python, system, _memory(), *_disks()]


def _memory() -> Diagnosis:
    """The smaller of the machine's memory and the limit of the control group, as containers have it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    for path in limits:
        text = path.read_text().strip() if path.exists() else ""
        if text.isdigit():
            whole = min(whole, int(text))
    detail = f"{whole / GIB:.0f} GiB, {os.cpu_count()} CPU cores"
    if whole < LITTLE["memory"]:
        return Diagnosis(
            "machine", "memory", "note", f"{detail}: enough for models of 135M parameters, not for much more"
        )
    return Diagnosis("machine", "memory", "ok", detail)


def _disks() -> list[Diagnosis]:
    cache = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    places = {"runs (here)": os.getcwd(), "models": cache, "temporary": tempfile.gettempdir()}
    checks = []
    for name, place in places.items():
        path = next(folder for folder in (Path(place), *Path(place).parents) if folder.exists())
        free = shutil.disk_usage(path).free
        detail = f"{free / GIB:.0f} GiB free in {path}"
        if not os.access(path, os.W_OK):
            mend = f"choose a folder that you may write to{' with HF_HOME' if name == 'models' else ''}"
            checks.append(Diagnosis("machine", f"disk: {name}", "fails", f"{path} is not writable", mend))
        elif free < FULL:
            checks.append(
                Diagnosis("machine", f"disk: {name}", "fails", detail, f"free some space in {path}", stops=True)
            )
        else:
            little = free < LITTLE["disk"]
            more = ": a policy of 7B parameters takes 14 GiB" if little and name != "temporary" else ""
            checks.append(Diagnosis("machine", f"disk: {name}", "note" if more else "ok", detail + more))
    shared = Path("/dev/shm")
    if shared.exists() and (free := shutil.disk_usage(shared).free) < LITTLE["shared memory"]:
        detail = f"{free / GIB:.2f} GiB: too little for Ray and for several GPUs"
        checks.append(Diagnosis("machine", "shared memory", "note", detail, "start the container with --shm-size 16g"))
    return checks


def gpu_checks(torch: Outcome) -> list[Diagnosis]:
    """GPUs as the driver and as torch see them. torch: the answer to ``TORCH``."""
    query = "--query-gpu=name,memory.total,driver_version"
    listed = tool("nvidia-smi", query, "--format=csv,noheader").splitlines()
    if torch.problem:
        seen = f"; the driver sees {len(listed)}" if listed else ""
        mend = extras.training("gpu" if listed else "cpu")
        return [Diagnosis("GPUs", "torch", "fails", torch.problem + seen, mend, stops=True)]
    version = [Diagnosis("GPUs", "torch", "ok", torch.values["version"])] if "version" in torch.values else []
    return version + (_gpus(torch, listed) or [_no_gpu(torch, listed)])


def _gpus(torch: Outcome, listed: list[str]) -> list[Diagnosis]:
    checks = []
    for number, (name, memory, free) in enumerate(torch.values.get("devices", ())):
        driver = listed[number].rpartition(", ")[2] if number < len(listed) else "?"
        detail = f"{name}, {free / GIB:.0f} of {memory / GIB:.0f} GiB free, driver {driver}"
        busy = free < memory / 2
        mend = "see with nvidia-smi who uses it, or leave it out with CUDA_VISIBLE_DEVICES" if busy else ""
        checks.append(Diagnosis("GPUs", f"GPU {number}", "note" if busy else "ok", detail, mend))
    return checks


def _no_gpu(torch: Outcome, listed: list[str]) -> Diagnosis:
    built_for = torch.values.get("built_for")
    if built_for and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        reason = torch.values.get("reason", "no GPU is visible")
        driver = f", driver {listed[0].rpartition(', ')[2]}" if listed else ""
        detail = f"torch is built for CUDA {built_for}, which does not work{driver}: {reason}"
        mend = (
            f"install a driver for CUDA {built_for}" if listed else "export CUDA_VISIBLE_DEVICES= (to train on the CPU)"
        )
        return Diagnosis("GPUs", "GPUs", "fails", detail, mend, stops=True)
    if listed and not built_for:
        detail = f"{len(listed)} GPUs, and a torch that is built for CPUs"
        return Diagnosis("GPUs", "GPUs", "fails", detail, extras.TRAINING_ON_GPUS, stops=True)
    return Diagnosis("GPUs", "GPUs", "note", "none: training runs on the CPU, for small models")


def network_checks(offline: bool = False) -> list[Diagnosis]:
    """Whether the hub answers, and which keys are there; no key is shown."""
    address = os.environ.get("HF_ENDPOINT") or ENDPOINT
    mend = "give folders and files in place of hub names, or set HTTPS_PROXY or HF_ENDPOINT"
    if offline:
        hub = Diagnosis("network", "hub", "note", "not tried")
    elif os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        hub = Diagnosis("network", "hub", "note", "HF_HUB_OFFLINE is set: hub names work if they were loaded before")
    elif (answer := attempt(_REACH.format(address=address), NETWORK_LIMIT)).problem:
        hub = Diagnosis("network", "hub", "note", f"does not answer ({answer.problem})", mend)
    else:
        hub = Diagnosis("network", "hub", "ok", "answers")
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    there = [name for name in KEYS if os.environ.get(name)]
    if "HF_TOKEN" not in there and os.path.exists(os.path.join(home, "token")):
        there.append("the token of `hf auth login`")
    keys = ", ".join(there) or "none; gated models of the hub and hosted judges need one"
    return [hub, Diagnosis("network", "keys", "ok", keys)]
