"""Copies of folders on machines of engines that do not see those of rank 0; on a cluster: ``tests/test_ray_launcher.py``."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import numpy
import pytest

from openrlhf_sgpo.rollout.folders import Copies
from openrlhf_sgpo.shared_files import KEPT, stamps_of


@pytest.fixture
def copies(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Copies()


def write(folder: Path, content: bytes) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(content)
    (folder / "empty").touch()
    return folder


def send(copies: Copies, folder: Path, content: bytes) -> Path:
    """What rank 0 does, from another machine: the folder cannot be seen under its name."""
    name, expected = str(folder), stamps_of(write(folder, content))
    assert expected and copies.place(name, expected) == name, "a folder that is seen is not copied"
    folder.rename(folder.with_suffix(".elsewhere"))
    assert copies.place(name, expected) is None
    copies.begin(name, expected)
    for start in (0, 2):
        copies.append(
            name, "adapter/weights", numpy.frombuffer(content[start:][: 2 if start == 0 else None], numpy.uint8)
        )
    place = copies.place(name, expected)
    assert place
    return Path(place)


def test_a_copy_has_the_same_files(copies, tmp_path):
    place = send(copies, tmp_path / "policy", b"weights")
    assert (place / "adapter" / "weights").read_bytes() == b"weights" and (place / "empty").read_bytes() == b""
    assert place.name == "policy"


def test_a_folder_that_has_changed_is_copied_again_and_the_old_copy_goes(copies, tmp_path):
    before = send(copies, tmp_path / "policy", b"weights")
    (tmp_path / "policy.elsewhere").rename(tmp_path / "first")
    after = send(copies, tmp_path / "policy", b"other weights")
    assert (after / "adapter" / "weights").read_bytes() == b"other weights" and not before.exists()


def test_as_many_copies_are_kept_as_by_ranks(copies, tmp_path):
    places = [send(copies, tmp_path / f"round_{number}", b"weights") for number in range(KEPT + 1)]
    assert [place.exists() for place in places] == [False] + [True] * KEPT


def test_nothing_stays(copies, tmp_path):
    """Neither at the end, nor of a process that was ended by force."""
    place = send(copies, tmp_path / "policy", b"weights")
    nobody, of_others = (tmp_path / f"sgpo-engine-{name}" for name in (f"{2**30}-abc", "backup"))
    for folder in (nobody, of_others):
        folder.mkdir()
    second = Copies()
    assert place.exists() and of_others.exists() and not nobody.exists()
    assert second.root != copies.root and stat.S_IMODE(os.stat(second.root).st_mode) == 0o700
    copies.clear()
    assert not place.exists() and not Path(copies.root).exists()
