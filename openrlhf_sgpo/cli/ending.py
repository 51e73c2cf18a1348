"""Failed and stopped commands: their messages and exit codes. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from openrlhf_sgpo import extras, flags, keys, output
from openrlhf_sgpo.launch import COMMAND

FOLDERS = ("ckpt.output_dir", "out")  # flags that name the folder of a run
TIDYING = 60.0  # seconds that a command has to clean up after a signal
RETRY = 0.1  # seconds after which a signal that Python would drop is sent again
FULL = 16 * 2**20  # bytes; a disk with less free space counts as full

_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): "free some space",
    (errno.EACCES, errno.EPERM, errno.EROFS): "change its permissions, or choose another folder{flag}",
    (errno.ENAMETOOLONG,): "choose a shorter name{flag}",
    (errno.ENOTDIR, errno.EISDIR, errno.EEXIST): "choose another name{flag}, or move the existing file or folder",
    (errno.ENOENT,): "create it, or correct the name",
    (errno.EMFILE, errno.ENFILE): "raise the limit of open files, `ulimit -n`",
}
_MEMORY = "lower --train.micro_batch_size, --data.max_len or --vllm.gpu_memory_utilization"

_signal = 0  # the signal that stopped this process


@contextlib.contextmanager
def stopped_by_signals(argv: list[str]) -> Iterator[None]:
    """Within the block, which runs the command ``argv``, SIGTERM stops it like Ctrl-C. The command has ``TIDYING`` seconds to
    end; a second signal ends it at once.

    Ranks other than the first have nothing to clean up: they end at once, even while they wait for another rank, where Python
    handles no signals.
    """
    done = threading.Event()

    def end_at_once(number: int) -> None:
        _say_stopped(argv)
        os._exit(128 + number)

    def end_late(number: int) -> None:
        if not done.wait(TIDYING):
            end_at_once(number)

    def stop(number: int, frame: FrameType | None) -> None:
        global _signal
        if _signal:
            end_at_once(number)
        if _would_be_dropped(frame):
            threading.Timer(RETRY, os.kill, (os.getpid(), number)).start()
            return
        _signal = number
        threading.Thread(target=end_late, args=(number,), daemon=True).start()
        raise KeyboardInterrupt

    handler: Any = stop if _rank() == 0 else signal.SIG_DFL
    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread handles signals
        before = {}
    try:
        yield
    finally:
        done.set()
        for number, old in before.items():
            signal.signal(number, old)


def _would_be_dropped(frame: FrameType | None) -> bool:
    """Whether Python would drop an exception raised here, as it does in finalisers."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename.endswith("/weakref.py"):
            return True
        frame = frame.f_back
    return False


def _say_stopped(argv: list[str]) -> None:
    _say(f"stopped: {shlex.join(_typed(argv))}\nto continue: {shlex.join(_continued(argv))}")


def explain(error: BaseException, argv: list[str]) -> int:
    """Print to stderr why the command ``argv`` ended, in one line unless the error is written for users; returns the exit code.
    With several ranks the first one prints; another one does if it fails alone."""
    global _signal
    stopped, _signal = _signal or signal.SIGINT * isinstance(error, KeyboardInterrupt), 0
    if stopped:
        _say_stopped(argv)
        return 128 + stopped
    together = part_from_other_ranks(failed=True)
    # Before the ranks have met, all read the same settings and data, so all have the same error.
    if _rank() > 0 and (together or (together is None and isinstance(error, ValueError))):
        return 2 if isinstance(error, ValueError) else 1
    rank = f"rank {_rank()}: " if _rank() > 0 else ""
    if isinstance(error, ValueError):
        # Settings and data errors are written for the user.
        log = f" (output of other packages: {output.last_log})" if output.last_log else ""
        _say(f"error: {rank}{error}{log}")
        return 2
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("openrlhf_sgpo"):
        _say(f"error: {rank}{extras.how_to_install(error.name)}")
        return 2
    if isinstance(error, BrokenPipeError) and not _stdout_is_read():
        return 141  # as shells report a command that SIGPIPE ended
    problem = _os_error(error, argv) or _other(error, argv)
    _say(f"error: {rank}{problem}{_details(error, argv)}")
    return 1


