"""Pictures: the same bytes every time, everything named, nothing half-written, wrong input refused."""

import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from openrlhf_sgpo.games import draw_paths
from openrlhf_sgpo.games.simplex import COLOURS, CORNERS, SHAPES, to_plane

PATHS = {"first way": np.array([[0.2, 0.3, 0.5], [0.4, 0.3, 0.3], [0.5, 0.2, 0.3]]), "second way": np.eye(3)}
TARGETS = {"Nash": np.array([0.5, 0.2, 0.3]), "SLHF": np.array([1.0, 0.0, 0.0])}


def test_corners_are_the_three_actions():
    assert to_plane(np.eye(3)).tolist() == CORNERS.tolist()
    sides = [np.linalg.norm(CORNERS[i] - CORNERS[i - 1]) for i in range(3)]
    assert sides == pytest.approx([1, 1, 1])
    assert to_plane([1 / 3] * 3) == pytest.approx(CORNERS.mean(axis=0))


def test_picture_is_valid_names_everything_and_is_the_same_every_time(tmp_path):
    first = draw_paths(
        PATHS, TARGETS, tmp_path / "new" / "a.svg", actions=("rock", "paper", "scissors"), title="A game"
    )
    with matplotlib.rc_context(
        {"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": None, "savefig.transparent": True}
    ):
        second = draw_paths(PATHS, TARGETS, tmp_path / "b.svg", actions=("rock", "paper", "scissors"), title="A game")
        assert matplotlib.rcParams["font.size"] == 30  # the user's own settings are left alone
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.svg", "b.svg"]
    text = first.read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert (
        "dc:date" not in text and "matplotlib.org" not in text.split("<defs>")[0]
    )  # would differ tomorrow, or elsewhere
    for name in (*PATHS, *TARGETS, "rock", "paper", "scissors", "A game"):
        assert f"<!-- {name} -->" in text  # how matplotlib keeps the words of a text drawn as outlines
    for colour in COLOURS[:2]:
        assert colour.lower() in text.lower()
    assert COLOURS[2].lower() not in text.lower()


def test_another_path_is_another_picture(tmp_path):
    first = draw_paths(PATHS, TARGETS, tmp_path / "a.svg").read_bytes()
    moved = {**PATHS, "first way": PATHS["first way"][:, [1, 0, 2]]}
    assert draw_paths(moved, TARGETS, tmp_path / "b.svg").read_bytes() != first
    assert draw_paths(PATHS, {**TARGETS, "Nash": [0.2, 0.5, 0.3]}, tmp_path / "c.svg").read_bytes() != first


def test_a_picture_without_paths_or_targets(tmp_path):
    assert draw_paths({}, {}, tmp_path / "empty.svg").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": {"x": np.ones(3) / 3}}, r"paths\['x'\] has shape \(3,\)"),
        ({"paths": {"x": np.ones((4, 2)) / 2}}, r"paths\['x'\] has shape \(4, 2\)"),
        ({"paths": {"x": np.zeros((0, 3))}}, r"paths\['x'\] has shape \(0, 3\)"),
        ({"paths": {"x": [[0.5, 0.5, 0.5]]}}, "not probabilities"),
        ({"paths": {"x": [[float("nan"), 0.5, 0.5]]}}, "not probabilities"),
        ({"targets": {"y": [1.5, -0.5, 0.0]}}, r"targets\['y'\] has values that are not probabilities"),
        ({"targets": {str(i): np.ones(3) / 3 for i in range(len(SHAPES) + 1)}}, "11 targets but only 10 shapes"),
        ({"actions": ("A", "B")}, "three corners"),
        ({"path": "picture.png"}, "must end in .svg"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(tmp_path, change, message):
    arguments = {"paths": PATHS, "targets": TARGETS, "path": "picture.svg", **change}
    with pytest.raises(ValueError, match=message):
        draw_paths(**{**arguments, "path": tmp_path / arguments["path"]})
    assert not list(tmp_path.iterdir())
