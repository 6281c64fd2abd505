"""Bootstrap over clusters: against scipy, its coverage, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import bootstrap_interval, cluster_bootstrap


def ratio(value: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    return value / count


def test_clusters_of_one_item_are_the_plain_bootstrap() -> None:
    x = np.random.default_rng(0).exponential(size=60)
    found = cluster_bootstrap([x, np.ones(60)], ratio, n_resamples=4000)
    plain = bootstrap_interval(x, n_resamples=4000)
    assert found.estimate == pytest.approx(x.mean())
    np.testing.assert_allclose([found.low, found.high], [plain.low, plain.high], rtol=0.03)


def test_agrees_with_scipy_on_a_ratio_of_sums() -> None:
    rng = np.random.default_rng(1)
    count = rng.integers(1, 9, 80).astype(float)
    value = count * rng.normal(2, 1, 80)
    found = cluster_bootstrap([value, count], ratio, n_resamples=4000)
    other = scipy.stats.bootstrap(
        (value, count),
        lambda v, c, axis: v.sum(axis) / c.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert found.estimate == pytest.approx(value.sum() / count.sum())
    np.testing.assert_allclose([found.low, found.high], [other.low, other.high], atol=0.04)


def test_items_of_a_cluster_are_not_taken_as_independent() -> None:
    shared = np.random.default_rng(3).normal(size=25)
    items = np.repeat(shared, 40)  # forty equal items a cluster
    found = cluster_bootstrap([40 * shared, np.full(25, 40.0)], ratio)
    naive = bootstrap_interval(items)
    assert found.high - found.low > 5 * (naive.high - naive.low)


def test_covers_at_the_level_asked_for() -> None:
    rng, hits = np.random.default_rng(4), 0
    for trial in range(300):
        value = rng.normal(size=(20, 1)) + rng.normal(size=(20, 5))
        found = cluster_bootstrap([value.sum(1), np.full(20, 5.0)], ratio, n_resamples=400, seed=trial)
        hits += int(found.low <= 0 <= found.high)
    assert 0.91 <= hits / 300 <= 0.985


def test_shapes_differences_and_empty_groups() -> None:
    rng = np.random.default_rng(5)
    value, count = rng.normal(size=(12, 2, 3)), np.ones((12, 2, 3))
    value[:, 1, 2], count[:, 1, 2] = 0, 0
    found = cluster_bootstrap([value, count], ratio)
    assert found.estimate.shape == (2, 3)
    assert np.isnan([found.estimate[1, 2], found.low[1, 2], found.high[1, 2]]).all()
    np.testing.assert_allclose(found.estimate[0], value[:, 0].mean(0))
    # resampled as one, a difference with itself is nothing
    none = cluster_bootstrap([value[:, 0], value[:, 0]], lambda a, b: a - b)
    np.testing.assert_allclose([none.low, none.high], 0, atol=1e-12)


def test_one_cluster_has_no_interval_and_missing_sums_are_refused() -> None:
    found = cluster_bootstrap([[3.0], [2.0]], ratio)
    assert found.estimate == 1.5
    assert np.isnan([found.low, found.high]).all()
    with pytest.raises(DataError, match="sums holds 1 missing values"):
        cluster_bootstrap([[np.nan, 1.0], [1.0, 1.0]], ratio)
    with pytest.raises(ConfigError, match="number of clusters is 0"):
        cluster_bootstrap([np.zeros(0), np.zeros(0)], ratio)
