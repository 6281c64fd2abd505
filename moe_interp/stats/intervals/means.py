"""Intervals for a row's centre that hold exactly at every n: from order statistics and from Walsh averages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from moe_interp.stats.checks import FloatArray, check_probability, sample_last
from moe_interp.stats.significance.wilcoxon import signed_rank_null


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval over the leading axes.

    ``attained`` is the coverage that an exact interval guarantees (at least the level asked for); for any other it is
    what the interval covers at this number of units, tabulated in docs/stats-coverage.md. ``n`` is the number of
    independent units behind it, where they are counted.
    """

    estimate: FloatArray
    low: FloatArray
    high: FloatArray
    attained: FloatArray
    n: NDArray[np.int64] | None = None


def median_interval(x: ArrayLike, *, axis: int = -1, level: float = 0.95) -> Interval:
    """Exact interval of the median from order statistics: [x_(k), x_(n+1-k)].

    k is the largest with 1 - 2 P(Binomial(n, 1/2) < k) >= ``level``. It holds for every continuous law, at every n
    (conservative with ties). Below 6 items no such interval exists at .95: it is (-inf, inf). NaN is a missing item.

    Source: Thompson (1936). The median says nothing of the mean, which is what a skewed delta moves.
    """
    check_probability(level, "level")
    return _by_count(sample_last(x, axis), level, _median_rows)


def pseudomedian_interval(x: ArrayLike, *, axis: int = -1, level: float = 0.95) -> Interval:
    """Hodges-Lehmann estimate (median of the Walsh averages (x_i + x_j) / 2, i <= j) and its exact interval.

    The interval [a_(k), a_(M+1-k)], M = n (n + 1) / 2, inverts the signed-rank test: k is the largest with
    1 - 2 P(W+ < k) >= ``level``. Exact for symmetric continuous laws; ties make it conservative. Below 6 items it is
    (-inf, inf) at .95. NaN is a missing item.

    Source: Hodges & Lehmann (1963), Tukey (1949). For a skewed law the pseudomedian is neither mean nor median.
    """
    check_probability(level, "level")
    return _by_count(sample_last(x, axis), level, _pseudomedian_rows)


def _by_count(
    values: FloatArray, level: float, rows_interval: Callable[[FloatArray, float], tuple[FloatArray, ...]]
) -> Interval:
    """Apply an exact interval to rows grouped by how many items they have."""
    lead = values.shape[:-1]
    rows = np.sort(values.reshape(-1, values.shape[-1]), axis=-1)  # NaN sorts last
    counts = (~np.isnan(rows)).sum(-1)
    out = np.full((4, len(rows)), np.nan)
    for n in np.unique(counts[counts > 0]):
        out[:, counts == n] = rows_interval(rows[counts == n, :n], level)
    return Interval(*out.reshape(4, *lead))


def _median_rows(rows: FloatArray, level: float) -> tuple[FloatArray, ...]:
    n = rows.shape[-1]
    below = scipy_stats.binom.cdf(np.arange(n // 2 + 1), n, 0.5)
    return _ordered_interval(rows, np.median(rows, axis=-1), below, level)


def _pseudomedian_rows(rows: FloatArray, level: float) -> tuple[FloatArray, ...]:
    n = rows.shape[-1]
    first, second = np.triu_indices(n)
    walsh = np.sort((rows[:, first] + rows[:, second]) / 2, axis=-1)
    below = np.cumsum(signed_rank_null(np.arange(1, n + 1)[None])[0, ::2])[: walsh.shape[-1] // 2 + 1]
    return _ordered_interval(walsh, np.median(walsh, axis=-1), below, level)


def _ordered_interval(
    ordered: FloatArray, estimate: FloatArray, below: FloatArray, level: float
) -> tuple[FloatArray, ...]:
    """[y_(k), y_(M+1-k)] with the largest k such that 1 - 2 P(count < k) >= level; below[j] = P(count <= j)."""
    k = int((1 - 2 * below >= level).sum())
    if k == 0:
        endless = np.full(len(ordered), np.inf)
        return estimate, -endless, endless, np.ones(len(ordered))
    return estimate, ordered[:, k - 1], ordered[:, -k], np.full(len(ordered), 1 - 2 * below[k - 1])
