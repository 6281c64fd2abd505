"""Bootstrap over clusters: intervals for ratios of sums where the items of one cluster are not independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from moe_interp.stats.checks import FloatArray, check_at_least, check_probability, sample_last
from moe_interp.stats.intervals.means import Interval
from moe_interp.stats.intervals.small_samples import cluster_interval
from moe_interp.stats.random_generators import derive_rng

Statistic = Callable[..., FloatArray]


def cluster_bootstrap(
    sums: Sequence[ArrayLike],
    statistic: Statistic,
    *,
    sizes: ArrayLike | None = None,
    level: float = 0.95,
    bounds: tuple[float, float] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a function of totals, resampling whole clusters, stretched so that it covers.

    Each resample draws as many clusters as there are, with replacement, and adds up their sums; quantiles are taken at
    the levels of :func:`moe_interp.stats.bootstrap_interval` with ``expand``, with the number of clusters for n. A
    resample in which the statistic is not defined (an empty group) is left out of that statistic's quantiles. Alone
    this covers too little: .88 with 10 and .91 with 50 clusters of unequal size and skewed values. So the interval is
    stretched to hold that of :func:`moe_interp.stats.cluster_interval`, which has no resampling and is faster.

    Args:
        sums: Arrays ``[cluster, ...]``: sums over each cluster's items, such as of a value and of its count.
        statistic: Called with the totals ``[resample, ...]`` of each array; returns ``[resample, ...]``, NaN where it
            is not defined. Such as ``lambda value, count: value / count``.
        sizes, bounds: As in :func:`moe_interp.stats.cluster_interval`.

    Returns:
        The estimate, of the totals themselves, and its interval; NaN bounds where fewer than two clusters have a part,
        or where the statistic is not defined without one of them.

    Source: Efron and Tibshirani (1993); clusters as in Cameron, Gelbach and Miller (2008).
    """
    check_probability(level, "level")
    check_at_least(n_resamples, 1, "n_resamples")
    sure = cluster_interval(sums, statistic, sizes=sizes, level=level)
    arrays = [sample_last(x, 0) for x in sums]  # [..., cluster]
    n = arrays[0].shape[-1]
    if n == 1:
        return sure
    counts = derive_rng(seed, "cluster_bootstrap").multinomial(n, np.full(n, 1 / n), size=n_resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        # shape: (resample, cluster) x (..., cluster) -> (resample, ...)
        draws = np.asarray(statistic(*[np.tensordot(counts, a, axes=(1, a.ndim - 1)) for a in arrays]))
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    tails = scipy_stats.norm.cdf(np.sqrt(n / (n - 1)) * scipy_stats.t.ppf(tails, n - 1))
    flat = draws.reshape(len(draws), -1)
    ends = np.full((2, flat.shape[1]), np.nan)
    usable = ~np.isnan(flat).all(0)
    ends[:, usable] = np.nanquantile(flat[:, usable], tails, axis=0)
    low, high = ends.reshape(2, *sure.estimate.shape)
    low, high = np.minimum(low, sure.low), np.maximum(high, sure.high)
    if bounds is not None:
        low, high = np.clip(low, *bounds), np.clip(high, *bounds)
    return Interval(sure.estimate, low, high, sure.attained, sure.n)
