"""Where a whole round of SSAPO spends its CPU time: answers, scores, follower, training, evaluation, files.

    python measurements/round_profile.py [--config examples/configs/quickstart.yaml] [--prompts 32] [flags of train ...]

One round after the seed stage, with one thread and the transformers engine; what happens before and between is not counted.
py-spy samples the frames of Python and of native code 50 times a second, which makes neither look slower than it is; threads
that wait are left out. A sample in one of torch's kernels is the model's arithmetic, all others are named by whose code it is.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import wraps
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from openrlhf_sgpo.cli.main import main as command

WAITING = re.compile("pthread_cond_|PyThread_acquire_lock_timed|epoll_wait|c10d::Work::wait|__poll|__select")
# The first that a native frame has. Attention has matrix products of its own. Code that oneDNN writes as it runs has no names.
NAMED = {
    "arithmetic: attention": "scaled_dot_product|flash_attention",
    "arithmetic: Adam": "[aA]dam",
    "arithmetic: matrix products": r"gemm|dnnl|mkldnn|mkl_|addmm|bmm|at::native::(linear|matmul)|\(\?\)$",
    "arithmetic: other operators": "at::native|vec::",
    "garbage collection": "gc_collect",
    "safetensors": "safetensors",
    "tokenizer": "tokenizers",
    "files": "fsync|os_write|_io_",
    "torch: memory of tensors": r"posix_memalign|munmap|(^|;)(malloc|free) \(",
    "torch: from Python to its operators, autograd": r"\((libtorch|libc10)",
}
PYTHON = re.compile(r"\((?:<frozen )?(\w+)[\w/.-]*(?:\.py|>):\d+\)")


def kind(stack: str) -> str:
    """Whose code runs, by the native frames within the innermost of Python, or by that one. stack: frames, outermost first."""
    python, native = "", list[str]()
    for frame in stack.split(";"):
        if match := PYTHON.search(frame):
            python, native = match[1], []
        else:
            native.append(frame)
    for name, pattern in NAMED.items():
        if re.search(pattern, ";".join(native)):
            return name
    return f"Python of {'its standard library' if python in sys.stdlib_module_names else python}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/configs/quickstart.yaml")
    parser.add_argument("--prompts", default="32")
    arguments, flags = parser.parse_known_args()
    from openrlhf_sgpo.sources.stored_pairs import StoredPairs

    prepare = StoredPairs.prepare
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER: Linux lets a child look at its parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stacks, log = folder / "stacks", folder / "log"
        log.touch()
        spy = ["py-spy", "record", "--native", "--rate", "50", "--format", "raw", "--duration", "unlimited"]
        started: list[tuple[subprocess.Popen[bytes], float]] = []

        @wraps(prepare)
        def watched(self: StoredPairs, number: int) -> None:
            if number == 1:
                pid = ["--pid", str(os.getpid()), "--output", str(stacks)]
                sampler = subprocess.Popen([*spy, *pid], stdout=log.open("w"), stderr=subprocess.STDOUT)
                while "Sampling" not in log.read_text():
                    if sampler.poll() is not None:
                        raise RuntimeError(log.read_text())
                    time.sleep(0.1)
                started.append((sampler, time.process_time()))
            prepare(self, number)

        StoredPairs.prepare = watched  # type: ignore[method-assign]
        train = ["train", "--config", arguments.config, "--rollout.engine", "hf", "--rounds.count", "1"]
        status = command([*train, "--rounds.prompts", arguments.prompts, "--ckpt.output_dir", f"{name}/run", *flags])
        for sampler, began in started:
            seconds = time.process_time() - began
            sampler.send_signal(signal.SIGINT)
            sampler.wait()
        if status:
            sys.exit(status)
        samples: Counter[str] = Counter()
        for line in stacks.read_text().splitlines():
            stack, times = line.rsplit(" ", 1)
            if not WAITING.search(stack):
                samples[kind(stack)] += int(times)
    print(f"{seconds:.1f} CPU seconds, {samples.total()} samples\n\n| part of a round | share |\n|---|---|")
    for part, count in samples.most_common(16):
        print(f"| {part} | {count / samples.total():.1%} |")


if __name__ == "__main__":
    main()
