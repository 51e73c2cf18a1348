"""Why engines fail, out of what vLLM's processes write; of real engines in ``test_session.py``."""

from __future__ import annotations

import pytest

from openrlhf_sgpo.openrlhf.engine_log import last_error, reason_of

CORE = "(EngineCore pid=7) ERROR 11-30 14:25:34 [core.py:1374] "
WORKER = "(Worker_TP1 pid=9) ERROR 11-30 14:25:33 [multiproc_executor.py:800] "
POINTER = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
)


def traceback_of(message: str, prefix: str = "") -> str:
    lines = ["Traceback (most recent call last):", '  File "core.py", line 1, in start', "    raise", message]
    return "".join(f"{prefix}{line}\n" for line in lines)


def test_the_error_of_the_process_that_has_one():
    warning = "WARNING 11-30 14:25:34 [vllm.py:1371] Enforce eager set: nothing to see\n"
    log = warning + traceback_of("ValueError: No available memory: try another", CORE) + traceback_of(POINTER)
    assert last_error(log) == "ValueError: No available memory: try another"
    of_worker = traceback_of("torch.OutOfMemoryError: CUDA out of memory", WORKER)
    pointer = traceback_of("Exception: WorkerProc initialization failed. See stack trace for root cause.", CORE)
    assert last_error(of_worker + pointer) == "torch.OutOfMemoryError: CUDA out of memory"
    assert last_error(warning) == last_error("") == ""


@pytest.mark.parametrize(
    ("said", "log", "reason"),
    [
        (POINTER, traceback_of("ValueError: too long", CORE), "ValueError: too long"),
        (POINTER, "", "its process ended without a message, as it does where memory runs out"),
        (
            "1 validation error\n  Value error, too long\n    For further information visit a page",
            traceback_of("ValueError: of something else"),
            "1 validation error Value error, too long",
        ),
    ],
)
def test_a_reason_is_one_line(said, log, reason):
    assert reason_of(RuntimeError(said), log) == reason
