"""A run on disk: whole or absent files, taking up a run, manifests, costs, metrics, and no secrets."""

import contextlib
import errno
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_sgpo import flags
from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.integrity import signed
from openrlhf_sgpo.ledger import Ledger
from openrlhf_sgpo.metrics import Metrics
from openrlhf_sgpo.run_folder import (
    RunFolder,
    keep_rows,
    read_json,
    read_jsonl,
    whole_folder,
    write_json,
    write_jsonl,
    write_text,
)
from openrlhf_sgpo.run_settings import load


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_replaces_what_was_there_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "table.txt"
    for text in ("first and longer", "zweitens ☃", ""):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert names(path.parent) == ["table.txt"]


@pytest.mark.parametrize(
    "fail",
    [
        lambda path: write_text(path, "half of it \ud800"),
        lambda path: write_json(path, {"value": float("nan")}),
        lambda path: write_json(path, {"value": object()}),
        lambda path: write_jsonl(path, [{"fine": 1}, {"value": float("inf")}]),
    ],
    ids=["unwritable text", "nan", "no JSON", "infinity in the second row"],
)
def test_failed_write_keeps_the_old_file(tmp_path, fail):
    path = tmp_path / "file.json"
    with pytest.raises((ValueError, TypeError)):
        fail(path)
    assert not path.exists()
    write_json(path, {"old": True})
    with pytest.raises((ValueError, TypeError)):
        fail(path)
    assert read_json(path) == {"old": True}


ROWS = st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.sampled_from(["a\u2028b\u2029c", "d\x85e\x1cf\r"])))


@settings(max_examples=60)
@given(ROWS)
def test_jsonl_reads_back_equal(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_jsonl(path, iter(rows))
        assert read_jsonl(path) == rows
        assert path.read_bytes().count(b"\n") == len(rows)
        write_json(path, rows)
        assert read_json(path) == rows


def test_a_row_cut_anywhere_is_dropped_even_within_a_character(tmp_path):
    path, rows = tmp_path / "rows.jsonl", [{"step": i, "text": "ä☃\u2028\x85"} for i in range(3)]
    write_jsonl(path, rows)
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rindex(b"\n") + 1
    assert not keep_rows(path, lambda row: True) and path.read_bytes() == whole
    for end in range(start + 1, len(whole)):
        path.write_bytes(whole[:end])
        assert keep_rows(path, lambda row: True)
        assert path.read_bytes() == whole[:start]
    path.write_bytes(whole)
    assert keep_rows(path, lambda row: row["step"] != 1)
    assert read_jsonl(path) == [rows[0], rows[2]]


def test_folder_gets_its_name_when_it_is_whole(tmp_path):
    final = tmp_path / "round_1" / "policy"
    with whole_folder(final) as folder:
        assert not final.exists()
        (folder / "weights").write_text("new")
    assert names(final.parent) == ["policy"] and (final / "weights").read_text() == "new"


def fill_half(path, error):
    with whole_folder(path) as folder:
        (folder / "half").write_text("")
        raise error


def test_failed_folder_leaves_no_name(tmp_path):
    final = tmp_path / "policy"
    with pytest.raises(KeyboardInterrupt):
        fill_half(final, KeyboardInterrupt)
    assert not final.exists()
    # What the failure left does not get into the next attempt.
    with whole_folder(final) as folder:
        (folder / "weights").write_text("")
    assert names(final) == ["weights"] and names(tmp_path) == ["policy"]


def test_failed_folder_keeps_the_old_one(tmp_path):
    final = tmp_path / "policy"
    for text in ("old", "new"):
        with whole_folder(final) as folder:
            (folder / "weights").write_text(text)
            (folder / f"only {text}").write_text("")
        with pytest.raises(RuntimeError, match="disk"):
            fill_half(final, RuntimeError("disk"))
        assert (final / "weights").read_text() == text
        assert names(final) == [f"only {text}", "weights"]


CONFIG = "model:\n  beta: 0.1\n  path: grün\nadam:\n  betas: [0.9, 0.999]\nalgo: sgpo\n"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_new_run(tmp_path, resume, exists):
    path = tmp_path / "runs" / "first"
    if exists:
        path.mkdir(parents=True)
    RunFolder(str(path)).prepare(CONFIG, resume)
    assert (path / "resolved_config.yaml").read_text(encoding="utf-8") == signed(CONFIG) and names(path) == [
        "lock",
        "resolved_config.yaml",
    ]


def test_existing_run_needs_resume(tmp_path):
    run = RunFolder(str(tmp_path))
    run.prepare(CONFIG, resume=False)
    with pytest.raises(ValueError, match="already holds a run: add --resume to continue it") as caught:
        run.prepare(CONFIG, resume=False)
    assert f"--ckpt.output_dir {tmp_path}" in str(caught.value)
    run.prepare(CONFIG, resume=True)
    assert (tmp_path / "resolved_config.yaml").read_text(encoding="utf-8") == signed(CONFIG)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("beta: 0.1", "beta: 0.25", ["--model.beta: was 0.1, now 0.25"]),
        ("[0.9, 0.999]", "[0.9, 0.95]", ["--adam.betas: was [0.9, 0.999], now [0.9, 0.95]"]),
        ("algo: sgpo\n", "", ["--algo: was 'sgpo', now None"]),
        ("algo: sgpo\n", "algo: sgpo\nseed: 3\n", ["--seed: was None, now 3"]),
        (
            "beta: 0.1\n  path: grün",
            "beta: 0\n  path: blau",
            ["--model.beta: was 0.1, now 0", "--model.path: was 'grün', now 'blau'"],
        ),
    ],
)
def test_resume_with_another_configuration(tmp_path, old, new, said):
    run = RunFolder(str(tmp_path))
    run.prepare(CONFIG, resume=False)
    changed = CONFIG.replace(old, new)
    with pytest.raises(ValueError, match="--resume with another configuration") as caught:
        run.prepare(changed, resume=True)
    head, *listed = str(caught.value).splitlines()
    assert str(tmp_path) in head and [line.strip() for line in listed] == said
    assert (tmp_path / "resolved_config.yaml").read_text(encoding="utf-8") == signed(CONFIG)


