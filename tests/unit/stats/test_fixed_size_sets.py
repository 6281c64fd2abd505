"""Pairs in random sets of a fixed size: against all sets, and against tables shuffled with their margins kept."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moe_interp.errors import DataError
from moe_interp.stats import pair_inclusion


@pytest.mark.parametrize(("n", "k"), [(6, 2), (6, 5), (5, 1), (7, 3), (2, 1), (5, 5), (4, 0)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_pairs_agree_with_the_sum_over_all_sets(n, k, spread):
    odds = np.exp(spread * np.random.default_rng(n * k).normal(size=n))
    sets = list(combinations(range(n), k))
    weights = np.array([np.prod(odds[list(members)]) for members in sets])
    expected = np.zeros((n, n))
    for members, weight in zip(sets, weights / weights.sum()):
        expected[np.ix_(members, members)] += weight
    np.testing.assert_allclose(pair_inclusion(np.diag(expected), k), expected, atol=1e-8)


def test_members_that_are_always_or_never_there():
    found = pair_inclusion([1, 0.5, 0.5, 0], 2)
    np.testing.assert_allclose(found, [[1, 0.5, 0.5, 0], [0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 0]], atol=1e-12)


def test_pairs_agree_with_routes_shuffled_under_fixed_use():
    """Swaps between two tokens that keep each token's number of experts and each expert's use: uniform over tables."""
    rng = np.random.default_rng(0)
    n_tokens, n, k = 200, 6, 2
    top = (-(rng.gumbel(size=(n_tokens, n)) + [2.0, 1.0, 0.5, 0, 0, -1.0])).argsort(1)[:, :k]
    sets = [set(row) for row in top.tolist()]
    total, taken = np.zeros((n, n)), 0
    for step, (a, b, u, v) in enumerate(zip(*rng.integers(0, n_tokens, (2, 30000)), *rng.random((2, 30000)))):
        only_a, only_b = sorted(sets[a] - sets[b]), sorted(sets[b] - sets[a])
        if only_a:
            x, y = only_a[int(u * len(only_a))], only_b[int(v * len(only_b))]
            sets[a], sets[b] = sets[a] - {x} | {y}, sets[b] - {y} | {x}
        if step > 2000 and step % 400 == 0:
            table = np.zeros((n_tokens, n))
            for row, members in enumerate(sets):
                table[row, list(members)] = 1
            total, taken = total + table.T @ table, taken + 1
    use = np.bincount(top.ravel(), minlength=n) / n_tokens
    np.testing.assert_allclose(pair_inclusion(use, k), total / taken / n_tokens, atol=0.01)
    replaced = np.outer(use, use)  # drawn with replacement: far off
    assert np.abs(replaced - total / taken / n_tokens)[0, 1] > 0.03


def test_many_members_and_rare_ones():
    pi = np.array([0.9, *np.geomspace(1e-6, 0.5, 255)])
    pi[1:] *= 7.1 / pi[1:].sum()
    pi = np.minimum(pi, 0.999)
    pi[0] += 8 - pi.sum()
    found = pair_inclusion(pi, 8)
    np.testing.assert_allclose(found.sum(1), 8 * pi, rtol=1e-6)
    np.testing.assert_array_equal(found, found.T)
    assert found.min() >= -1e-12


@pytest.mark.parametrize(("pi", "k"), [([0.5, 0.6], 1), ([1.5, -0.5], 1), ([[0.5, 0.5]], 1), ([0.5, 0.5], -1)])
def test_chances_that_are_none_are_refused(pi, k):
    with pytest.raises(DataError):
        pair_inclusion(pi, k)
