"""The human seed: farthest points against the definition, random seeds, flipped labels."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_sgpo.data import Pair
from openrlhf_sgpo.data.seed import farthest_points, flip_labels, select_seed


def distances(embeddings):
    """(N, N) cosine distances, one pair at a time."""
    rows = [row / row.norm() for row in embeddings.double()]
    return [[1 - float((row * other).sum()) for other in rows] for row in rows]


def greedy(embeddings, count, first, merit):
    """Each new point has the largest merit of its distances to all chosen so far; O(N^2 * count)."""
    table, chosen = distances(embeddings), [first]
    while len(chosen) < count:
        others = [index for index in range(len(table)) if index not in chosen]
        chosen.append(max(others, key=lambda index: merit(table[index][point] for point in chosen)))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_farthest_points_are_the_greedy_maximum_of_the_least_distance(seed):
    embeddings = torch.randn(25, 3, generator=torch.Generator().manual_seed(seed))
    before = embeddings.clone()
    for count in (1, 2, 12, 25):
        assert farthest_points(embeddings, count, first=seed) == greedy(embeddings, count, seed, min)
    assert torch.equal(embeddings, before)


@settings(max_examples=50)
@given(st.data())
def test_every_choice_is_farthest_whatever_ties(data):
    axis = st.integers(-2, 2).map(float)
    point = st.tuples(axis, axis, axis).filter(any)
    embeddings = torch.tensor(data.draw(st.lists(point, min_size=1, max_size=10)))
    count = data.draw(st.integers(1, len(embeddings)))
    chosen = farthest_points(embeddings, count, data.draw(st.integers(0, len(embeddings) - 1)))
    assert len(set(chosen)) == count
    table = distances(embeddings)
    for step in range(1, count):
        least = [min(table[index][earlier] for earlier in chosen[:step]) for index in range(len(table))]
        free = [least[index] for index in range(len(table)) if index not in chosen[:step]]
        assert least[chosen[step]] >= max(free) - 1e-6


def test_not_the_largest_sum_of_distances():
    # Two clusters a right angle apart and one point in between. The sum prefers a near-duplicate on the rim.
    degrees = torch.deg2rad(torch.tensor([0.0, 1.0, 2.0, 45.0, 88.0, 89.5, 90.0]))
    embeddings = torch.stack([degrees.cos(), degrees.sin()], dim=1)
    assert farthest_points(embeddings, 3, first=0) == [0, 6, 3]
    assert greedy(embeddings, 3, 0, sum) == [0, 6, 5]


def test_duplicates_come_last():
    generator = torch.Generator().manual_seed(1)
    distinct = torch.randn(6, 4, generator=generator)
    scales = torch.tensor([1.0, 3.0, 0.2])  # the length of an embedding is no distance
    order = torch.randperm(18, generator=generator)
    embeddings = (scales[:, None, None] * distinct).reshape(18, 4)[order]
    kind = (torch.arange(18) % 6)[order]
    for first in range(18):
        chosen = farthest_points(embeddings, 18, first)
        assert sorted(chosen) == list(range(18))
        assert len(set(kind[chosen[:6]].tolist())) == 6


@pytest.mark.parametrize("count", [0, -1, 4])
def test_impossible_counts(count):
    with pytest.raises(ValueError, match=f"cannot select {count} of 3 points"):
        farthest_points(torch.eye(3), count, 0)


def make_pairs(count):
    return [
        Pair(
            id=f"pair-{index}",
            prompt=[{"role": "user", "content": str(index)}],
            chosen=f"good {index}",
            rejected=f"bad {index}",
            chosen_truncated=index % 2 == 0,
            rejected_truncated=index % 3 == 0,
            scores=[{}, {"chosen": 2.0, "rejected": 1.0, "margin": float(index)}, {"chosen": 3.0}][index % 3],
        )
        for index in range(count)
    ]


def test_random_seed():
    pairs = make_pairs(30)
    chosen = select_seed(pairs, 10, seed=1)
    positions = [pairs.index(pair) for pair in chosen]
    assert len(set(positions)) == 10 and positions == sorted(positions)
    assert select_seed(pairs, 10, seed=1) == chosen
    assert len({tuple(pair.id for pair in select_seed(pairs, 10, seed)) for seed in range(5)}) == 5
    # Every pair can be chosen.
    assert {pair.id for seed in range(40) for pair in select_seed(pairs, 10, seed)} == {pair.id for pair in pairs}


def test_seed_of_size_0_is_everything():
    pairs = make_pairs(5)
    everything = select_seed(pairs, 0, seed=3)
    assert everything == pairs and everything is not pairs
    assert select_seed(pairs, 5, seed=3) == pairs
    assert select_seed(pairs, 0, seed=3, embeddings=torch.eye(5)) == pairs


def test_seed_of_farthest_points():
    pairs = make_pairs(12)
    embeddings = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    firsts = set()
    for seed in range(10):
        chosen = [pairs.index(pair) for pair in select_seed(pairs, 5, seed, embeddings)]
        assert chosen == greedy(embeddings, 5, chosen[0], min)
        assert chosen == [pairs.index(pair) for pair in select_seed(pairs, 5, seed, embeddings)]
        firsts.add(chosen[0])
    assert len(firsts) > 1


@pytest.mark.parametrize("embeddings", [None, torch.eye(3)])
def test_seed_larger_than_the_data(embeddings):
    with pytest.raises(ValueError, match=r"--seed\.size 4 exceeds the 3 pairs of --data\.dataset"):
        select_seed(make_pairs(3), 4, 0, embeddings)


@pytest.mark.parametrize(
    ("count", "rate", "flips"), [(20, 0.0, 0), (20, 0.25, 5), (21, 1 / 3, 7), (10, 0.26, 3), (20, 1.0, 20), (0, 0.5, 0)]
)
def test_flips_exactly_the_rate(count, rate, flips):
    pairs, copies = make_pairs(count), make_pairs(count)
    flipped = flip_labels(pairs, rate, seed=5)
    assert pairs == copies  # the input keeps its labels
    assert [pair.flipped for pair in flipped].count(True) == flips
    for before, after in zip(pairs, flipped, strict=True):
        mirrored = replace(
            before,
            chosen=before.rejected,
            rejected=before.chosen,
            chosen_truncated=before.rejected_truncated,
            rejected_truncated=before.chosen_truncated,
            scores=[{}, {"rejected": 2.0, "chosen": 1.0, "margin": before.scores.get("margin")}, {"rejected": 3.0}][
                int(before.id.removeprefix("pair-")) % 3
            ],
            flipped=True,
        )
        assert after == (mirrored if after.flipped else before)


def test_flips_are_drawn_by_the_seed():
    pairs = make_pairs(40)
    once = flip_labels(pairs, 0.3, seed=5)
    random.seed(0)  # the global generator has no say
    assert flip_labels(pairs, 0.3, seed=5) == once
    assert len({tuple(pair.flipped for pair in flip_labels(pairs, 0.3, seed)) for seed in range(5)}) == 5
    twice = flip_labels(once, 0.3, seed=5)
    assert [replace(pair, flipped=False) for pair in twice] == pairs