def test_order_and_layout_of_the_configuration_do_not_count(tmp_path):
    run = RunFolder(str(tmp_path))
    run.prepare("algo: sgpo\nmodel: {beta: 0.1}\n", resume=False)
    run.prepare("model:\n  beta: 0.1\nalgo: 'sgpo'\n", resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_folder_is_left_alone(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match="is not empty and not a run: choose another folder"):
        RunFolder(str(tmp_path)).prepare(CONFIG, resume)
    assert names(tmp_path) == ["thesis.tex"]


def test_path_is_absolute_wherever_the_process_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder("runs/first")
    monkeypatch.chdir("/")
    assert run.policy(2) == tmp_path / "runs" / "first" / "round_2" / "policy"


def test_manifests(tmp_path):
    run = RunFolder(str(tmp_path))
    assert run.manifest(1) == {"round": 1, "stages": {}} and not run.finished(1, "pairs")
    assert not run.round(1).exists()  # asking creates nothing
    run.finish(1, "pairs", {"pairs": 3})
    run.finish(1, "train", {})
    assert run.finished(1, "pairs") and run.finished(1, "train")
    assert not run.finished(1, "generate") and not run.finished(0, "pairs")
    again = RunFolder(str(tmp_path))
    assert again.manifest(1) == {"round": 1, "stages": {"pairs": {"pairs": 3}, "train": {}}}
    assert names(run.round(1)) == ["manifest.json"]
    run.finish(1, "pairs", {"pairs": 4})
    assert run.manifest(1)["stages"] == {"pairs": {"pairs": 4}, "train": {}}


def test_secrets_are_not_stored(tmp_path, monkeypatch):
    started = []
    monkeypatch.setenv("MY_KEY", "sesame-123")
    tracker = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    wandb = SimpleNamespace(Settings=SimpleNamespace, init=lambda **keywords: started.append(keywords) or tracker)
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def resolved(key):
        required = ["--model.model_name_or_path", "m", "--data.dataset", "d", "--ckpt.output_dir", str(tmp_path)]
        config, _ = load(["--algo", "dpo", *required, "--logger.wandb.key", key])
        return config, {"": config}

    config, tree = resolved("env:MY_KEY")
    run = RunFolder(config.ckpt.output_dir)
    run.prepare(flags.dump(tree), resume=False)
    metrics = Metrics(run.path, config, flags.to_dict(tree), writes=True)
    metrics.log("round 0", 1, {"loss": 1.0})
    metrics.close()
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written.keys() == {"resolved_config.yaml", "metrics.jsonl", "lock"}
    assert not any("sesame" in text for text in written.values())
    assert started[0].pop("settings").api_key == "sesame-123" and "sesame" not in repr(started)
    assert started[0]["config"]["ckpt"]["output_dir"] == str(tmp_path)
    # Another key is no other configuration, and `env` leaves the key to the environment.
    config, tree = resolved("env")
    run.prepare(flags.dump(tree), resume=True)
    Metrics(run.path, config, flags.to_dict(tree), writes=True).close()
    assert len(started) == 2 and started[1]["settings"] is None


ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from openrlhf_sgpo.run_folder import RunFolder
run = RunFolder(sys.argv[1])
run.prepare(sys.argv[2], False)
print("held", flush=True)
time.sleep(600)
"""
DIE_IN_WRITE = """
import os, signal, sys
from pathlib import Path
from openrlhf_sgpo.run_folder import RunFolder
left, replace = int(sys.argv[3]), Path.replace
def die_at_last(self, target):
    global left
    left -= 1
    return replace(self, target) if left else os.kill(os.getpid(), signal.SIGKILL)
Path.replace = die_at_last
RunFolder(sys.argv[1]).prepare(sys.argv[2], False, {"--data.dataset": "a"})
"""


@contextlib.contextmanager
def holder(path):
    """Another process that holds the folder; it is killed at the end."""
    command = [sys.executable, "-c", HOLD, str(path), CONFIG]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_in_use_by_another_process_is_refused_until_that_is_killed(tmp_path):
    path = tmp_path / "run"
    run = RunFolder(str(path))
    with holder(path) as process:
        for resume in (False, True):
            with pytest.raises(ValueError, match="is in use by") as caught:
                run.prepare(CONFIG, resume)
            named = f"--ckpt.output_dir {path} is in use by process {process.pid} on {socket.gethostname()}: "
            assert str(caught.value).startswith(named)
        # Somebody who is refused does not take the holder's name off.
        assert (path / "lock").read_text() == f"process {process.pid} on {socket.gethostname()}"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        run.prepare(CONFIG, resume=True)
        assert (path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_file_system_without_locks_is_named_with_its_remedy(tmp_path, monkeypatch):
    """As Lustre mounted without -o flock, where the call is not implemented."""

    def not_implemented(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", not_implemented)
    with pytest.raises(ValueError, match=f"{tmp_path} is on a file system without locks .Function not implemented"):
        RunFolder(str(tmp_path)).lock()


def test_a_folder_in_use_by_this_process_is_refused_too(tmp_path):
    first = RunFolder(str(tmp_path))
    first.prepare(CONFIG, resume=False)
    second = RunFolder(str(tmp_path))
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} "):
        second.prepare(CONFIG, resume=True)
    first.prepare(CONFIG, resume=True)  # its own lock does not stop it
    other = RunFolder(str(tmp_path / "other"))
    other.prepare(CONFIG, resume=False)
    del first
    gc.collect()
    second.prepare(CONFIG, resume=True)


def test_a_refused_run_stops_nobody_later(tmp_path):
    path = tmp_path / "run"
    run = RunFolder(str(path))
    run.prepare(CONFIG, resume=False)
    del run
    gc.collect()
    before = {name: (path / name).read_bytes() for name in names(path) if name != "lock"}
    for config, resume, reason in [
        (CONFIG, False, "already holds a run"),
        (CONFIG.replace("sgpo", "dpo"), True, "--resume with another configuration"),
    ]:
        refused = RunFolder(str(path))
        with pytest.raises(ValueError, match=reason):
            refused.prepare(config, resume)
        del refused
        gc.collect()
    assert {name: (path / name).read_bytes() for name in names(path) if name != "lock"} == before
    RunFolder(str(path)).prepare(CONFIG, resume=True)


def test_a_foreign_folder_that_is_cleared_can_be_used(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    run = RunFolder(str(tmp_path))
    with pytest.raises(ValueError, match="is not empty and not a run"):
        run.prepare(CONFIG, resume=False)
    (tmp_path / "thesis.tex").unlink()
    RunFolder(str(tmp_path)).prepare(CONFIG, resume=False)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("write", "left"), [(1, ["data.json.partial"]), (2, ["data.json", "resolved_config.yaml.partial"])]
)
def test_killed_before_the_configuration_was_stored(tmp_path, write, left, resume):
    path = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", DIE_IN_WRITE, str(path), CONFIG, str(write)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and names(path) == sorted([*left, "lock"])
    RunFolder(str(path)).prepare(CONFIG, resume, {"--data.dataset": "b"})
    assert RunFolder(str(path)).data() == {"--data.dataset": "b"}
    assert names(path) == ["data.json", "lock", "resolved_config.yaml"]


def test_totals_add_up_and_peaks_take_the_maximum(tmp_path):
    path = tmp_path / "ledger.json"
    ledger = Ledger(path, writes=True)
    for name, added in {
        "round_0/pairs": {"pairs": 3},
        "round_0/train": {"pairs": 4, "tokens_trained": 100, "peak_tokens": 7},
        "round_1/train": {"pairs": 5, "tokens_trained": 50, "peak_tokens": 2},
    }.items():
        with ledger.stage(name) as cost:
            cost.update(added)
    stored = read_json(path)
    assert stored["stages"] == ledger.stages
    entries = list(ledger.stages.values())
    total = stored["total"]
    assert (total["pairs"], total["tokens_trained"], total["peak_tokens"]) == (12, 150, 7)
    assert total["seconds"] == pytest.approx(sum(entry["seconds"] for entry in entries))
    assert total["peak_memory_gib"] == max(entry["peak_memory_gib"] for entry in entries) > 0


def test_seconds_are_those_of_the_stage(tmp_path, monkeypatch):
    clock = iter([100.0, 102.5])
    monkeypatch.setattr("openrlhf_sgpo.ledger.time.perf_counter", lambda: next(clock))
    ledger = Ledger(tmp_path / "ledger.json", writes=True)
    with ledger.stage("round_0/train"):
        pass
    assert ledger.stages["round_0/train"]["seconds"] == 2.5


def test_reloaded_ledger_continues(tmp_path):
    path = tmp_path / "ledger.json"
    with Ledger(path, writes=True).stage("round_0/train") as cost:
        cost["pairs"] = 3
    with Ledger(path, writes=True).stage("round_1/train") as cost:
        cost["pairs"] = 4
    stored = read_json(path)
    assert list(stored["stages"]) == ["round_0/train", "round_1/train"] and stored["total"]["pairs"] == 7
    # A stage that is done again replaces its entry.
    with Ledger(path, writes=True).stage("round_1/train") as cost:
        cost["pairs"] = 10
    assert read_json(path)["total"]["pairs"] == 13


def test_failed_stage_is_not_booked(tmp_path):
    ledger = Ledger(tmp_path / "ledger.json", writes=True)
    with pytest.raises(RuntimeError), ledger.stage("round_0/train"):
        raise RuntimeError
    assert ledger.stages == {} and names(tmp_path) == []


def test_stages_whose_parts_are_kept_add_up_also_when_they_fail(tmp_path):
    path = tmp_path / "ledger.json"

    def fail():
        with Ledger(path, writes=True).stage("judge", add=True) as cost:
            cost |= {"calls": 3, "peak_tokens": 9}
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    first = read_json(path)["stages"]["judge"]
    with Ledger(path, writes=True).stage("judge", add=True) as cost:
        cost |= {"calls": 4, "peak_tokens": 5, "failures": 1}
    entry = read_json(path)["stages"]["judge"]
    assert (entry["calls"], entry["peak_tokens"], entry["failures"]) == (7, 9, 1)
    assert entry["seconds"] >= first["seconds"]


def test_only_the_writing_rank_touches_the_disk(tmp_path):
    with Ledger(tmp_path / "ledger.json", writes=False).stage("round_0/train"):
        pass
    config = Config()
    config.logger.tensorboard_dir = str(tmp_path / "tensorboard")
    metrics = Metrics(tmp_path / "run", config, {}, writes=False)
    metrics.log("round 0", 1, {"loss": 1.0})
    metrics.close()
    assert names(tmp_path) == []


def test_metrics_are_written_at_once_and_appended_on_resume(tmp_path):
    expected = []
    for stage in ("round 0", "round 1"):
        metrics = Metrics(tmp_path / "run", Config(), {}, writes=True)
        for step in (1, 2):
            metrics.log(stage, step, {"train/loss": step / 8})
            expected.append({"stage": stage, "step": step, "train/loss": step / 8})
            assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == expected  # before close: a crash loses nothing
        metrics.close()


def test_logging_steps(tmp_path):
    config = Config()
    config.logger.logging_steps = 3
    metrics = Metrics(tmp_path, config, {}, writes=True)
    for stage in ("round 0", "round 1"):
        for step in range(1, 8):
            metrics.log(stage, step, {"loss": float(step)})
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        ("round 0", 3),
        ("round 0", 6),
        ("round 1", 3),
        ("round 1", 6),
    ]
    assert all(row["loss"] == row["step"] for row in rows)


def test_tensorboard_counts_over_all_stages(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config()
    config.logger.tensorboard_dir = str(tmp_path / "tensorboard")
    config.logger.wandb.run_name = "first"
    config.logger.logging_steps = 2
    metrics = Metrics(tmp_path, config, {}, writes=True)
    for stage in (0, 1):
        for step in (1, 2, 3):
            metrics.log(f"round {stage}", step, {"train/loss": stage + step / 8, "train/pairs": 4})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "first"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/pairs"}
    # Of steps 1 to 6 of the run, the second of each stage.
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 0.25), (5, 1.25)]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_trackers_get_the_same_names_and_the_follower_in_a_picture(name, tmp_path, monkeypatch):
    """Each package itself, reading back what it has stored."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which is read when trackio is imported
    pytest.importorskip(name)
    from report_folders import make_run

    from openrlhf_sgpo.report.tracked import track_round

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = make_run(tmp_path / "run", radius=0.1)
    config = Config()
    config.logger.wandb.run_name = "first"
    config.logger.wandb.key = "env" if name == "wandb" else ""
    config.logger.trackio_project = "curves" if name == "trackio" else ""
    config.logger.tensorboard_dir = str(tmp_path / "curves") if name == "tensorboard" else ""
    metrics = Metrics(tmp_path / "metrics", config, {"seed": 1}, writes=True)
    metrics.log("round 1", 1, {"train/loss": 0.5})
    track_round(metrics, run / "round_1", json.loads((run / "round_1/evaluation.json").read_text()))
    metrics.close()
    figures, picture = READ_BACK[name](tmp_path)
    assert {"train/loss", "eval/accuracy", "eval/margin", "eval/kl", "follower/value", "follower/gap"} <= set(figures)
    assert figures["train/loss"] == 0.5
    certificate = json.loads((run / "round_1/worst_case.json").read_text())
    assert figures["follower/threshold"] == pytest.approx(certificate["threshold"], rel=1e-6)
    assert picture.size == (640, 400) and len(picture.convert("RGB").getcolors(10**6)) > 10


def tensorboard_of(folder):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "curves" / "first")).Reload()
    figures = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    return figures, Image.open(io.BytesIO(events.Images("follower/margins")[0].encoded_image_string))


