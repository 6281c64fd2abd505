"""Bootstrap over clusters: intervals for ratios of sums where the items of one cluster are not independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from moe_interp.stats.checks import FloatArray, check_at_least, check_no_missing, check_probability, sample_last
from moe_interp.stats.intervals import Interval
from moe_interp.stats.streams import derive_rng

Statistic = Callable[..., FloatArray]


def cluster_bootstrap(
    sums: Sequence[ArrayLike],
    statistic: Statistic,
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a function of totals, resampling whole clusters.

    Each resample draws as many clusters as there are, with replacement, and adds up their sums; quantiles are taken at
    the levels of :func:`moe_interp.stats.bootstrap_interval` with ``expand``, with the number of clusters for n. A
    resample in which the statistic is not defined (an empty group) is left out of that statistic's quantiles.

    Args:
        sums: Arrays ``[cluster, ...]``: sums over each cluster's items, such as of a value and of its count.
        statistic: Called with the totals ``[resample, ...]`` of each array; returns ``[resample, ...]``, NaN where it
            is not defined. Such as ``lambda value, count: value / count``.

    Returns:
        The estimate, of the totals themselves, and its interval; NaN bounds with a single cluster.

    Source: Efron and Tibshirani (1993); clusters as in Cameron, Gelbach and Miller (2008). With few clusters (below
    about 20) or few that hold a group's items the interval is too short, whatever the number of items.
    """
    check_probability(level, "level")
    check_at_least(n_resamples, 1, "n_resamples")
    arrays = [sample_last(x, 0) for x in sums]  # [..., cluster]
    for array in arrays:
        check_no_missing(array, "sums")
    n = arrays[0].shape[-1]
    check_at_least(n, 1, "the number of clusters")
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = np.asarray(statistic(*[a.sum(-1)[None] for a in arrays]))[0]
        if n == 1:
            nothing = np.full(estimate.shape, np.nan)
            return Interval(estimate, nothing, nothing, nothing)
        counts = derive_rng(seed, "cluster_bootstrap").multinomial(n, np.full(n, 1 / n), size=n_resamples)
        # shape: (resample, cluster) x (..., cluster) -> (resample, ...)
        draws = np.asarray(statistic(*[np.tensordot(counts, a, axes=(1, a.ndim - 1)) for a in arrays]))
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    tails = scipy_stats.norm.cdf(np.sqrt(n / (n - 1)) * scipy_stats.t.ppf(tails, n - 1))
    flat = draws.reshape(len(draws), -1)
    bounds = np.full((2, flat.shape[1]), np.nan)
    usable = ~np.isnan(flat).all(0)
    bounds[:, usable] = np.nanquantile(flat[:, usable], tails, axis=0)
    low, high = bounds.reshape(2, *estimate.shape)
    return Interval(estimate, low, high, np.full(estimate.shape, level))