def explain_loss(problem: str, argv: list[str]) -> None:
    """Print to stderr that a process of the command ``argv`` was lost, and how to go on."""
    resumed = [*_typed(argv), *([] if "--resume" in argv else ["--resume"])]
    output.say(keys.redacted(f"error: {problem}\nto continue: {shlex.join(resumed)}"), is_error=True)


def _say(text: str) -> None:
    print(keys.redacted(text), file=sys.stderr)


def _stdout_is_read() -> bool:
    try:
        print(flush=True)
    except BrokenPipeError:  # the reader of our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return False
    return True


def part_from_other_ranks(failed: bool) -> bool | None:
    """See ``ranks.part_ways``; a process that has not imported torch has not met the other ranks."""
    ranks = sys.modules.get("openrlhf_sgpo.ranks")
    return ranks.part_ways(failed) if ranks is not None else None


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _folder(argv: list[str]) -> tuple[str, Path] | None:
    """The flag that names the folder of this command's run, and the folder."""
    with contextlib.suppress(ValueError):  # the error may be in the settings themselves
        for flag in FOLDERS:
            if value := flags.peek(argv[1:], flag):
                return f"--{flag}", Path(value)
    return None


def _run_folder(argv: list[str]) -> Path | None:
    """The folder of this command's run, if it exists already."""
    named = _folder(argv)
    return named[1] if named and os.path.exists(named[1] / "resolved_config.yaml") else None


def _typed(argv: list[str]) -> list[str]:
    if COMMAND in os.environ:
        return [*shlex.split(os.environ[COMMAND]), *argv[1:]]
    return ["openrlhf-sgpo", *argv]


def _continued(argv: list[str]) -> list[str]:
    resumes = _run_folder(argv) and argv[0] != "evaluate" and "--resume" not in argv and "--suite" not in argv
    return [*_typed(argv), *(["--resume"] if resumes else [])]


def _os_error(error: BaseException, argv: list[str]) -> str:
    """Path, reason and remedy; empty for other errors. Not every library raises an OSError on a full disk."""
    named = _folder(argv)
    is_full = "No space left" in str(error)
    if named and "PytorchStreamWriter" in str(error):
        is_full = _free(named[1]) < FULL
    number = errno.ENOSPC if is_full else error.errno if isinstance(error, OSError) else None
    if number is None:
        return ""
    remedy = next((text for numbers, text in _REMEDIES.items() if number in numbers), "")
    # A failed write to an open file names no path. What has no remedy is not about files.
    names = [getattr(error, "filename2", None), getattr(error, "filename", None), remedy and named and named[1]]
    path = next((str(name) for name in names if name), "")
    is_inside = named is not None and path.startswith((str(named[1]), str(named[1].absolute())))
    flag = f" with {named[0]}" if named and is_inside else ""
    remedy = remedy.format(flag=flag)
    if number in (errno.ENOSPC, errno.EDQUOT) and _run_folder(argv):
        remedy += f", then continue: {shlex.join(_continued(argv))}"
    return ": ".join(filter(None, [_short(path, 200), os.strerror(number), remedy]))


def _other(error: BaseException, argv: list[str]) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return f"{_short(str(error) or 'out of memory')}: {_MEMORY}"
    if type(error) in (RuntimeError, OSError):
        return _short(str(error))
    return f"{type(error).__name__}: {_short(str(error))}"


def _details(error: BaseException, argv: list[str]) -> str:
    """Write the traceback to the run's log, or to a temporary file if there is no run folder; returns where it is."""
    text = keys.redacted("".join(traceback.format_exception(error)))
    folder = _run_folder(argv)
    try:
        if folder is None:
            with tempfile.NamedTemporaryFile("w", prefix="openrlhf-sgpo-", suffix=".txt", delete=False) as file:
                file.write(text)
            return f" (details: {file.name})"
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(text)
        return f" (details: {folder / 'log.txt'})"
    except OSError:  # no space for the traceback either
        return ""


def _short(text: str, length: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def _free(path: Path) -> int:
    """Free bytes on the disk of ``path``, which need not exist."""
    existing = next(folder for folder in [path.absolute(), *path.absolute().parents] if os.path.exists(folder))
    return shutil.disk_usage(existing).free
