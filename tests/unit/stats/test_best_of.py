"""The best of a random subset, against enumeration and by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import best_of, in_top


def test_by_hand() -> None:
    x, standard = np.log([0.2, 0.4, 0.8]), np.log(0.4)
    found = best_of(x, standard, [1, 2, 3])
    # the best of two: .4 once, .8 twice of three pairs
    np.testing.assert_allclose(found.gap, [1.4 / 3 - 0.4, (0.4 + 0.8 + 0.8) / 3 - 0.4, 0.4])
    np.testing.assert_allclose(found.regret, np.log(2) * np.array([1 / 3, 2 / 3, 1]))
    np.testing.assert_allclose(found.positive_rate, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(in_top(x, standard, 3, 1), 0)
    np.testing.assert_allclose(in_top(x, standard, 3, 2), 1)
    np.testing.assert_allclose(in_top(x, standard, 1, 1), 2 / 3)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_equals_the_mean_over_all_subsets(size: int) -> None:
    rng = np.random.default_rng(0)
    x, standard = -rng.exponential(size=(3, 2, 6)), -rng.exponential(size=(3, 2))
    x[0, 0, 4:] = np.nan  # four alternatives
    x[1, 1, :] = np.nan
    found = best_of(x, standard, [size])
    for at in np.ndindex(3, 2):
        present, s = x[at][~np.isnan(x[at])], standard[at]
        subsets = [np.array(subset) for subset in combinations(present, size)]
        if not subsets:
            assert np.isnan([found.gap[0][at], found.regret[0][at], found.positive_rate[0][at]]).all()
            assert np.isnan(in_top(x, standard, size, 1)[at])
            continue
        best = np.array([subset.max() for subset in subsets])
        np.testing.assert_allclose(found.gap[0][at], np.mean(np.exp(best)) - np.exp(s))
        np.testing.assert_allclose(found.regret[0][at], np.mean(np.maximum(best - s, 0)), atol=1e-14)
        np.testing.assert_allclose(found.positive_rate[0][at], np.mean(best > s), atol=1e-14)
        for k in (1, 3):
            expected = np.mean([(subset > s).sum() < k for subset in subsets])
            np.testing.assert_allclose(in_top(x, standard, size, k)[at], expected, atol=1e-12)


def test_order_of_alternatives_does_not_matter_and_more_of_them_are_never_worse() -> None:
    rng = np.random.default_rng(1)
    x, standard = rng.normal(-1, 1, (20, 32)), rng.normal(-1, 1, 20)
    sizes = [1, 2, 8, 32]
    found, shuffled = best_of(x, standard, sizes), best_of(x[:, rng.permutation(32)], standard, sizes)
    np.testing.assert_allclose(found.regret, shuffled.regret)
    assert (np.diff(found.regret, axis=0) >= 0).all()
    assert (np.diff(found.gap, axis=0) >= 0).all()
    np.testing.assert_allclose(found.regret[-1], np.maximum(x.max(-1) - standard, 0))


def test_errors() -> None:
    with pytest.raises(ConfigError, match="the size of a subset is 0"):
        best_of([[1.0]], [0.0], [0])
    with pytest.raises(ConfigError, match="k is 0"):
        in_top([[1.0]], [0.0], 1, 0)
    with pytest.raises(DataError, match="standard holds 1 missing"):
        best_of([[1.0]], [np.nan], [1])
