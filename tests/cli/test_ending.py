"""How commands end that do not end well: on purpose, by a signal, by an error of the system, alone or with other ranks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, arguments, free_port

from openrlhf_sgpo.cli import ending
from openrlhf_sgpo.cli.main import main

# A command that says that it works, and works until it is stopped; a real one would take longer to begin.
WORKING = """
import sys, time
from openrlhf_sgpo.cli import main
class Finalised:
    def __del__(self):  # drops every exception
        print("working", flush=True)
        time.sleep(1)
def work(argv):
    if "finalised" in sys.argv:
        Finalised()
    else:
        print("working", flush=True)
    time.sleep(60)
main.COMMANDS["games"] = work
sys.exit(main.main(["games", "--out", "a folder"]))
"""


@pytest.mark.parametrize("where", ["", "finalised"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_two_lines_say_what_was_stopped_and_how_to_go_on(number, code, where):
    process = subprocess.Popen(
        [sys.executable, "-c", WORKING, where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert said.splitlines() == [
        "stopped: openrlhf-sgpo games --out 'a folder'",
        "to continue: openrlhf-sgpo games --out 'a folder'",
    ]


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, 0, ""),
        ({"WORLD_SIZE": "3"}, 0, ""),  # of nobody's rank
        ({"RANK": "first"}, 2, "error: RANK=first is not the number that a launcher gives a rank; unset it\n"),
        ({"RANK": "0", "WORLD_SIZE": "?"}, 2, "error: WORLD_SIZE=? is not the number that"),
    ],
)
def test_variables_of_ranks_that_mean_nothing(variables, code, said, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["algorithms"]) == code and capsys.readouterr().err.startswith(said)
    if not code:
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()


def test_a_run_that_is_there_goes_on_with_resume(tmp_path, capsys):
    (tmp_path / "resolved_config.yaml").write_text("{}")
    assert ending.explain(KeyboardInterrupt(), ["train", "--ckpt.output_dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[1].endswith(f"train --ckpt.output_dir {tmp_path} --resume")


@pytest.mark.parametrize("folder", ["/sys/run", "file/run"])
def test_a_folder_that_cannot_be_written_to_is_found_before_anything_is_loaded(
    folder, tiny_model, tiny_data, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    folder = tmp_path / folder  # stays /sys/run, where not even root may write
    assert main(["train", *arguments(tiny_model, tiny_data, folder, algo="dpo")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --ckpt.output_dir {folder}: {folder.parent} cannot be written to (")
    assert "choose another folder, or change its permissions" in line


def test_an_error_of_the_system_is_one_line_with_path_and_remedy(tiny_model, tiny_data, tmp_path, capsys):
    folder = tmp_path / ("x" * 300)
    assert main(["train", *arguments(tiny_model, tiny_data, folder, algo="dpo")]) == 1
    captured, expected = capsys.readouterr().err, "File name too long: choose a shorter name with --ckpt.output_dir"
    (line,) = [line for line in captured.splitlines() if line.startswith("error")]
    assert "Traceback" not in captured and line.startswith(f"error: {str(folder)[:150]}") and expected in line
    details = Path(line.partition("(details: ")[2].rstrip(")"))
    assert "Traceback" in details.read_text()
    details.unlink()


def test_a_full_disk_is_named_with_the_run_and_how_to_go_on(tmp_path, capsys):
    (tmp_path / "resolved_config.yaml").write_text("{}")
    argv = ["train", "--ckpt.output_dir", str(tmp_path)]
    with pytest.raises(OSError) as caught:  # an error without a name
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    for error in (caught.value, RuntimeError("I/O error: No space left on device (os error 28)")):
        assert ending.explain(error, argv) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path}: {os.strerror(errno.ENOSPC)}: free some space, then continue: ")
        assert f"train --ckpt.output_dir {tmp_path} --resume" in line and line.endswith(f"{tmp_path}/log.txt)")


def test_other_errors_are_one_line_and_memory_has_a_remedy(tmp_path, capsys):
    (tmp_path / "resolved_config.yaml").write_text("{}")
    argv = ["train", "--ckpt.output_dir", str(tmp_path)]
    text = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 79 GiB"
    assert ending.explain(RuntimeError(text), argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "79 GiB: lower --train.micro_batch_size" in line
    assert text in (tmp_path / "log.txt").read_text()
    assert ending.explain(KeyError("a name"), argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: KeyError: 'a name' (details: ")
    assert ending.explain(ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)), argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Connection refused (details: "), "it is not about the run folder"


RANK = """
import os, sys, time
from torch import distributed
from openrlhf_sgpo import ranks
from openrlhf_sgpo.cli import main
how = sys.argv[1]
ranks.PARTING = ranks.timedelta(seconds=3)
def work(argv):
    ranks.listen_where_named()
    distributed.init_process_group("gloo")
    ranks.barrier()
    def fail():
        raise OSError(28, "No space left on device", "a file")
    if how == "together":
        ranks.on_rank_0(fail)
    if distributed.get_rank() == 1:
        if how in ("alone", "waited for"):
            raise RuntimeError("out of luck")
        time.sleep(1)  # rank 0 is done long before
    elif how == "waited for":
        ranks.barrier()
main.COMMANDS["games"] = work
sys.exit(main.main(["games"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "codes", "said"),
    [
        ("together", [1, 1], ["error: a file: No space left on device: free some space", ""]),
        ("alone", [0, 1], ["", "error: rank 1: out of luck"]),
        ("waited for", [1, 1], ["error: ", "error: rank 1: out of luck"]),
        ("well", [None, None], ["", ""]),
    ],
)
def test_ranks_end_together_and_say_it_once(how, codes, said):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[1] for process in processes]
    lines = ["\n".join(line for line in text.splitlines() if line.startswith("error")) for text in outputs]
    assert [line[: len(start)] if start else line for line, start in zip(lines, said, strict=True)] == said
    assert all("Traceback" not in text for text in outputs)
    assert [process.returncode for process in processes] == [code or 0 for code in codes]