def trackio_of(folder):
    from PIL import Image
    from trackio.sqlite_storage import SQLiteStorage

    figures = {name: value for row in SQLiteStorage.get_logs("curves", "first") for name, value in row.items()}
    return figures, Image.open(folder / "trackio" / "media" / figures["follower/margins"]["file_path"])


def wandb_of(folder):
    from PIL import Image
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    figures, deadline = {}, time.monotonic() + 30
    while not figures and time.monotonic() < deadline:  # another process writes the file
        for record in map(wandb_internal_pb2.Record.FromString, leveldb_records(path.read_bytes())):
            for item in record.history.item:
                figures["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return figures, Image.open(next(path.parent.rglob("*.png")))


def leveldb_records(log):
    """Of LevelDB's log format, after W&B's header of 7 bytes: blocks of 32 KiB with chunks of checksum, length and kind."""
    place, whole = 7, b""
    while place < len(log):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        length, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        whole += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or the end of one
            yield whole
            whole = b""


READ_BACK = {"tensorboard": tensorboard_of, "trackio": trackio_of, "wandb": wandb_of}


def test_resume_with_other_data_is_refused(tmp_path):
    run = RunFolder(str(tmp_path / "run"))
    run.prepare("algo: dpo\n", resume=False, data={"--data.dataset": "a", "--eval.dataset": "b"})
    run.prepare("algo: dpo\n", resume=True, data={"--data.dataset": "a", "--eval.dataset": "b"})
    with pytest.raises(ValueError, match="--data.dataset changed since the run"):
        run.prepare("algo: dpo\n", resume=True, data={"--data.dataset": "other", "--eval.dataset": "b"})


def test_a_command_lets_go_of_its_folder_when_it_ends(tmp_path):
    """Whoever still refers to it: the traceback of its error, or a notebook."""
    holder = RunFolder(str(tmp_path / "run"))
    holder.lock()
    with pytest.raises(ValueError, match="is in use by"):
        RunFolder(str(tmp_path / "run")).lock()
    assert main(["train"]) == 2
    RunFolder(str(tmp_path / "run")).lock()
