"""Smallest sets, their Jaccard index and its value by chance; intervals over the units of pairs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moe_interp import stats
from moe_interp.errors import ConfigError, DataError


def test_smallest_sets_by_hand() -> None:
    mass = [[5, 3, 1, 1], [4, 4, 1, 1], [10, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    found = stats.smallest_sets(mass, p=0.8)
    assert found.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert stats.smallest_sets([1, 1, 1, 1], p=0.5).tolist() == [True, True, False, False]
    assert stats.smallest_sets([1, 0, 2], p=1.0).tolist() == [True, False, True]


@pytest.mark.parametrize("p", [0.3, 0.8, 1.0])
def test_no_smaller_set_holds_the_mass(p: float) -> None:
    rng = np.random.default_rng(0)
    for mass in rng.integers(0, 6, size=(30, 6)):
        size = int(stats.smallest_sets(mass, p).sum())
        holds = [k for k in range(7) for s in combinations(range(6), k) if mass[list(s)].sum() >= p * mass.sum()]
        assert size == min(holds)


def test_jaccard_and_its_chance_level_against_all_pairs_of_sets() -> None:
    a, b = np.array([1, 1, 0, 0], dtype=bool), np.array([1, 0, 1, 1], dtype=bool)
    assert stats.jaccard(a, b) == pytest.approx(0.25)
    assert np.isnan(stats.jaccard(~(a | ~a), ~(a | ~a)))
    sets = {k: [np.isin(np.arange(5), s) for s in combinations(range(5), k)] for k in range(6)}
    for one, two in ((1, 1), (2, 3), (5, 4), (0, 2)):
        every = [float(stats.jaccard(s, t)) for s in sets[one] for t in sets[two]]
        assert stats.expected_jaccard(one, two, 5) == pytest.approx(np.mean(every))
    assert np.isnan(stats.expected_jaccard(0, 0, 5))


def test_pairs_are_left_out_with_their_unit() -> None:
    """The interval of a mean over pairs: a loop of deletions, handed to the interval of leave-one-out values."""
    rng = np.random.default_rng(1)
    first, second = np.triu_indices(7)  # pairs within a unit among them
    values = rng.normal(size=(2, len(first)))
    found = stats.pair_interval([values], first, second, lambda x, n: x / n[:, None], n_units=9)
    without = [values[:, (first != u) & (second != u)].mean(1) for u in range(7)]
    expected = stats.jackknife_interval(values.mean(1), np.stack(without, axis=1))
    assert found.estimate == pytest.approx(values.mean(1))
    assert found.low == pytest.approx(expected.low)
    assert found.high == pytest.approx(expected.high)
    assert np.asarray(found.n).tolist() == [7, 7]


def test_one_pair_a_unit_gives_the_interval_of_clusters() -> None:
    x = np.random.default_rng(2).normal(size=12)
    unit = np.arange(12)
    found = stats.pair_interval([x], unit, unit, lambda total, n: total / n, n_units=12)
    expected = stats.mean_interval(x)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_a_mean_over_pairs_is_covered() -> None:
    """The mean of x_i x_j has expectation mu^2."""
    rng = np.random.default_rng(3)
    first, second = np.triu_indices(20, 1)
    x = 1 + rng.normal(size=(400, 20))
    found = stats.pair_interval([x[:, first] * x[:, second]], first, second, lambda s, n: s / n[:, None], n_units=20)
    assert np.mean((found.low <= 1) & (found.high >= 1)) > 0.92


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="p=0"):
        stats.smallest_sets([1, 2], p=0)
    with pytest.raises(DataError, match="mass that is negative"):
        stats.smallest_sets([-1, 2])
    with pytest.raises(DataError, match=r"values of shape \(3,\) for 2 pairs"):
        stats.pair_interval([[1.0, 2, 3]], [0, 1], [1, 2], lambda x, n: x / n, n_units=3)
