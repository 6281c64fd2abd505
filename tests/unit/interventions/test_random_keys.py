"""Streams of random numbers: fixed, uniform, and independent of one another."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from moe_interp.interventions.random_keys import layer_labels, uniform_keys

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """One output of splitmix64, as in its authors' C code, in Python's own integers."""
    z = (state + GAMMA) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def key_by_hand(position: int, column: int, *labels: int) -> float:
    state = splitmix64(position & MASK)
    for label in labels:
        state = splitmix64(state ^ (label & MASK))
    return ((splitmix64((state + (column + 1) * GAMMA) & MASK) >> 12) + 0.5) / 2**52


def test_the_generator_by_hand_is_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # of seed 1234567
    assert [splitmix64((1234567 + i * GAMMA) & MASK) for i in range(3)] == published


def test_keys_agree_with_an_implementation_in_python_integers() -> None:
    for position, labels in [(0, ()), (5, (0,)), (3, (7, 2)), (-2, (-9, 4, 1)), (2**40, (2**62, 0, 3, 12))]:
        keys = uniform_keys(torch.tensor(position), 4, *labels)
        assert keys.tolist() == [key_by_hand(position, column, *labels) for column in range(4)]


def test_keys_are_fixed_for_good() -> None:
    keys = uniform_keys(torch.arange(2), 2, 0, 1)
    expected = [[0.18670452030252627, 0.45453079945154873], [0.25701603785617777, 0.11530783791106669]]
    assert keys.tolist() == expected


def test_labels_broadcast_and_each_key_depends_on_its_own_labels_alone() -> None:
    position, row = torch.arange(6), torch.arange(4).unsqueeze(1)
    keys = uniform_keys(position.expand(4, 6), 3, 11, row)
    assert keys.shape == (4, 6, 3)
    for r in range(4):
        for p in range(6):
            assert torch.equal(keys[r, p], uniform_keys(torch.tensor(p), 3, 11, r))
    assert torch.equal(uniform_keys(position, 5, 2)[:, :3], uniform_keys(position, 3, 2))


def grid() -> Tensor:
    """``[position, seed, layer, row, column]`` keys of small labels, as they are used."""
    position = torch.arange(24).view(-1, 1, 1, 1)
    seed, layer, row = (torch.arange(n).view(shape) for n, shape in [(8, (-1, 1, 1)), (6, (-1, 1)), (6, (-1,))])
    return uniform_keys(position.expand(24, 8, 6, 6), 8, seed, layer, row)


def test_keys_are_uniform_between_zero_and_one() -> None:
    keys = grid().flatten().numpy()
    assert 0 < keys.min() < keys.max() < 1
    assert stats.kstest(keys, "uniform").pvalue > 0.01
    for axis_mean in (grid().mean(dim=tuple(a for a in range(5) if a != axis)) for axis in range(5)):
        per_value = keys.size / len(axis_mean)
        z = (axis_mean.numpy() - 0.5) * np.sqrt(12 * per_value)
        assert stats.kstest(z, "norm").pvalue > 0.001


def test_no_two_small_labels_share_their_numbers() -> None:
    """Position and seed, or seed and layer, in each other's place must not give the same draws."""
    keys = grid()[..., :2].reshape(-1, 2)
    assert len(torch.unique(keys, dim=0)) == len(keys)


@pytest.mark.parametrize("axis", range(5))
def test_neighbours_along_every_label_are_independent(axis: int) -> None:
    keys = grid().movedim(axis, 0)
    for lag in (1, 2, 3):
        a, b = keys[:-lag].flatten().numpy(), keys[lag:].flatten().numpy()
        counts = np.histogram2d(a, b, bins=8, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(counts.flatten()).pvalue > 0.001
        assert abs(stats.spearmanr(a, b).statistic) < 4 / np.sqrt(a.size)


def test_the_largest_keys_are_a_uniform_subset() -> None:
    drawn = uniform_keys(torch.arange(14_000), 8, 3).topk(3, dim=-1).indices.sort(dim=-1).values
    subsets = dict.fromkeys(combinations(range(8), 3), 0)
    for subset in drawn.tolist():
        subsets[tuple(subset)] += 1
    assert stats.chisquare(list(subsets.values())).pvalue > 0.01
    order = uniform_keys(torch.arange(14_000), 8, 4).argmax(dim=-1)
    assert stats.chisquare(torch.bincount(order, minlength=8).numpy()).pvalue > 0.01


def test_layers_of_a_stack_have_streams_of_their_own() -> None:
    labels = [layer_labels(layer) for layer in (0, 1, ("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1))]
    assert labels[1] == (0, 1)
    assert len(set(labels)) == 6
